"""Questions to an engine: each caller gets its answer, few are asked at a time, and none waits for a lost engine."""

import asyncio
from collections.abc import AsyncIterator
from unittest import mock

import msgspec
import pytest

from engine.parts.inspection import records
from engine.parts.inspection.records import ReadSteps, StepList
from engine.shared.messages import Answer, Ask, StopAsking, ToEngine
from server.engine_client.client import EngineClient
from server.http.errors import EngineDeadError, EngineUnavailableError, QueueFullError, ServerError
from server.parts.inspection.access import MAX_QUESTIONS, MAX_WAITING, RecordQuestions, questions_to
from tests.support.engine_clients import read, ready, request, tokens, until
from tests.support.fake_engine import EOS_TOKEN_ID, FakeEngine
from tests.support.turned_loop import turn

pytestmark = pytest.mark.anyio

QUESTION = ReadSteps(limit=1)


def steps(number: int, num_lost: int = 0) -> Answer:
    found = StepList(engine="", num_blocks=1, num_lost=num_lost, has_more=False, data=[])
    return Answer(number, msgspec.msgpack.encode(found))


@pytest.fixture
async def client(fake_engine: FakeEngine) -> AsyncIterator[EngineClient]:
    async with ready(fake_engine.config.address) as client:
        yield client


@pytest.fixture
def sent() -> list[ToEngine]:
    """What has been sent to the engine."""
    return []


@pytest.fixture
def questions(sent: list[ToEngine]) -> RecordQuestions:
    return RecordQuestions(mock.Mock(send=sent.append))


async def ask(questions: RecordQuestions, count: int) -> list[asyncio.Task[StepList]]:
    """Ask a question this many times, and let all tasks run until they wait."""
    tasks = [asyncio.create_task(questions.ask(QUESTION, StepList)) for _ in range(count)]
    await turn(0)
    return tasks


async def test_each_caller_gets_its_own_answer(questions: RecordQuestions, sent: list[ToEngine]) -> None:
    tasks = await ask(questions, 3)
    for message in reversed(sent):
        assert isinstance(message, Ask)
        questions.finish(steps(message.number, num_lost=10 * message.number))
    answers = [await task for task in tasks]
    assert [each.num_lost for each in answers] == [10, 20, 30]
    questions.finish(steps(1))  # nobody waits for it any more
    for number, answer in ((4, None), (5, b"x")):  # there is none, or it cannot be read
        (task,) = await ask(questions, 1)
        questions.finish(Answer(number, answer))
        with pytest.raises(ServerError):
            await task


async def test_few_questions_are_asked_at_a_time_whether_or_not_their_callers_wait(
    questions: RecordQuestions, sent: list[ToEngine]
) -> None:
    tasks = await ask(questions, MAX_QUESTIONS + 3)
    for task in (tasks[0], tasks[MAX_QUESTIONS]):  # the engine has the first one; the other is never asked
        task.cancel()
    await turn(0)
    assert len(sent) == MAX_QUESTIONS
    for number in range(1, MAX_QUESTIONS + 3):
        questions.finish(steps(number))
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(answer, StepList) for answer in answers) == len(tasks) - 2
    assert len(sent) == len(tasks) - 1


async def test_only_so_many_questions_wait(questions: RecordQuestions, sent: list[ToEngine]) -> None:
    *_, last = await ask(questions, MAX_QUESTIONS + MAX_WAITING)
    assert not questions.has_room
    with pytest.raises(QueueFullError):
        await questions.ask(QUESTION, StepList)
    last.cancel()
    await turn(0)
    assert questions.has_room
    assert len(sent) == MAX_QUESTIONS


async def test_questions_to_a_lost_engine_fail_those_that_wait_too(
    questions: RecordQuestions, sent: list[ToEngine]
) -> None:
    tasks = await ask(questions, MAX_QUESTIONS + 2)
    questions.fail(EngineDeadError())
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(answer, EngineDeadError) for answer in answers)
    assert len(sent) == MAX_QUESTIONS
    (other,) = await ask(questions, 1)
    questions.finish(steps(MAX_QUESTIONS + 1))
    assert isinstance(await other, StepList)


async def test_over_the_connection_of_a_client(client: EngineClient, fake_engine: FakeEngine) -> None:
    (engine,) = client.engines
    questions = questions_to(engine)
    assert (await questions.ask(QUESTION, StepList)).data == []
    assert (await questions.ask(records.ReadRequests(limit=1), records.Requests)).requests == []
    fake_engine.hang()
    tasks = await ask(questions, MAX_QUESTIONS + 1)
    engine.liveness.mark_dead("a test")
    for task in tasks:
        with pytest.raises(EngineDeadError):
            await task
    with pytest.raises(EngineUnavailableError):
        await questions.ask(QUESTION, StepList)


async def test_an_inspection_whose_caller_is_gone_is_stopped(questions: RecordQuestions, sent: list[ToEngine]) -> None:
    inspect = records.Inspect(prompt_token_ids=[1], max_positions=1, max_end=1, top=1)
    task = asyncio.create_task(questions.ask(inspect, records.Inspected))
    await turn(0)
    for each in (task, *await ask(questions, 1)):
        each.cancel()
    await turn(0)
    assert sent[2:] == [StopAsking(1)]


@pytest.mark.checklist("F01")
async def test_an_answer_about_records_that_cannot_be_read(
    client: EngineClient, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The questions end, and the requests go on."""
    monkeypatch.setattr("tests.support.records.answer", lambda *_: "no bytes")
    fake_engine.pause()
    stream = client.submit(request())
    await until(lambda: fake_engine.num_choices)
    with pytest.raises(ServerError):
        await questions_to(client.engines[0]).ask(records.ReadQueue(limit=1), records.QueueList)
    fake_engine.resume()
    assert tokens(await read(stream)) == [*fake_engine.config.reply, EOS_TOKEN_ID]
