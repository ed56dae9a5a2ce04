"""`POST /v1/messages` over real sockets, with a fake engine: tokens are bytes, the template is ChatML."""

import re
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import httpx
import pytest
from anthropic.types import ContentBlockParam, Message, MessageParam, ToolUnionParam, tool_result_block_param
from anthropic.types.beta import BetaContentBlockParam, BetaToolComputerUse20250124Param, BetaToolUnionParam
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter
from typing_extensions import is_typeddict

from server.parts.messages.part import CLIENT_TOOLS
from tests.server.conftest import StartServer
from tests.server.dialects import COUNT, REPLY, WARNINGS, anthropic_error, ask_events, prompt_of
from tests.server.generation.test_prompts import LONG, LONG_MESSAGES
from tests.support.clients import ANTHROPIC, MESSAGES, MINIMAL, ask, ask_json, shared_server
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer
from tests.support.tiny_tokenizer_model import CHAT_TEMPLATE, chatml, write_tiny_model
from tests.support.tool_model import PARAMETERS

Fields = dict[str, Any]

TOOLS: list[Any] = [{"name": "weather", "input_schema": PARAMETERS}]
NUM_PROMPT_TOKENS = len(chatml(("user", "Hi")))
NO_CACHE = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}


def types_of(union: Any) -> set[str]:
    """Return the values of `type` of the typed dictionaries of a union."""
    hints = [str(get_type_hints(member)["type"]) for member in get_args(union) if is_typeddict(member)]
    return {name for hint in hints for name in re.findall("'(.+?)'", hint)}


# The answer.


def test_schema_of_the_answer(server: RunningServer) -> None:
    response = ask(server.url, ANTHROPIC, max_tokens=5)
    answer = response.json()
    Message.model_validate(answer, strict=True)
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        **{"type": "message", "role": "assistant", "model": "tiny", "stop_reason": "max_tokens", "stop_sequence": None},
        "content": [{"type": "text", "text": "Hello", "citations": None}],
        "usage": {"input_tokens": NUM_PROMPT_TOKENS, **NO_CACHE, "output_tokens": 5},
    }
    assert response.headers["request-id"] == response.headers["x-request-id"]


def test_events_of_a_stream(server: RunningServer) -> None:
    start, first, *_, last, message_delta, stop = ask_events(server.url, ANTHROPIC)
    message = start["message"]
    assert (message["id"][:4], message["content"], message["stop_reason"]) == ("msg_", [], None)
    block = {"type": "text", "text": "", "citations": None}
    assert first == {"type": "content_block_start", "index": 0, "content_block": block}
    assert (last, stop) == ({"type": "content_block_stop", "index": 0}, {"type": "message_stop"})
    assert message_delta == {
        **{"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}},
        "usage": {"input_tokens": NUM_PROMPT_TOKENS, **NO_CACHE, "output_tokens": len(REPLY) + 1},
    }


def test_an_answer_without_text(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.reply = []
    assert ask_json(server.url, ANTHROPIC)["content"] == []
    events = ask_events(server.url, ANTHROPIC)
    assert [event["type"] for event in events] == ["message_start", "message_delta", "message_stop"]


# The request.


def conversation(*turns: tuple[str, Any]) -> Fields:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def text(value: str) -> Fields:
    return {"type": "text", "text": value}


CALL: Fields = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}}
RESULT: Fields = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "3"}
PLAIN: Fields = {"type": "text", "media_type": "text/plain", "data": "A"}
SPLIT: Fields = {"type": "content", "content": [text("A"), text("B")]}
SAID: list[Fields] = [{"type": "redacted_thinking", "data": "x"}, text("B")]
ASKED: list[Fields] = [text("D") | {"citations": None}, text("E")]
TURNS: list[tuple[str, Any]] = [("assistant", SAID), ("assistant", "C"), ("user", ASKED)]


@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        ({"system": [text("S") | {"cache_control": {"type": "ephemeral"}}]}, [("system", "S"), ("user", "Hi")]),
        ({"system": ""}, [("user", "Hi")]),
        (conversation(("ctx", "A"), ("msg", "B"), ("user", "C")), [("user", "A\nB\nC")]),
        (conversation(*TURNS), [("assistant", "B\nC"), ("user", "D\nE")]),
    ],
)
def test_prompts(server: RunningServer, fields: Fields, turns: list[tuple[str, str]]) -> None:
    ask_json(server.url, ANTHROPIC, **fields)
    assert server.engine.submits[-1].prompt_token_ids == chatml(*turns)
    assert ask_json(server.url, COUNT, **{"messages": MESSAGES} | fields) == {"input_tokens": len(chatml(*turns))}


