"""The grammar process agrees with the compiler and answers in a bounded time, whatever happens to it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from itertools import count
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from engine.grammar.compiler import GrammarCompiler, GrammarError
from server.api.chat.schemas import ChatCompletionRequest
from server.constrained.grammars import (
    CRASHED,
    MAX_WAITING,
    TOO_DEEP,
    UNSUITABLE,
    Grammar,
    GrammarMaker,
    GrammarProblem,
    Grammars,
    GrammarVocabulary,
    encode_request,
)
from server.http.errors import EngineUnavailableError, InvalidValueError, QueueFullError
from server.part_table import is_installed
from server.parts.hardening import grammar_process
from server.parts.hardening.grammar_process import TOO_SLOW
from server.parts.hardening.processes import Processes
from server.tenants import Tenant
from server.text.parsers.answer_parser import AnswerFormat
from server.text.parsers.tool_formats import Schema
from server.text.tokenizer import Tokenizer
from tests.support.examples import IS_LONG
from tests.support.serving import wait_until
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID
from tests.support.tool_templates import load_template

pytestmark = pytest.mark.anyio

GOOD = ['start: "a" | "b"', 'start: "b"+', "start: /[a-z]+/"]
BAD = ["nonsense", 'start: "a" b', "start: a\na: b\nb: a", "start: /a(/"]
NUMBERS = count()
FORMAT = AnswerFormat(content_markers=("",), tools={"f": {}})


def request(format: AnswerFormat | None = None, **fields: Any) -> bytes:
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "?"}], **fields})
    encoded = encode_request(body, format)
    assert encoded is not None
    return encoded


def of_grammar(grammar: str) -> bytes:
    return request(structured_outputs={"grammar": grammar})


def slow_grammar() -> bytes:
    """Return a request for a grammar that takes too long, and that nobody has asked for."""
    return of_grammar(f"start: /(a?){{5000}}a{{5000}}/ /{next(NUMBERS)}/")


def of_tools(*schemas: Schema, format: AnswerFormat = FORMAT) -> bytes:
    functions = [{"name": f"f{index}", "parameters": schema} for index, schema in enumerate(schemas)]
    tools = [{"type": "function", "function": function} for function in functions]
    return request(format, tools=tools, tool_choice="required")


def problem(message: str, param: str = "structured_outputs.grammar") -> GrammarProblem:
    return GrammarProblem(f"Invalid '{param}': {message}.", param)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def process(tokenizer: Tokenizer) -> AsyncIterator[Grammars]:
    """A process that the tests share which do not end it."""
    process = Grammars(GrammarVocabulary(tokenizer.to_json(), [END_OF_TEXT_ID], {}))
    yield process
    process.close()


@pytest.fixture
async def own_process(tokenizer: Tokenizer) -> AsyncIterator[Grammars]:
    """A process for one test, of which nothing may be left."""
    before = set(psutil.Process().children())
    process = Grammars(GrammarVocabulary(tokenizer.to_json(), [END_OF_TEXT_ID], {}))
    yield process
    process.close()
    wait_until(lambda: set(psutil.Process().children()) <= before)


def processes_of(grammars: Grammars) -> Processes:
    assert isinstance(grammars._maker, grammar_process.GrammarProcess)
    return grammars._maker._processes


async def test_results_agree_with_the_compiler(tokenizer: Tokenizer, process: Grammars) -> None:
    """And without the part, with what is made in this process."""
    compiler = GrammarCompiler(tokenizer.to_json(), [END_OF_TEXT_ID])
    maker = GrammarMaker(GrammarVocabulary(tokenizer.to_json(), [END_OF_TEXT_ID], {}))
    for grammar in (GOOD + BAD) * 2:  # made, then kept
        expected: Grammar | GrammarProblem = Grammar(grammar, "structured_outputs.grammar")
        try:
            compiler.compile(grammar)
        except GrammarError as error:
            expected = problem(" ".join(str(error).split()).rstrip("."))
        assert await process.find(of_grammar(grammar)) == maker.make(of_grammar(grammar)) == expected
        assert isinstance(expected, Grammar) == (grammar in GOOD)


@pytest.mark.checklist("C21")
async def test_what_takes_too_long_is_stopped(process: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many concurrent requests for one slow grammar share its result, and later requests work as before."""
    answer, request = Mock(wraps=process._maker.make), slow_grammar()
    monkeypatch.setattr(process._maker, "make", answer)
    slow = await asyncio.gather(*[process.find(request) for _ in range(32)])
    assert slow == [problem(TOO_SLOW)] * 32
    answer.assert_called_once_with(request)
    assert isinstance(await process.find(of_grammar(GOOD[1])), Grammar)
    again = asyncio.create_task(process.find(slow_grammar()))
    await asyncio.sleep(0)
    assert isinstance(await process.find(of_grammar(GOOD[1])), Grammar)  # which is kept, so it does not wait
    assert not again.done()
    assert await again == problem(TOO_SLOW)


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
TEMPLATES = ("Qwen3-Coder", "google-gemma-4-31B-it")


def of_template(name: str, *schemas: Schema) -> bytes:
    return of_tools(*schemas, format=AnswerFormat(load_template(name).tool_format, {"f": {}}))


