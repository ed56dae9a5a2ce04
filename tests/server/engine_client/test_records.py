"""Questions to an engine: each caller gets its answer, few are asked at a time, and none waits for a lost engine."""

import asyncio

import pytest

from engine.shared.messages import ToEngine
from engine.shared.records import Answer, Inspect, ReadFailed, ReadRequests, ReadSteps, Requests, Steps, StopReading
from server.engine_client.client import EngineClient
from server.engine_client.records import MAX_QUESTIONS, MAX_WAITING, RecordQuestions
from server.http.errors import EngineDeadError, EngineUnavailableError, QueueFullError, ServerError
from tests.support.fake_engine import FakeEngine
from tests.support.turned_loop import turn

pytestmark = pytest.mark.anyio

QUESTION = ReadSteps(limit=1)


def steps(read_id: int, num_lost: int = 0) -> Steps:
    return Steps(read_id=read_id, steps=[], num_lost=num_lost, has_more=False)


@pytest.fixture
def sent() -> list[ToEngine]:
    """What has been sent to the engine."""
    return []


@pytest.fixture
def questions(sent: list[ToEngine]) -> RecordQuestions:
    return RecordQuestions(sent.append, lambda: None)


async def ask(questions: RecordQuestions, count: int) -> list[asyncio.Task[Answer]]:
    """Ask a question this many times, and let all tasks run until they wait."""
    tasks = [asyncio.create_task(questions.ask(QUESTION)) for _ in range(count)]
    await turn(0)
    return tasks


async def test_each_caller_gets_its_own_answer(questions: RecordQuestions, sent: list[ToEngine]) -> None:
    tasks = await ask(questions, 3)
    for message in reversed(sent):
        assert isinstance(message, ReadSteps)
        questions.finish(steps(message.read_id, num_lost=10 * message.read_id))
    answers = [await task for task in tasks]
    assert [isinstance(each, Steps) and each.num_lost for each in answers] == [10, 20, 30]
    questions.finish(steps(1))  # nobody waits for it any more
    (task,) = await ask(questions, 1)
    questions.finish(ReadFailed(4))
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
    assert sum(isinstance(answer, Steps) for answer in answers) == len(tasks) - 2
    assert len(sent) == len(tasks) - 1


async def test_only_so_many_questions_wait(questions: RecordQuestions, sent: list[ToEngine]) -> None:
    *_, last = await ask(questions, MAX_QUESTIONS + MAX_WAITING)
    assert not questions.has_room
    with pytest.raises(QueueFullError):
        await questions.ask(QUESTION)
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
    assert isinstance(await other, Steps)


async def test_over_the_connection_of_a_client(client: EngineClient, fake_engine: FakeEngine) -> None:
    (engine,) = client.engines
    assert isinstance(await engine.records.ask(QUESTION), Steps)
    assert isinstance(await engine.records.ask(ReadRequests(limit=1)), Requests)
    fake_engine.hang()
    tasks = await ask(engine.records, MAX_QUESTIONS + 1)
    engine.liveness.mark_dead("a test")
    for task in tasks:
        with pytest.raises(EngineDeadError):
            await task
    with pytest.raises(EngineUnavailableError):
        await engine.records.ask(QUESTION)


async def test_an_inspection_whose_caller_is_gone_is_stopped(questions: RecordQuestions, sent: list[ToEngine]) -> None:
    inspect = Inspect(prompt_token_ids=[1], max_positions=1, max_end=1, top=1)
    tasks = [asyncio.create_task(questions.ask(each)) for each in (inspect, QUESTION)]
    await turn(0)
    for task in tasks:
        task.cancel()
    await turn(0)
    assert sent[2:] == [StopReading(1)]
