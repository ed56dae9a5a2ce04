"""The grammar process agrees with the compiler and answers in a bounded time, whatever happens to it."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psutil
import pytest

from engine.grammar.compiler import GrammarCompiler, GrammarError
from server.api.chat.schemas import ChatCompletionRequest
from server.constrained import grammar_process
from server.constrained.grammar_process import MAX_WAITING, UNSUITABLE, GrammarProcess
from server.constrained.messages import Grammar, GrammarProblem, GrammarVocabulary, encode_request
from server.constrained.process import CRASHED, TOO_DEEP, TOO_SLOW
from server.http.errors import EngineUnavailableError, InvalidValueError, QueueFullError
from server.tenants import Tenant
from server.text.parsers.answer_parser import AnswerFormat
from server.text.parsers.argument_values import Schema
from server.text.tokenizer import Tokenizer
from tests.support.processes import processor_limit
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID
from tests.support.tool_templates import load_template

T = TypeVar("T")

GOOD = ['start: "a" | "b"', 'start: "b"+', "start: /[a-z]+/"]
BAD = ["nonsense", 'start: "a" b', "start: a\na: b\nb: a", "start: /a(/"]
SLOW = "start: /(a?){5000}a{5000}/"
FORMAT = AnswerFormat(content_markers=("",), tools={"f": {}})


def request(format: AnswerFormat | None = None, **fields: Any) -> bytes:
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "?"}], **fields})
    encoded = encode_request(body, format)
    assert encoded is not None
    return encoded


def of_grammar(grammar: str) -> bytes:
    return request(structured_outputs={"grammar": grammar})


def of_tools(*schemas: Schema, format: AnswerFormat = FORMAT) -> bytes:
    tools = [
        {"type": "function", "function": {"name": f"f{index}", "parameters": schema}}
        for index, schema in enumerate(schemas)
    ]
    return request(format, tools=tools, tool_choice="required")


def problem(message: str, param: str = "structured_outputs.grammar") -> GrammarProblem:
    return GrammarProblem(f"Invalid '{param}': {message}.", param)


def run_with_process(
    tokenizer: Tokenizer, check: Callable[[GrammarProcess], Awaitable[T]], *, eos_token_ids: list[int]
) -> T:
    before = set(psutil.Process().children())

    async def run() -> T:
        process = GrammarProcess(GrammarVocabulary(tokenizer.to_json(), eos_token_ids, {}))
        try:
            return await check(process)
        finally:
            await process.close()
            assert set(psutil.Process().children()) <= before

    return asyncio.run(run())


def compiler_message(compiler: GrammarCompiler, grammar: str) -> str | None:
    try:
        compiler.compile(grammar)
    except GrammarError as error:
        return " ".join(str(error).split()).rstrip(".")
    return None


def test_results_agree_with_the_compiler(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer.to_json(), [END_OF_TEXT_ID])

    async def check(process: GrammarProcess) -> None:
        for _ in range(2):  # made, then kept
            for grammar in GOOD + BAD:
                message = compiler_message(compiler, grammar)
                result = await process.find(of_grammar(grammar))
                expected = Grammar(grammar, "structured_outputs.grammar")
                assert result == (expected if message is None else problem(message))
                assert (message is None) == (grammar in GOOD)

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


@pytest.mark.checklist("C21")
def test_what_takes_too_long_is_stopped(tokenizer: Tokenizer) -> None:
    """Many concurrent requests for one slow grammar share its result, and later requests work as before."""

    async def check(process: GrammarProcess) -> None:
        assert isinstance(await process.find(of_grammar(GOOD[0])), Grammar)
        with processor_limit(2):  # one process for all of them
            slow = await asyncio.gather(*[process.find(of_grammar(SLOW)) for _ in range(32)])
        assert slow == [problem(TOO_SLOW)] * 32
        assert isinstance(await process.find(of_grammar(GOOD[1])), Grammar)

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}
NAMES = {f"p{index}": {"enum": ["a", "b"]} for index in range(40)}
CLOSED = {"type": "object", "additionalProperties": False}
CHAIN = {str(index): {**CLOSED, "properties": {"a": {"$ref": f"#/$defs/{index + 1}"}}} for index in range(500)}
DEEP = '{"items":' * 5000 + "{}" + "}" * 5000
ODD: list[Any] = [{"type": [{}]}, {"anyOf": 5}, {"properties": ["a"]}, {"required": 1}, {"enum": {}}, {"items": 1}]
TOOLS: dict[str, Schema] = {
    "itself": {"type": "object", "properties": {"a": LOOP}, "$defs": LOOP["$defs"]},
    "alternatives": {"anyOf": [{"$ref": "#"}] * 17},
    "chain": {**CLOSED, "properties": {"a": {"$ref": "#/$defs/0"}}, "$defs": CHAIN},
    "copies": {"properties": {f"p{n}": {"$ref": "#/$defs/0"} for n in range(500)}, "$defs": {"0": NAMES}},
    **{f"odd {odd}": {"properties": {"a": odd}} for odd in ODD},
}
FORMATS = {name: load_template(name).tool_format for name in ("Qwen3-Coder", "MiniMax-M3", "google-gemma-4-31B-it")}
HOSTILE: dict[str, bytes] = {
    "itself": of_tools({"type": "object", **LOOP}),
    "tags": request(guided_json={"oneOf": [{"type": "object", "properties": NAMES}] * 30}),
    "deep text": request(guided_json=DEEP),
    "deep tag": request(structured_outputs={"structural_tag": DEEP.replace("items", "format")}),
    "chain of rules": of_grammar("start: r0\n" + "\n".join(f"r{n}: r{n + 1}" for n in range(900)) + '\nr900: "a"'),
    "many": of_tools(*[{"type": "object", "properties": NAMES}] * 100),
    **{
        f"{template} {name}": of_tools(schema, format=AnswerFormat(format, {"f": {}}))
        for template, format in FORMATS.items()
        for name, schema in TOOLS.items()
    },
}


@pytest.mark.checklist("C21")
def test_whatever_a_schema_costs_it_is_answered(tokenizer: Tokenizer) -> None:
    """Each request gets a grammar or a problem, never an error of the server."""

    async def check(process: GrammarProcess) -> None:
        for name, hostile in HOSTILE.items():
            result = await process.find(hostile)
            print(name, result if isinstance(result, GrammarProblem) else len(result.text))
            assert isinstance(result, Grammar) or result.message.startswith("Invalid '")
        deep = await process.find(HOSTILE["MiniMax-M3 chain"])
        assert deep == problem(TOO_DEEP, "tools")
        assert isinstance(await process.find(of_grammar(GOOD[0])), Grammar)

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_kept_results_do_not_wait(tokenizer: Tokenizer) -> None:
    async def check(process: GrammarProcess) -> None:
        assert isinstance(await process.find(of_grammar(GOOD[0])), Grammar)
        slow = asyncio.create_task(process.find(of_grammar(SLOW)))
        await asyncio.sleep(0)
        assert isinstance(await process.find(of_grammar(GOOD[0])), Grammar)
        assert not slow.done()
        assert await slow == problem(TOO_SLOW)

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_tenants_take_turns(tokenizer: Tokenizer) -> None:
    """One tenant's requests, of which as many wait as may, hold up another's for no more than two of them."""
    other = Tenant(name="other")

    async def check(process: GrammarProcess) -> None:
        many = [asyncio.create_task(process.find(of_grammar(f"{SLOW} /{number}/"))) for number in range(MAX_WAITING)]
        await asyncio.sleep(0)
        assert isinstance(await process.find(of_grammar(GOOD[0]), other), Grammar)
        assert sum(each.done() for each in many) <= 2
        for each in many:
            each.cancel()

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_turns_are_charged_what_they_cost(tokenizer: Tokenizer) -> None:
    """After a slow request, the tenant's next one waits until others have had as much time."""
    other = Tenant(name="other")

    async def check(process: GrammarProcess) -> None:
        slow = [asyncio.create_task(process.find(of_grammar(f"{SLOW} /{number}/"))) for number in range(2)]
        await asyncio.sleep(0)
        fast = [asyncio.create_task(process.find(of_grammar(f'start: "{number}"'), other)) for number in range(8)]
        await asyncio.gather(*fast)
        assert slow[0].done()
        assert not slow[1].done()
        await asyncio.gather(*slow)

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_no_more_wait_than_may(tokenizer: Tokenizer) -> None:
    async def check(process: GrammarProcess) -> None:
        requests = [process.find(of_grammar(f'{GOOD[0]} | "{number}"')) for number in range(MAX_WAITING + 5)]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(answer) for answer in answers[:MAX_WAITING]} == {Grammar}
        assert [type(answer) for answer in answers[MAX_WAITING:]] == [QueueFullError] * 5
        assert isinstance(await process.find(of_grammar(GOOD[1])), Grammar)

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_a_process_that_cannot_live(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is not blamed on the grammar, and not kept."""

    async def check(process: GrammarProcess) -> None:
        monkeypatch.setattr(grammar_process, "COMMAND", ("false",))
        for _ in range(2):
            with pytest.raises(EngineUnavailableError):
                await process.find(of_grammar(GOOD[0]))
        monkeypatch.undo()
        assert isinstance(await process.find(of_grammar(BAD[1])), GrammarProblem)
        assert isinstance(await process.find(of_grammar(GOOD[0])), Grammar)

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_who_goes_away_leaves_no_answer_to_others(tokenizer: Tokenizer) -> None:
    """Nor work: what waits for its turn is not done."""

    async def check(process: GrammarProcess) -> None:
        gone = [asyncio.create_task(process.find(of_grammar(f"{SLOW} /{number}/"))) for number in range(8)]
        await gone[0]
        for each in gone:
            each.cancel()
        with processor_limit(2):
            for grammar in (*GOOD, *BAD):
                result = await process.find(of_grammar(grammar))
                assert isinstance(result, Grammar) == (grammar in GOOD)

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_a_process_that_was_killed_is_started_anew(tokenizer: Tokenizer) -> None:
    before = set(psutil.Process().children())

    async def check(process: GrammarProcess) -> None:
        for grammar in GOOD:
            assert isinstance(await process.find(of_grammar(grammar)), Grammar)
            (child,) = set(psutil.Process().children()) - before
            os.kill(child.pid, signal.SIGKILL)

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


@pytest.mark.checklist("C21")
def test_a_grammar_that_crashes_the_compiler_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = """
import os
from engine.grammar.compiler import GrammarCompiler
from server.constrained import process

class Crashing(GrammarCompiler):
    def compile(self, grammar):
        return os.abort() if "crash" in grammar else super().compile(grammar)

process.GrammarCompiler = Crashing
process.main()
"""
    monkeypatch.setattr(grammar_process, "COMMAND", (grammar_process.COMMAND[0], "-c", crashing))

    async def check(process: GrammarProcess) -> None:
        tools = of_tools({"type": "object"}, {"type": "object", "properties": {"crash": {}}})
        assert await process.find(tools) == problem(CRASHED, "tools[1].function.parameters")
        assert await process.find(of_grammar('start: "crash"')) == problem(CRASHED)
        assert isinstance(await process.find(of_grammar(GOOD[0])), Grammar)

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_a_process_that_is_just_started_ends_too(tokenizer: Tokenizer) -> None:
    async def check(process: GrammarProcess) -> None:
        task = asyncio.create_task(process.find(of_grammar(GOOD[0])))
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


@pytest.mark.parametrize("name", FORMATS)
def test_tools_may_have_hundreds_of_parameters(tokenizer: Tokenizer, name: str) -> None:
    """The rules of each follow from those of the next one, so llguidance recurses."""
    properties = {f"p{index}": {"type": "string"} for index in range(400)}
    schema = {**CLOSED, "properties": properties, "required": [*properties]}

    async def check(process: GrammarProcess) -> None:
        tools = of_tools(schema, format=AnswerFormat(FORMATS[name], {"f": {}}))
        assert isinstance(await process.find(tools), Grammar)

    run_with_process(tokenizer, check, eos_token_ids=[END_OF_TEXT_ID])


def test_a_tokenizer_that_does_not_suit(tokenizer: Tokenizer) -> None:
    async def check(process: GrammarProcess) -> None:
        for grammar in (*GOOD, GOOD[0]):
            assert await process.find(of_grammar(grammar)) == GrammarProblem(UNSUITABLE)
        body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "?"}]})
        with pytest.raises(InvalidValueError, match=UNSUITABLE) as error:
            await process.make(of_grammar(GOOD[0]), body)
        assert error.value.param == "structured_outputs.grammar"

    run_with_process(tokenizer, check, eos_token_ids=[])
