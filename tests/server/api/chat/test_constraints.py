"""Grammars of chat answers with tool calls, reasoning and structured content."""

from typing import Any

import pytest

from engine.grammar.compiler import GrammarCompiler
from tests.support.clients import CHAT, ask, ask_json
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID
from tests.support.tool_model import CALL, TIME, TOOLS, WEATHER, say

BARE_TOOLS = [TIME, {"type": "function", "function": {"name": "weather"}}]
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
STRICT = {"type": "function", "function": {"name": "time", "strict": True}}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tool_choice": "required"}, "tool_calls"),
        ({"tool_choice": NAMED}, "stop"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}},
            "tool_calls",
        ),
        ({"tools": [STRICT]}, "tool_calls"),
    ],
)
def test_calls_that_are_forced_or_strict_have_a_grammar(
    plain: RunningServer, fields: dict[str, Any], reason: str
) -> None:
    """The engine receives the grammar. tests/server/constrained/test_tool_grammar.py tests what the grammar allows."""
    say(plain, '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>')
    (choice,) = ask_json(plain.url, CHAT, **({"tools": BARE_TOOLS} | fields))["choices"]
    grammar = plain.engine.submits[-1].params.grammar
    assert grammar is not None
    assert '"x-guidance"' in grammar
    assert choice["finish_reason"] == reason
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["time"]


def test_free_calls_have_no_grammar(plain: RunningServer) -> None:
    for fields in (
        {"tools": BARE_TOOLS},
        {"tools": BARE_TOOLS, "tool_choice": "auto"},
        {"tools": [STRICT], "tool_choice": "none"},
    ):
        ask_json(plain.url, CHAT, **fields)
        assert plain.engine.submits[-1].params.grammar is None


def test_schemas_that_no_grammar_can_follow(plain: RunningServer) -> None:
    def with_schema(schema: Any) -> dict[str, Any]:
        properties = {"a": schema}
        parameters = {"type": "object", "properties": properties, "required": ["a"]}
        return {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}

    impossible = {"type": "array", "items": False, "minItems": 2}  # which shows where the arguments begin
    bad_schemas = ({"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}, {"type": "nonsense"}, impossible)
    for schema in (
        *bad_schemas,
        {"type": "string", "pattern": "^(a{1000}){1000}$"},
        {"type": "string", "pattern": "^(ab){9000}$"},
    ):
        error = check_error(ask(plain.url, CHAT, tools=[*BARE_TOOLS, with_schema(schema)]), 400)
        assert error["param"] == f"tools[{len(BARE_TOOLS)}].function.parameters"
        assert error["message"].startswith(f"Invalid '{error['param']}': ")
    ask_json(plain.url, CHAT, tools=[with_schema({"$ref": "#/nowhere"})], tool_choice="none")


def matches(server: RunningServer, text: str, **fields: Any) -> bool:
    """Return whether the submitted grammar accepts the text."""
    ask_json(server.url, CHAT, **fields)
    grammar = server.engine.submits[-1].params.grammar
    assert grammar is not None
    tokenizer = server.model.tokenizer
    matcher = GrammarCompiler(tokenizer.to_json(), [END_OF_TEXT_ID]).compile(grammar)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def test_forced_and_strict_calls(model: RunningServer) -> None:
    strict = {"type": "function", "function": {"name": "time", "strict": True}}
    named = {"type": "function", "function": {"name": "weather"}}
    with_reasoning, said = "<think>Hm.</think>\n\n" + CALL, "It is hot."
    for fields, calls, says in (
        ({"tools": TOOLS, "tool_choice": "required"}, True, False),
        ({"tools": TOOLS, "tool_choice": named}, True, False),
        ({"tools": [WEATHER, strict]}, True, True),
        ({"tools": [strict]}, False, True),
    ):
        assert matches(model, CALL, **fields) == matches(model, with_reasoning, **fields) == calls
        assert matches(model, said, **fields) == says
    ask_json(model.url, CHAT, tools=[strict], tool_choice="none")
    assert model.engine.submits[-1].params.grammar is None
    unsupported = {"type": "object", "properties": {"a": {"type": "array", "contains": {}}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": unsupported, "strict": True}}]
    error = check_error(ask(model.url, CHAT, tools=tools), 400)
    assert error["param"] == "tools[0].function.parameters"
    assert "contains" in error["message"]


def test_structured_content_beside_calls_and_reasoning(model: RunningServer) -> None:
    wanted = {"response_format": {"type": "json_object"}}
    for fields, calls in ((wanted, False), (wanted | {"tools": TOOLS}, True)):
        assert matches(model, CALL, **fields) == matches(model, f"<think>a</think>\n{CALL}", **fields) == calls
        assert matches(model, '<think>{"a": 1} no</think>\n{"a":1}', **fields)
        assert matches(model, '{"a":1}', **fields)
        assert not matches(model, "It is hot.", **fields)
        assert not matches(model, '<think>a</think>{"a":1', **fields)
    requested: dict[str, Any]
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        for name, value in (("structured_outputs", {"regex": "a"}), ("guided_choice", ["a"])):
            requested = {"tools": TOOLS, "tool_choice": choice, name: value}
            error = check_error(ask(model.url, CHAT, **requested), 400)
            assert error["param"] == name
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}  # the prompt ends with the opening tag
    for content, good in ({"regex": "[0-9]+"}, "12"), ({"grammar": 'start: "a" b?\nb: "b"'}, "ab"):
        for tools in ({}, {"tools": TOOLS}):
            requested = tools | thinking | {"structured_outputs": content}
            assert matches(model, f"Well.</think>\n{good}", **requested)
            assert not matches(model, good, **requested)
