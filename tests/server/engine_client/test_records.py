"""Questions to an engine: each caller gets its answer, few are asked at a time, and none waits for a lost engine."""

import asyncio

import pytest

from engine.shared.messages import ToEngine
from engine.shared.records import Inspect, ReadFailed, ReadRequests, ReadSteps, Requests, Steps, StopReading
from server.engine_client.records import MAX_QUESTIONS, MAX_WAITING, RecordQuestions
from server.http.errors import EngineDeadError, EngineUnavailableError, QueueFullError, ServerError
from tests.support.engine_clients import ready, until
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

QUESTION = ReadSteps(limit=1)


def always_ready() -> None:
    pass


def steps(read_id: int, num_lost: int = 0) -> Steps:
    return Steps(read_id=read_id, steps=[], num_lost=num_lost, has_more=False)


async def settle() -> None:
    """Let all tasks run until they wait."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_each_caller_gets_its_own_answer() -> None:
    sent: list[ToEngine] = []
    questions = RecordQuestions(sent.append, always_ready)
    tasks = [asyncio.create_task(questions.ask(QUESTION)) for _ in range(3)]
    await until(lambda: len(sent) == 3)
    for message in reversed(sent):
        assert isinstance(message, ReadSteps)
        questions.finish(steps(message.read_id, num_lost=10 * message.read_id))
    answers = [await task for task in tasks]
    assert [isinstance(each, Steps) and each.num_lost for each in answers] == [10, 20, 30]
    questions.finish(steps(1))  # nobody waits for it any more


async def test_few_questions_are_asked_at_a_time_whether_or_not_their_callers_wait() -> None:
    sent: list[ToEngine] = []
    questions = RecordQuestions(sent.append, always_ready)
    tasks = [asyncio.create_task(questions.ask(QUESTION)) for _ in range(MAX_QUESTIONS + 3)]
    await until(lambda: len(sent) == MAX_QUESTIONS)
    for task in (tasks[0], tasks[MAX_QUESTIONS]):  # the engine has the first one; the other is never asked
        task.cancel()
    await settle()
    assert len(sent) == MAX_QUESTIONS
    for number in range(1, MAX_QUESTIONS + 3):
        questions.finish(steps(number))
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(answer, Steps) for answer in answers) == len(tasks) - 2
    assert len(sent) == len(tasks) - 1


async def test_only_so_many_questions_wait() -> None:
    sent: list[ToEngine] = []
    questions = RecordQuestions(sent.append, always_ready)
    tasks = [asyncio.create_task(questions.ask(QUESTION)) for _ in range(MAX_QUESTIONS + MAX_WAITING)]
    await until(lambda: not questions.has_room)
    with pytest.raises(QueueFullError):
        await questions.ask(QUESTION)
    tasks[-1].cancel()
    await until(lambda: questions.has_room)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(sent) == MAX_QUESTIONS


async def test_a_question_that_the_engine_fails_to_answer() -> None:
    questions = RecordQuestions(lambda message: None, always_ready)
    task = asyncio.create_task(questions.ask(QUESTION))
    await asyncio.sleep(0)
    questions.finish(ReadFailed(1))
    with pytest.raises(ServerError):
        await task


async def test_questions_to_a_lost_engine_fail_those_that_wait_too() -> None:
    sent: list[ToEngine] = []
    questions = RecordQuestions(sent.append, always_ready)
    tasks = [asyncio.create_task(questions.ask(QUESTION)) for _ in range(MAX_QUESTIONS + 2)]
    await until(lambda: len(sent) == MAX_QUESTIONS)
    questions.fail(EngineDeadError())
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(answer, EngineDeadError) for answer in answers)
    assert len(sent) == MAX_QUESTIONS
    other = asyncio.create_task(questions.ask(QUESTION))
    await until(lambda: len(sent) == MAX_QUESTIONS + 1)
    questions.finish(steps(MAX_QUESTIONS + 1))
    assert isinstance(await other, Steps)


async def test_over_the_connection_of_a_client(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        assert isinstance(await client.engines[0].records.ask(QUESTION), Steps)
        assert isinstance(await client.engines[0].records.ask(ReadRequests(limit=1)), Requests)
        fake_engine.hang()
        tasks = [asyncio.create_task(client.engines[0].records.ask(QUESTION)) for _ in range(MAX_QUESTIONS + 1)]
        await asyncio.sleep(0)
        client.engines[0].liveness.mark_dead("a test")
        async with asyncio.timeout(60):
            for task in tasks:
                with pytest.raises(EngineDeadError):
                    await task
        with pytest.raises(EngineUnavailableError):
            await client.engines[0].records.ask(QUESTION)


async def test_an_inspection_whose_caller_is_gone_is_stopped() -> None:
    sent: list[ToEngine] = []
    questions = RecordQuestions(sent.append, always_ready)
    task = asyncio.create_task(questions.ask(Inspect(prompt_token_ids=[1], max_positions=1, max_end=1, top=1)))
    other = asyncio.create_task(questions.ask(QUESTION))
    await until(lambda: len(sent) == 2)
    for each in (task, other):
        each.cancel()
    await asyncio.gather(task, other, return_exceptions=True)
    assert sent[2:] == [StopReading(1)]
    questions.finish(ReadFailed(1))
    assert questions.has_room
