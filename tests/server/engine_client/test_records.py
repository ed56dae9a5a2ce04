"""Questions to an engine: each caller gets its answer, few are asked at a time, and none waits for a lost engine."""

import asyncio

import pytest

from engine.shared.messages import ToEngine
from engine.shared.records import ReadFailed, ReadRequests, ReadSteps, Requests, Steps
from server.engine_client.records import MAX_QUESTIONS, RecordQuestions
from server.http.errors import EngineDeadError, ServerError
from tests.support.engine_clients import ready, until
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

QUESTION = ReadSteps(limit=1)


def steps(read_id: int, num_lost: int = 0) -> Steps:
    return Steps(read_id=read_id, steps=[], num_lost=num_lost, has_more=False)


async def test_each_caller_gets_its_own_answer() -> None:
    sent: list[ToEngine] = []
    questions = RecordQuestions(sent.append)
    tasks = [asyncio.create_task(questions.ask(QUESTION)) for _ in range(3)]
    await until(lambda: len(sent) == 3)
    for message in reversed(sent):
        assert isinstance(message, ReadSteps)
        questions.finish(steps(message.read_id, num_lost=10 * message.read_id))
    answers = [await task for task in tasks]
    assert [isinstance(each, Steps) and each.num_lost for each in answers] == [10, 20, 30]
    questions.finish(steps(1))  # nobody waits for it any more


async def test_few_questions_are_asked_at_a_time_and_cancelled_ones_make_room() -> None:
    sent: list[ToEngine] = []
    questions = RecordQuestions(sent.append)
    tasks = [asyncio.create_task(questions.ask(QUESTION)) for _ in range(MAX_QUESTIONS + 2)]
    await until(lambda: len(sent) == MAX_QUESTIONS)
    await asyncio.sleep(0.01)
    assert len(sent) == MAX_QUESTIONS
    tasks[0].cancel()
    await until(lambda: len(sent) == MAX_QUESTIONS + 1)
    questions.finish(steps(2))
    await until(lambda: len(sent) == MAX_QUESTIONS + 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_question_that_the_engine_fails_to_answer() -> None:
    questions = RecordQuestions(lambda message: None)
    task = asyncio.create_task(questions.ask(QUESTION))
    await asyncio.sleep(0)
    questions.finish(ReadFailed(1))
    with pytest.raises(ServerError):
        await task


async def test_questions_to_a_lost_engine_fail() -> None:
    questions = RecordQuestions(lambda message: None)
    task = asyncio.create_task(questions.ask(QUESTION))
    await asyncio.sleep(0)
    questions.fail(EngineDeadError())
    with pytest.raises(EngineDeadError):
        await task


async def test_over_the_connection_of_a_client(fake_engine: FakeEngine) -> None:
    async with ready(fake_engine.config.address) as client:
        assert isinstance(await client.records.ask(QUESTION), Steps)
        assert isinstance(await client.records.ask(ReadRequests(limit=1)), Requests)
        fake_engine.hang()
        await asyncio.sleep(0.1)  # it may still read a message
        task = asyncio.create_task(client.records.ask(QUESTION))
        await asyncio.sleep(0.01)
        client.mark_dead("a test")
        with pytest.raises(EngineDeadError):
            await task