@pytest.mark.checklist("C21")
@pytest.mark.skipif(not is_installed("tool_formats"), reason="its templates are of that part")
async def test_whatever_a_schema_costs_it_is_answered(process: Grammars) -> None:
    """Each request gets a grammar or a problem, never an error of the server.

    Those with odd schemas are tried with one template only, if not in `make test-long`.
    """
    templates = {name: TEMPLATES if IS_LONG or not name.startswith("odd") else TEMPLATES[:1] for name in TOOLS}
    requests = {
        "itself": of_tools({"type": "object", **LOOP}),
        "tags": request(json_schema={"oneOf": [{"type": "object", "properties": NAMES}] * 30}),
        "deep text": request(json_schema=DEEP),
        "deep tag": request(structured_outputs={"structural_tag": DEEP.replace("items", "format")}),
        "chain of rules": of_grammar("start: r0\n" + "\n".join(f"r{n}: r{n + 1}" for n in range(900)) + '\nr900: "a"'),
        "many": of_tools(*[{"type": "object", "properties": NAMES}] * 100),
        **{f"{each} {name}": of_template(each, schema) for name, schema in TOOLS.items() for each in templates[name]},
    }
    for name, hostile in requests.items():
        result = await process.find(hostile)
        assert isinstance(result, Grammar) or result.message.startswith("Invalid '"), name
    if is_installed("tool_formats"):
        assert await process.find(requests["google-gemma-4-31B-it chain"]) == problem(TOO_DEEP, "tools")
    # The rules of each parameter follow from those of the next one, so llguidance recurses.
    properties = {f"p{index}": {"type": "string"} for index in range(400)}
    for name in TEMPLATES:
        hundreds = of_template(name, {**CLOSED, "properties": properties, "required": [*properties]})
        assert isinstance(await process.find(hundreds), Grammar)
    assert isinstance(await process.find(of_grammar(GOOD[0])), Grammar)


async def test_tenants_take_turns(process: Grammars) -> None:
    """One tenant's requests, of which as many wait as may, hold up another's for no more than two of them."""
    other = Tenant(name="other")
    many = [asyncio.create_task(process.find(slow_grammar())) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    assert isinstance(await process.find(of_grammar(f"{GOOD[0]} /{next(NUMBERS)}/"), other), Grammar)
    assert sum(each.done() for each in many) <= 2
    for each in many:
        each.cancel()


async def test_no_more_wait_than_may(process: Grammars) -> None:
    tenant, requests = Tenant(name="many"), [f'{GOOD[0]} | "{number}"' for number in range(MAX_WAITING + 5)]
    tasks = [process.find(of_grammar(each), tenant) for each in requests]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(answer) for answer in answers[:MAX_WAITING]} == {Grammar}
    assert [type(answer) for answer in answers[MAX_WAITING:]] == [QueueFullError] * 5
    assert isinstance(await process.find(of_grammar(GOOD[1])), Grammar)


async def test_a_process_that_cannot_live(own_process: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is not blamed on the grammar, and not kept."""
    monkeypatch.setattr(processes_of(own_process), "_command", ("false",))
    for _ in range(2):
        with pytest.raises(EngineUnavailableError):
            await own_process.find(of_grammar(GOOD[0]))
    monkeypatch.undo()
    assert isinstance(await own_process.find(of_grammar(BAD[1])), GrammarProblem)
    assert isinstance(await own_process.find(of_grammar(GOOD[0])), Grammar)


async def test_who_goes_away_leaves_no_answer(process: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor work: what waits for its turn is not done."""
    answer = Mock(wraps=process._maker.make)
    monkeypatch.setattr(process._maker, "make", answer)
    gone = [asyncio.create_task(process.find(slow_grammar())) for _ in range(8)]
    await gone[0]
    for each in gone:
        each.cancel()
    bad = [f"{grammar} /{next(NUMBERS)}" for grammar in BAD]
    for grammar in (*GOOD, *bad):
        assert isinstance(await process.find(of_grammar(grammar)), Grammar) == (grammar in GOOD)
    assert answer.call_count <= 2 + len([*GOOD, *bad])


async def test_a_process_that_was_killed_is_started_anew(own_process: Grammars) -> None:
    before = set(psutil.Process().children())
    for grammar in GOOD:
        assert isinstance(await own_process.find(of_grammar(grammar)), Grammar)
        (child,) = set(psutil.Process().children()) - before
        os.kill(child.pid, signal.SIGKILL)


@pytest.mark.checklist("C21")
async def test_a_grammar_that_crashes_the_compiler(own_process: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = """
import os
from engine.grammar.compiler import GrammarCompiler
from server.constrained import grammars
from server.parts.hardening import grammar_process

class Crashing(GrammarCompiler):
    def compile(self, grammar):
        return os.abort() if "crash" in grammar else super().compile(grammar)

grammars.GrammarCompiler = Crashing
grammar_process.main()
"""
    command = (grammar_process.COMMAND[0], "-c", crashing)
    monkeypatch.setattr(processes_of(own_process), "_command", command)
    tools = of_tools({"type": "object"}, {"type": "object", "properties": {"crash": {}}})
    assert await own_process.find(tools) == problem(CRASHED, "tools[1].function.parameters")
    assert await own_process.find(of_grammar('start: "crash"')) == problem(CRASHED)
    assert isinstance(await own_process.find(of_grammar(GOOD[0])), Grammar)


async def test_a_process_that_is_just_started_ends_too(own_process: Grammars) -> None:
    task = asyncio.create_task(own_process.find(of_grammar(GOOD[0])))
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()


async def test_a_tokenizer_that_does_not_suit(tokenizer: Tokenizer) -> None:
    process = Grammars(GrammarVocabulary(tokenizer.to_json(), [], {}))
    for grammar in (*GOOD, GOOD[0]):
        problem = await process.find(of_grammar(grammar))
        assert isinstance(problem, GrammarProblem)
        assert problem.message.startswith(UNSUITABLE)
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "?"}]})
    with pytest.raises(InvalidValueError, match=UNSUITABLE) as error:
        await process.make(of_grammar(GOOD[0]), body)
    assert error.value.param == "structured_outputs.grammar"
    process.close()
