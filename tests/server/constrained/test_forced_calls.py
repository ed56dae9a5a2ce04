"""Calls that are forced or strict: what the engine is told, and what the answer says of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import CHAT, ask, ask_json, shared_server
from tests.support.serving import RunningServer, check_error
from tests.support.tool_model import say, write_tool_model

TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [TIME, {"type": "function", "function": {"name": "weather"}}]
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
STRICT = {"type": "function", "function": {"name": "time", "strict": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder: Path = write_tool_model(tmp_path_factory.mktemp("tools"), special_tags=False)
    with shared_server(folder) as server:
        yield server


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
    server: RunningServer, fields: dict[str, Any], reason: str
) -> None:
    """What it allows is tested elsewhere; here, that the engine gets it, and what the answer says."""
    say(server, '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>')
    (choice,) = ask_json(server.url, CHAT, **({"tools": TOOLS} | fields))["choices"]
    grammar = server.engine.submits[-1].params.grammar
    assert grammar is not None
    assert '"x-guidance"' in grammar
    assert choice["finish_reason"] == reason
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["time"]


def test_free_calls_have_no_grammar(server: RunningServer) -> None:
    for fields in (
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "auto"},
        {"tools": [STRICT], "tool_choice": "none"},
    ):
        ask_json(server.url, CHAT, **fields)
        assert server.engine.submits[-1].params.grammar is None


def test_schemas_that_no_grammar_can_follow(server: RunningServer) -> None:
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
        error = check_error(ask(server.url, CHAT, tools=[*TOOLS, with_schema(schema)]), 400)
        assert error["param"] == f"tools[{len(TOOLS)}].function.parameters"
        assert error["message"].startswith(f"Invalid '{error['param']}': ")
    ask_json(server.url, CHAT, tools=[with_schema({"$ref": "#/nowhere"})], tool_choice="none")
