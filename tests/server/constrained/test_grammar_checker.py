"""The grammar checker agrees with the compiler and answers in a bounded time, whatever happens to its process."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import psutil
import pytest

from engine.grammar.checker import CRASHED, MAX_PROCESSOR_SECONDS, TOO_SLOW
from engine.grammar.compiler import GrammarCompiler, GrammarError
from server.constrained import grammar_checker
from server.constrained.grammar_checker import MAX_WAITING, UNSUITABLE, GrammarChecker, GrammarProblem
from server.http.errors import EngineUnavailableError, QueueFullError
from server.tenants import Tenant
from server.text.tokenizer import Tokenizer
from tests.support.processes import processor_limit
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID

T = TypeVar("T")

GOOD = ['start: "a" | "b"', '{"grammars":[{"json_schema":{"type":"object"}}]}', "start: /[a-z]+/"]
BAD = ["nonsense", 'start: "a" b', "start: a\na: b\nb: a", '{"grammars":[{"json_schema":{"not":{}}}]}', "start: /a(/"]
SLOW = "start: /(a?){5000}a{5000}/"


def run_with_checker(
    tokenizer: Tokenizer, check: Callable[[GrammarChecker], Awaitable[T]], *, eos_token_ids: list[int]
) -> T:
    before = set(psutil.Process().children())

    async def run() -> T:
        checker = GrammarChecker(tokenizer.to_json(), eos_token_ids)
        try:
            return await check(checker)
        finally:
            await checker.close()
            assert set(psutil.Process().children()) <= before

    return asyncio.run(run())


def compiler_message(compiler: GrammarCompiler, grammar: str) -> str | None:
    try:
        compiler.compile(grammar)
    except GrammarError as error:
        return str(error)
    return None


def test_results_agree_with_the_compiler(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer.to_json(), [END_OF_TEXT_ID])

    async def check(checker: GrammarChecker) -> None:
        for _ in range(2):  # checked, then cached
            for grammar in GOOD + BAD:
                message = compiler_message(compiler, grammar)
                assert await checker.find_problem([grammar]) == (
                    None if message is None else GrammarProblem(0, message)
                )
                assert (message is None) == (grammar in GOOD)
        for index, grammar in enumerate(BAD):
            problem = await checker.find_problem([*GOOD[:index], grammar, BAD[0]])
            assert problem is not None
            assert problem.index == min(index, len(GOOD))
        assert await checker.find_problem(GOOD) is None

    run_with_checker(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


@pytest.mark.checklist("C21")
def test_what_takes_too_long_is_stopped(tokenizer: Tokenizer) -> None:
    """Many concurrent checks of one slow grammar share its result, and later checks work as before."""

    async def check(checker: GrammarChecker) -> None:
        assert await checker.find_problem([GOOD[0]]) is None
        start = time.monotonic()
        assert await checker.find_problem([GOOD[0], SLOW, GOOD[1]]) == GrammarProblem(1, TOO_SLOW)
        assert time.monotonic() - start >= MAX_PROCESSOR_SECONDS
        slow = [checker.find_problem([SLOW]) for _ in range(32)]
        with processor_limit(2):  # one check for all of them
            assert set(await asyncio.gather(*slow)) == {GrammarProblem(0, TOO_SLOW)}
        assert await checker.find_problem([GOOD[1]]) is None

    run_with_checker(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_cached_results_do_not_wait(tokenizer: Tokenizer) -> None:
    async def check(checker: GrammarChecker) -> None:
        assert await checker.find_problem([GOOD[0]]) is None
        slow = asyncio.create_task(checker.find_problem([SLOW]))
        await asyncio.sleep(0.05)
        start = time.monotonic()
        assert await checker.find_problem([GOOD[0]]) is None
        assert time.monotonic() - start < MAX_PROCESSOR_SECONDS / 2
        assert not slow.done()
        assert await slow == GrammarProblem(0, TOO_SLOW)

    run_with_checker(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_tenants_take_turns(tokenizer: Tokenizer) -> None:
    """One tenant's checks, of which as many wait as may, hold up another's for no more than two of them."""
    other = Tenant(name="other")

    async def check(checker: GrammarChecker) -> None:
        many = [asyncio.create_task(checker.find_problem([f"{SLOW} /{number}/"])) for number in range(MAX_WAITING)]
        await asyncio.sleep(0.05)
        assert await checker.find_problem([GOOD[0]], other) is None
        assert sum(each.done() for each in many) <= 2
        for each in many:
            each.cancel()

    run_with_checker(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_no_more_wait_than_may(tokenizer: Tokenizer) -> None:
    async def check(checker: GrammarChecker) -> None:
        checks = [checker.find_problem([f'{GOOD[0]} | "{number}"']) for number in range(MAX_WAITING + 5)]
        answers = await asyncio.gather(*checks, return_exceptions=True)
        assert answers[:MAX_WAITING] == [None] * MAX_WAITING
        assert [type(answer) for answer in answers[MAX_WAITING:]] == [QueueFullError] * 5
        assert await checker.find_problem([GOOD[1]]) is None

    run_with_checker(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_a_process_that_cannot_live(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is not blamed on the grammar, and not cached."""

    async def check(checker: GrammarChecker) -> None:
        monkeypatch.setattr(grammar_checker, "COMMAND", ("false",))
        for _ in range(2):
            with pytest.raises(EngineUnavailableError):
                await checker.find_problem([GOOD[0]])
        monkeypatch.undo()
        assert await checker.find_problem([BAD[1]]) is not None
        assert await checker.find_problem([GOOD[0]]) is None

    run_with_checker(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_who_goes_away_leaves_no_answer_to_others(tokenizer: Tokenizer) -> None:
    async def check(checker: GrammarChecker) -> None:
        gone = asyncio.create_task(checker.find_problem([SLOW]))
        await asyncio.sleep(0.1)
        gone.cancel()
        for grammar in (*GOOD, *BAD):
            assert (await checker.find_problem([grammar]) is None) == (grammar in GOOD)

    run_with_checker(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_a_process_that_was_killed_is_started_anew(tokenizer: Tokenizer) -> None:
    before = set(psutil.Process().children())

    async def check(checker: GrammarChecker) -> None:
        for grammar in GOOD:
            assert await checker.find_problem([grammar]) is None
            (process,) = set(psutil.Process().children()) - before
            os.kill(process.pid, signal.SIGKILL)

    run_with_checker(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


@pytest.mark.checklist("C21")
def test_a_grammar_that_crashes_the_compiler_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = """
import os
from engine.grammar import checker as grammar_process
from engine.grammar.compiler import GrammarCompiler

class Crashing(GrammarCompiler):
    def compile(self, grammar):
        return os.abort() if "crash" in grammar else super().compile(grammar)

grammar_process.GrammarCompiler = Crashing
grammar_process.main()
"""
    monkeypatch.setattr(grammar_checker, "COMMAND", (grammar_checker.COMMAND[0], "-c", crashing))

    async def check(checker: GrammarChecker) -> None:
        assert await checker.find_problem([GOOD[0], 'start: "crash"', GOOD[1]]) == GrammarProblem(1, CRASHED)
        assert await checker.find_problem([GOOD[0]]) is None

    run_with_checker(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_a_tokenizer_that_does_not_suit(tokenizer: Tokenizer) -> None:
    async def check(checker: GrammarChecker) -> GrammarProblem | None:
        assert await checker.find_problem([GOOD[0]]) == await checker.find_problem([GOOD[1]])
        return await checker.find_problem([GOOD[0]])

    assert run_with_checker(tokenizer, check, eos_token_ids=[]) == GrammarProblem(0, UNSUITABLE)
