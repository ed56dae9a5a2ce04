"""The process that judges grammars: its verdicts are the compiler's, in a bounded time, whatever happens to it."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import psutil
import pytest

from engine.grammar.checker import CRASHED, MAX_PROCESSOR_SECONDS, TOO_SLOW
from engine.grammar.matcher import GrammarCompiler, GrammarError
from server.constrained import grammar_checker as grammar_judge
from server.constrained.grammar_checker import MAX_WAITING, UNSUITABLE, GrammarJudge, Problem
from server.http.errors import EngineUnavailableError, QueueFullError
from server.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID

T = TypeVar("T")

GOOD = ['start: "a" | "b"', '{"grammars":[{"json_schema":{"type":"object"}}]}', "start: /[a-z]+/"]
BAD = ["nonsense", 'start: "a" b', "start: a\na: b\nb: a", '{"grammars":[{"json_schema":{"not":{}}}]}', "start: /a(/"]
SLOW = "start: /(a?){5000}a{5000}/"


def judged(tokenizer: Tokenizer, ask: Callable[[GrammarJudge], Awaitable[T]], *, eos_token_ids: list[int]) -> T:
    before = set(psutil.Process().children())

    async def run() -> T:
        judge = GrammarJudge(tokenizer.to_json(), eos_token_ids)
        try:
            return await ask(judge)
        finally:
            await judge.close()
            assert set(psutil.Process().children()) <= before

    return asyncio.run(run())


def verdict(compiler: GrammarCompiler, grammar: str) -> str | None:
    try:
        compiler.compile(grammar)
    except GrammarError as error:
        return str(error)
    return None


def test_verdicts_are_the_compilers(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer.to_json(), [END_OF_TEXT_ID])

    async def ask(judge: GrammarJudge) -> None:
        for _ in range(2):  # asked, and remembered
            for grammar in GOOD + BAD:
                message = verdict(compiler, grammar)
                assert await judge.problem([grammar]) == (None if message is None else Problem(0, message))
                assert (message is None) == (grammar in GOOD)
        for index, grammar in enumerate(BAD):
            problem = await judge.problem([*GOOD[:index], grammar, BAD[0]])
            assert problem is not None
            assert problem.index == min(index, len(GOOD))
        assert await judge.problem(GOOD) is None

    judged(tokenizer, ask, eos_token_ids=[END_OF_TEXT_ID])


def test_what_takes_too_long_is_stopped(tokenizer: Tokenizer) -> None:
    """For many that ask for the same at once, too; what comes after is judged as ever."""

    async def ask(judge: GrammarJudge) -> None:
        assert await judge.problem([GOOD[0]]) is None
        start = time.monotonic()
        assert await judge.problem([GOOD[0], SLOW, GOOD[1]]) == Problem(1, TOO_SLOW)
        assert time.monotonic() - start >= MAX_PROCESSOR_SECONDS
        slow = [judge.problem([SLOW]) for _ in range(32)]
        assert set(await asyncio.gather(*slow)) == {Problem(0, TOO_SLOW)}
        assert time.monotonic() - start < 10  # two of 0.8 seconds each
        assert await judge.problem([GOOD[1]]) is None

    judged(tokenizer, ask, eos_token_ids=[END_OF_TEXT_ID])


def test_what_was_judged_before_does_not_wait(tokenizer: Tokenizer) -> None:
    async def ask(judge: GrammarJudge) -> None:
        assert await judge.problem([GOOD[0]]) is None
        slow = asyncio.create_task(judge.problem([SLOW]))
        await asyncio.sleep(0.05)
        start = time.monotonic()
        assert await judge.problem([GOOD[0]]) is None
        assert time.monotonic() - start < MAX_PROCESSOR_SECONDS / 2
        assert not slow.done()
        assert await slow == Problem(0, TOO_SLOW)

    judged(tokenizer, ask, eos_token_ids=[END_OF_TEXT_ID])


def test_no_more_wait_than_may(tokenizer: Tokenizer) -> None:
    async def ask(judge: GrammarJudge) -> None:
        questions = [judge.problem([f'{GOOD[0]} | "{number}"']) for number in range(MAX_WAITING + 5)]
        answers = await asyncio.gather(*questions, return_exceptions=True)
        assert answers[:MAX_WAITING] == [None] * MAX_WAITING
        assert [type(answer) for answer in answers[MAX_WAITING:]] == [QueueFullError] * 5
        assert await judge.problem([GOOD[1]]) is None

    judged(tokenizer, ask, eos_token_ids=[END_OF_TEXT_ID])


def test_a_process_that_cannot_live(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of the grammar, and nothing is remembered of it."""

    async def ask(judge: GrammarJudge) -> None:
        monkeypatch.setattr(grammar_judge, "COMMAND", ("false",))
        for _ in range(2):
            with pytest.raises(EngineUnavailableError):
                await judge.problem([GOOD[0]])
        monkeypatch.undo()
        assert await judge.problem([BAD[1]]) is not None
        assert await judge.problem([GOOD[0]]) is None

    judged(tokenizer, ask, eos_token_ids=[END_OF_TEXT_ID])


def test_who_goes_away_leaves_no_answer_to_others(tokenizer: Tokenizer) -> None:
    async def ask(judge: GrammarJudge) -> None:
        gone = asyncio.create_task(judge.problem([SLOW]))
        await asyncio.sleep(0.1)
        gone.cancel()
        for grammar in (*GOOD, *BAD):
            assert (await judge.problem([grammar]) is None) == (grammar in GOOD)

    judged(tokenizer, ask, eos_token_ids=[END_OF_TEXT_ID])


def test_a_process_that_was_killed_is_started_anew(tokenizer: Tokenizer) -> None:
    before = set(psutil.Process().children())

    async def ask(judge: GrammarJudge) -> None:
        for grammar in GOOD:
            assert await judge.problem([grammar]) is None
            (process,) = set(psutil.Process().children()) - before
            os.kill(process.pid, signal.SIGKILL)

    judged(tokenizer, ask, eos_token_ids=[END_OF_TEXT_ID])


def test_a_grammar_that_crashes_the_compiler_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = """
import os
from engine.grammar import checker as grammar_process
from engine.grammar.matcher import GrammarCompiler

class Crashing(GrammarCompiler):
    def compile(self, grammar):
        return os.abort() if "crash" in grammar else super().compile(grammar)

grammar_process.GrammarCompiler = Crashing
grammar_process.main()
"""
    monkeypatch.setattr(grammar_judge, "COMMAND", (grammar_judge.COMMAND[0], "-c", crashing))

    async def ask(judge: GrammarJudge) -> None:
        assert await judge.problem([GOOD[0], 'start: "crash"', GOOD[1]]) == Problem(1, CRASHED)
        assert await judge.problem([GOOD[0]]) is None

    judged(tokenizer, ask, eos_token_ids=[END_OF_TEXT_ID])


def test_a_tokenizer_that_does_not_suit(tokenizer: Tokenizer) -> None:
    async def ask(judge: GrammarJudge) -> Problem | None:
        assert await judge.problem([GOOD[0]]) == await judge.problem([GOOD[1]])
        return await judge.problem([GOOD[0]])

    assert judged(tokenizer, ask, eos_token_ids=[]) == Problem(0, UNSUITABLE)