@pytest.mark.parametrize(
    ("block", "shown"),
    [
        (RESULT | {"is_error": False}, "3"),
        (RESULT | {"is_error": True}, "Error: 3"),
        ({"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True}, "Error: "),
        (RESULT | {"is_error": True, "content": []}, "Error: "),
        (RESULT | {"is_error": True, "content": [text("no"), text("file")]}, "Error: no\nfile"),
        ({"type": "document", "source": PLAIN}, "A"),
        ({"type": "document", "source": {"type": "content", "content": "A"}, "title": None}, "A"),
        ({"type": "document", "source": SPLIT, "title": "T", "context": "C"}, "Document: T\nC\nA\nB"),
    ],
)
def test_results_and_documents_are_text(server: RunningServer, block: Fields, shown: str) -> None:
    TypeAdapter(ContentBlockParam).validate_python(block)
    is_document = block["type"] == "document"
    blocks = [RESULT | {"content": [block]}, block] if is_document else [block]
    ask_json(server.url, ANTHROPIC, **conversation(("assistant", [CALL]), ("user", [*blocks, text("So?")])))
    asked = ("user", f"{shown}\nSo?" if is_document else "So?")
    assert server.engine.submits[-1].prompt_token_ids == chatml(("assistant", ""), ("tool", shown), asked)


def test_an_answer_that_was_begun(server: RunningServer) -> None:
    ask_json(server.url, ANTHROPIC, **conversation(("user", "Hi"), ("assistant", "Hel")))
    assert server.engine.submits[-1].prompt_token_ids == [*chatml(("user", "Hi")), *b"Hel"]


def test_a_whole_request_is_counted(server: RunningServer, strict: RunningServer) -> None:
    others: Fields = {"max_tokens": 5, "stream": True, "temperature": 0.5, "stop_sequences": ["x"], "metadata": {}}
    for each in (server, strict):
        response = ask(each.url, COUNT, messages=MESSAGES, **others)
        assert response.json() == {"input_tokens": NUM_PROMPT_TOKENS}
        assert WARNINGS not in response.headers


LATE = "messages %}{% if message.role == 'system' and not loop.first %}"


@pytest.mark.parametrize("refusal", ["", "{{ raise_exception('No.') }}", "{% continue %}"])
def test_system_messages_of_a_conversation(tmp_path: Path, refusal: str) -> None:
    """Of a template that writes, refuses or omits those that are not the first."""
    write_tiny_model(tmp_path, template=CHAT_TEMPLATE.replace("messages %}", LATE + refusal + "{% endif %}"))
    begin, said = [("system", "A"), ("user", "B"), ("system", "C")], [text("D"), CALL]
    end = [("system", "E"), ("user", [text("F"), RESULT]), ("system", "G")]
    messages = conversation(*begin, ("assistant", said), *end)["messages"]
    TypeAdapter(MessageParam).validate_python(messages[2])
    placed = [*begin[1:], ("assistant", "D"), ("tool", "3"), ("system", "E"), ("user", "F"), ("system", "G")]
    merged = [("user", "B\nC"), ("assistant", "D"), ("tool", "3"), ("user", "E\nF\nG")]
    with shared_server(tmp_path) as server:
        for system, first in ((..., "A"), ("S", "S\nA")):
            ask_json(server.url, ANTHROPIC, messages=messages, system=system)
            turns = [("system", first), *(merged if refusal else placed)]
            assert server.engine.submits[-1].prompt_token_ids == chatml(*turns)


@pytest.mark.parametrize(("clear_at", "is_shown"), [("next_user_message", False), ("never", True), (None, True)])
def test_a_system_message_that_is_over(server: RunningServer, clear_at: str | None, is_shown: bool) -> None:
    messages = conversation(("user", "A"), ("system", "B"), ("user", "C"), ("system", "D"))["messages"]
    for number in (1, 3):
        messages[number]["clear_at"] = clear_at
    ask_json(server.url, ANTHROPIC, messages=messages)
    turns = [("user", "A"), ("system", "B"), ("user", "C")] if is_shown else [("user", "A\nC")]
    assert server.engine.submits[-1].prompt_token_ids == chatml(*turns, ("system", "D"))


def test_hints(server: RunningServer) -> None:
    for effort in ("low", "medium", "high", "xhigh", "max"):
        for path in (ANTHROPIC, COUNT):
            response = ask(server.url, path, messages=MESSAGES, output_config={"effort": effort})
            assert (response.status_code, WARNINGS in response.headers) == (200, False), response.text
        assert server.engine.submits[-1].prompt_token_ids == chatml(("user", "Hi"))
    none: list[Any] = [..., [], None]
    for kind, no_tools in product(("auto", "none"), none):
        choice = {"type": kind, "disable_parallel_tool_use": True}
        ask_json(server.url, ANTHROPIC, tools=no_tools, tool_choice=choice)


def test_options_of_the_template_are_counted(tools: RunningServer) -> None:
    plain = ask_json(tools.url, COUNT, messages=MESSAGES)["input_tokens"]
    options = {"chat_template_kwargs": {"enable_thinking": True}}
    assert ask_json(tools.url, COUNT, messages=MESSAGES, **options) == {"input_tokens": plain + 2}


# Tools and blocks of Anthropic's.

SEARCH: Fields = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
COMPUTER: Fields = {"type": "computer_20250124", "name": "computer", "display_width_px": 1, "display_height_px": 1}


def test_tools_of_the_server_are_ignored_and_named(tools: RunningServer, strict: RunningServer) -> None:
    ask_json(tools.url, ANTHROPIC, tools=TOOLS)
    expected = tools.engine.submits[-1].prompt_token_ids
    for given in ([SEARCH, COMPUTER, *TOOLS], [*TOOLS, SEARCH, COMPUTER]):
        TypeAdapter(list[ToolUnionParam | BetaToolComputerUse20250124Param]).validate_python(given)
        answer = ask(tools.url, ANTHROPIC, tools=given, mcp_servers=[{}])
        names = [f"tools[{given.index(tool)}].{tool['type']}" for tool in (SEARCH, COMPUTER)]
        assert answer.headers[WARNINGS] == f"ignored parameters: mcp_servers, {', '.join(names)}"
        assert tools.engine.submits[-1].prompt_token_ids == expected
    wrong = TOOLS[0] | {"input_schema": {"type": "array"}}
    message = anthropic_error(ask(tools.url, ANTHROPIC, tools=[SEARCH, *TOOLS, COMPUTER, wrong]), 400)[1]
    assert message.startswith("Invalid 'tools[3].input_schema'")
    named = {"type": "tool", "name": "web_search"}
    for others, choice in (([], {"type": "any"}), ([], named), (TOOLS, named)):
        answer = ask(tools.url, ANTHROPIC, tools=[SEARCH, *others], tool_choice=choice)
        assert answer.status_code == 200
        assert answer.headers[WARNINGS].endswith(f", tool_choice.{choice.get('name', 'any')}")
        assert tools.engine.submits[-1].params.grammar is None
    anthropic_error(ask(tools.url, ANTHROPIC, tools=[SEARCH], tool_choice={"type": "tool", "name": "other"}), 400)
    message = anthropic_error(ask(strict.url, ANTHROPIC, tools=[SEARCH]), 400)[1]
    assert message.endswith("tools[0].web_search_20250305")


CLIENT_NAMES = {"bash": "bash", "text": "str_replace_based_edit_tool", "memory": "memory"}


def test_tools_of_the_client_get_their_schema(tools: RunningServer) -> None:
    for kind, (description, schema) in CLIENT_TOOLS.items():
        assert kind in types_of(BetaToolUnionParam)
        Draft202012Validator.check_schema(schema)
        name = CLIENT_NAMES[kind.split("_", maxsplit=1)[0]]
        tool = {"type": kind, "name": name, "cache_control": {"type": "ephemeral"}}
        answer = ask(tools.url, ANTHROPIC, max_tokens=50, tools=[tool], tool_choice={"type": "tool", "name": name})
        assert (answer.status_code, WARNINGS in answer.headers) == (200, False), answer.text
        assert f'{{"name": "{name}", "description": "{description}"' in prompt_of(tools)
        for field in schema["properties"]:
            assert f'"{field}": {{"type"' in prompt_of(tools)
            assert field in str(tools.engine.submits[-1].params.grammar)


def test_strict_tools_have_a_grammar(tools: RunningServer) -> None:
    for strict in (True, False):
        ask_json(tools.url, ANTHROPIC, tools=[TOOLS[0] | {"type": "custom", "strict": strict}])
        assert (tools.engine.submits[-1].params.grammar is not None) == strict


READ_BLOCKS = {"text", "document", "search_result", "compaction", "tool_use", "tool_result", "thinking"}
READ_BLOCKS |= {"redacted_thinking"}  # which is left out without a warning: it is unreadable for anyone
REFUSED_BLOCKS = {"image"}  # the model would be asked about what it cannot see
ALL_BLOCKS = types_of(ContentBlockParam) | types_of(BetaContentBlockParam) | types_of(tool_result_block_param.Content)


def test_blocks_of_other_services_are_ignored_and_named(server: RunningServer) -> None:
    for kind in sorted(ALL_BLOCKS - READ_BLOCKS - REFUSED_BLOCKS):
        block = {"type": kind, "id": "x", "content": [], "cache_control": {"type": "ephemeral"}}
        said = [{"type": "compaction", "content": "A"}, block, {"type": "text", "text": "B"}]
        result = {"type": "tool_result", "tool_use_id": "1", "content": [block], "is_error": True}
        found = {"type": "search_result", "title": "T", "source": "S", "content": [{"type": "text", "text": "C"}]}
        asked = conversation(("user", "Hi"), ("assistant", said), ("user", [block, result, found]))
        answer = ask(server.url, ANTHROPIC, **asked)
        names = f"messages[].content[].{kind}, messages[].content[].content[].{kind}"
        assert answer.headers[WARNINGS] == f"ignored parameters: {names}"
        turns = [("user", "Hi"), ("assistant", "A\nB"), ("tool", "Error: "), ("user", "Search result: T\nS\nC")]
        assert server.engine.submits[-1].prompt_token_ids == chatml(*turns)


# Under this path all errors have Anthropic's format.

VERSION = {"anthropic-version": "2023-06-01"}


def test_errors_from_everywhere(start_server: StartServer) -> None:
    server = start_server(api_key=("key",), max_body_size=2000)
    url, body, key = server.url + ANTHROPIC, MINIMAL[ANTHROPIC], {"x-api-key": "key"}
    content = key | {"content-type": "application/json"}
    for response, status, kind in (
        (httpx.post(url, json=body), 401, "authentication_error"),
        (httpx.post(url, json=body | {"system": "x" * 2000}, headers=key), 413, "request_too_large"),
        (httpx.post(url, json=body | {"model": "x"}, headers=key), 404, "not_found_error"),
        (httpx.get(url, headers=key), 405, "invalid_request_error"),
        (httpx.post(f"{url}/batches", json={}, headers=key), 404, "not_found_error"),
        (httpx.post(url, content=b"{", headers=content), 400, "invalid_request_error"),
        (httpx.post(url, content=b"{}", headers=key), 415, "invalid_request_error"),
        (httpx.get(f"{server.url}/v1/models/x", headers=key | VERSION), 404, "not_found_error"),
    ):
        assert anthropic_error(response, status)[0] == kind
    for other in ("/v1/messages2", "/v1/models/x"):
        assert "param" in httpx.get(server.url + other, headers=key).json()["error"]


def test_keys(keyed: RunningServer) -> None:
    key, wrong, bearer, no_bearer = ("x-api-key", "key-a"), ("x-api-key", "wrong"), "Bearer key-a", "Bearer wrong"
    good = [[key], [wrong, ("authorization", bearer)], [key, ("authorization", no_bearer)]]
    for headers in (*good, [wrong], [("x-api-key", "")], [("x-api-key", bearer)], [key, key]):
        answer = httpx.post(keyed.url + ANTHROPIC, json=MINIMAL[ANTHROPIC], headers=headers)
        assert answer.status_code == (200 if headers in good else 401), headers


def test_models_in_this_form(server: RunningServer) -> None:
    page = httpx.get(f"{server.url}/v1/models", headers=VERSION).json()
    assert page["has_more"] is False
    assert [page["first_id"], page["last_id"]] == [page["data"][0]["id"], page["data"][-1]["id"]]
    model = httpx.get(f"{server.url}/v1/models/tiny", headers=VERSION).json()
    assert model in page["data"]
    assert (model["type"], model["display_name"], model["max_input_tokens"]) == ("model", "tiny", 2048)
    assert "object" in httpx.get(f"{server.url}/v1/models/tiny").json()


def test_a_long_text_is_counted_as_a_whole(server: RunningServer) -> None:
    assert ask_json(server.url, COUNT, messages=LONG_MESSAGES)["input_tokens"] > len(LONG)
