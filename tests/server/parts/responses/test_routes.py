"""`/v1/responses` over real sockets, with a fake engine: tokens are bytes, the template is ChatML."""

import json
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseInputItemParam, ResponseInputParam, ResponseItem
from pydantic import TypeAdapter

from server.generation.pipeline import MAX_HELD_SECONDS
from server.parts.responses import conversion as responses
from server.parts.responses.custom_tools import OTHER_CALLS
from server.parts.responses.store import ResponseStore
from server.tenants import Tenant
from tests.server import dialects
from tests.server.conftest import StartServer
from tests.server.dialects import REPLY, RESPONSE_EVENTS, WARNINGS, Reader, prompt_of, text_of
from tests.server.parts.hardening.test_turns import LONG as LONG_TEXT
from tests.server.parts.hardening.test_turns import SlowTokenizer, long_requests
from tests.server.parts.hardening.test_turns import ask as ask_key
from tests.server.parts.messages.test_routes import types_of
from tests.support import clients
from tests.support.clients import MINIMAL, RESPONSES, openai_client, shared_server
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, raw_request, wait_until
from tests.support.tiny_tokenizer_model import chatml, write_tiny_model
from tests.support.tool_model import TAGS, TEMPLATE, say

Fields = dict[str, Any]


def ask(server: RunningServer, **fields: Any) -> httpx.Response:
    return clients.ask(server.url, RESPONSES, **fields)


def ask_json(server: RunningServer, **fields: Any) -> Fields:
    return clients.ask_json(server.url, RESPONSES, **fields)


def ask_events(server: RunningServer, **fields: Any) -> list[Fields]:
    return dialects.ask_events(server.url, RESPONSES, **fields)


def parse(text: str) -> list[Fields]:
    return dialects.parse(RESPONSES, text)


def get(server: RunningServer, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{RESPONSES}/{path}")


def cancel(server: RunningServer, response_id: str) -> httpx.Response:
    return httpx.post(f"{server.url}{RESPONSES}/{response_id}/cancel")


def delete(server: RunningServer, response_id: str) -> httpx.Response:
    return httpx.delete(f"{server.url}{RESPONSES}/{response_id}")


def count(server: RunningServer, **fields: Any) -> int:
    """Return the number of tokens of a request's input."""
    return int(clients.ask_json(server.url, f"{RESPONSES}/input_tokens", **fields)["input_tokens"])


def prompt_ids(server: RunningServer) -> list[int]:
    return server.engine.submits[-1].prompt_token_ids


# The answer.


def test_schema_of_the_answer(server: RunningServer) -> None:
    answer = ask_json(server, max_output_tokens=5, metadata={"a": "b"})
    Response.model_validate(answer, strict=True)
    (item,) = answer.pop("output")
    assert item.pop("id").startswith("msg_")
    content = [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert item == {"type": "message", "status": "incomplete", "role": "assistant", "content": content}
    assert answer.pop("id").startswith("resp_")
    assert answer.pop("created_at") > 1.7e9
    num_prompt_tokens = len(chatml(("user", "Hi")))
    nothing = ("error", "instructions", "max_tool_calls", "previous_response_id", "user", "safety_identifier")
    assert answer == {
        **dict.fromkeys((*nothing, "prompt_cache_key")),
        **{"object": "response", "status": "incomplete", "background": False, "model": "tiny", "store": True},
        **{"incomplete_details": {"reason": "max_output_tokens"}, "max_output_tokens": 5, "metadata": {"a": "b"}},
        **{"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "text": {"format": {"type": "text"}}},
        **{"reasoning": {"effort": None, "summary": None}, "temperature": 1.0, "top_p": 1.0, "top_logprobs": 0},
        **{"truncation": "disabled", "service_tier": "default"},
        "usage": {
            **{"input_tokens": num_prompt_tokens, "output_tokens": 5, "total_tokens": num_prompt_tokens + 5},
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_logprobs(server: RunningServer) -> None:
    fields: Fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 2}
    part = ask_json(server, **fields)["output"][0]["content"][0]
    found = [(each["token"], each["bytes"], len(each["top_logprobs"])) for each in part["logprobs"]]
    assert found == [("H", [72], 2), ("e", [101], 2)]
    events = ask_events(server, **fields)
    streamed = [each for event in events if event["type"].endswith("text.delta") for each in event["logprobs"]]
    assert streamed == part["logprobs"] == events[-1]["response"]["output"][0]["content"][0]["logprobs"]


# Conversations.


def test_a_conversation_goes_on(server: RunningServer) -> None:
    first = ask_json(server, instructions="Short.")["id"]
    assert prompt_ids(server) == chatml(("system", "Short."), ("user", "Hi"))
    turns = [("user", "Hi"), ("assistant", REPLY)]  # instructions are not stored
    ask_json(server, input=..., previous_response_id=first)
    assert prompt_ids(server) == chatml(*turns)
    assert count(server, input=..., previous_response_id=first) == len(prompt_ids(server))
    second = ask_json(server, input="Why?", previous_response_id=first)
    turns += [("user", "Why?")]
    assert (prompt_ids(server), second["previous_response_id"]) == (chatml(*turns), first)
    for stream in (False, True):
        items = [{"role": "user", "content": [{"type": "input_text", "text": "And"}]}]
        ask(server, input=items, previous_response_id=second["id"], instructions="Long.", stream=stream)
        assert prompt_ids(server) == chatml(("system", "Long."), *turns, ("assistant", REPLY), ("user", "And"))
    delete(server, first)
    ask_json(server, input="Still", previous_response_id=second["id"])
    assert prompt_ids(server) == chatml(*turns, ("assistant", REPLY), ("user", "Still"))


USER, SO = {"role": "user", "content": "Hi"}, {"role": "user", "content": "So?"}
REFUSAL = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
ENCRYPTED = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}


def test_earlier_items(server: RunningServer) -> None:
    said = [*ask_json(server)["output"]]
    parts = {"role": "user", "content": [{"type": "input_text", "text": text} for text in "AB"]}
    output = {"type": "function_call_output", "call_id": "1", "output": ""}
    for items, turns in (
        (said, [("assistant", REPLY)]),
        ([REFUSAL], [("assistant", "No.")]),
        ([ENCRYPTED], []),
        ([parts], [("user", "A\nB")]),
        ([output], [("tool", "")]),
    ):
        ask_json(server, input=[USER, *items, SO])
        assert prompt_ids(server) == chatml(("user", "Hi"), *turns, ("user", "So?"))


def test_input_tokens(server: RunningServer) -> None:
    """The count equals the number of prompt tokens of the same request."""
    first = ask_json(server)
    requests: list[Fields] = [
        {"input": [SO], "instructions": "I"},
        {"previous_response_id": first["id"], "instructions": "I"},
        {"tools": [FUNCTION], "tool_choice": "auto", "parallel_tool_calls": False},
        {"text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "low"}},
        {"input": [{"role": "user", "content": "x" * 700}] * 5, "truncation": "auto"},
        {"truncate_prompt_tokens": 7},
    ]
    for fields in ({"input": "Hi"} | request for request in requests):
        num_tokens = ask_json(server, **fields)["usage"]["input_tokens"]
        assert num_tokens == len(prompt_ids(server))
        assert num_tokens == count(server, **fields) == count(server, model=..., **fields)
    count(server, background=True, stream=True, input="Hi")
    assert len(server.engine.submits) == 1 + len(requests)
    with openai_client(server.url) as client:
        assert client.responses.input_tokens.count(input="Hi").input_tokens == first["usage"]["input_tokens"]


def test_an_unknown_previous_response(server: RunningServer) -> None:
    unstored = ask_json(server, store=False)["id"]
    for response_id in ("resp_unknown", unstored):
        error = check_error(ask(server, previous_response_id=response_id), 400)
        assert error["message"] == f"Previous response with id '{response_id}' not found."
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")


# Storage.


def test_a_response_can_be_retrieved_until_it_is_deleted(server: RunningServer) -> None:
    for answer in (ask_json(server), ask_events(server)[-1]["response"]):
        id = answer["id"]
        assert get(server, id).json() == answer
        assert check_error(cancel(server, id), 400)["message"] == "Cannot cancel a synchronous response."
        assert delete(server, id).json() == {"id": id, "object": "response", "deleted": True}
        for response in (get(server, id), get(server, f"{id}/input_items"), cancel(server, id), delete(server, id)):
            assert check_error(response, 404)["message"] == f"Response with id '{id}' not found."


def test_input_items(server: RunningServer) -> None:
    items = [{"role": "user", "content": f"{index}", "id": f"msg_{index}"} for index in range(5)]
    response_id = ask_json(server, input=items)["id"]
    page = get(server, f"{response_id}/input_items").json()
    TypeAdapter(list[ResponseItem]).validate_python(page["data"])
    assert [item["content"] for item in page["data"]] == [[{"type": "input_text", "text": text}] for text in "43210"]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", "msg_4", "msg_0", False)
    page = get(server, f"{response_id}/input_items?order=asc&limit=2&after=msg_1").json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == (["msg_2", "msg_3"], True)
    for query in ("order=up", "limit=0", "limit=101", f"limit=0099{'9' * 5000}", "after=x"):
        error = check_error(get(server, f"{response_id}/input_items?{query}"), 400)
        assert (error["param"], "decimal" in error["code"]) == (query.partition("=")[0], False)


# Cancellation, disconnects and background responses.


@pytest.fixture
def slow(server: RunningServer, fake_engine: FakeEngine) -> RunningServer:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    return server


def test_a_response_in_the_background(slow: RunningServer) -> None:
    slow.engine.pause()
    answer = ask_json(slow, background=True, max_output_tokens=20)
    assert (answer["status"], answer["output"], answer["background"]) == ("in_progress", [], True)
    assert check_error(ask(slow, previous_response_id=answer["id"]), 400)["param"] == "previous_response_id"
    slow.engine.resume()
    wait_until(lambda: get(slow, answer["id"]).json()["status"] != "in_progress")
    response = get(slow, answer["id"]).json()
    assert (response["status"], response["usage"]["output_tokens"]) == ("incomplete", 20)
    assert text_of(response) == (REPLY * 2)[:20]
    assert cancel(slow, answer["id"]).json() == response
    wait_until(lambda: not slow.context.background_tasks)
    assert len(slow.context.running) == 0


def test_failures_are_stored(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.fail_request = True
    response_id = ask_json(server, background=True)["id"]
    wait_until(lambda: get(server, response_id).json()["status"] == "failed")
    error = get(server, response_id).json()["error"]
    assert (error["code"], "secret" in error["message"]) == ("server_error", False)
    events = ask_events(server)
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert get(server, events[-1]["response"]["id"]).json() == events[-1]["response"]


@pytest.mark.parametrize("end", ["cancel", "delete", "disconnect"])
def test_a_stream_that_ends_early(slow: RunningServer, end: str) -> None:
    with httpx.stream("POST", slow.url + RESPONSES, json=MINIMAL[RESPONSES] | {"stream": True}, timeout=20) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        response_id = json.loads(next(lines))["response"]["id"]
        assert get(slow, response_id).json()["status"] == "in_progress"
        if end == "cancel":
            assert cancel(slow, response_id).json()["status"] == "cancelled"
        elif end == "delete":
            assert delete(slow, response_id).status_code == 200
        if end != "disconnect":
            *_, last = map(json.loads, lines)
            assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
    wait_until(lambda: slow.engine.num_choices == 0 and len(slow.context.running) == 0)
    found = get(slow, response_id)
    assert found.status_code == 404 if end == "delete" else found.json()["status"] == "cancelled"


def test_a_stream_that_waits_has_begun(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.pause()
    reader = Reader(server.url + RESPONSES, "POST", MINIMAL[RESPONSES] | {"stream": True})
    wait_until(lambda: fake_engine.num_choices == 1)
    assert reader.text == ""

    def has_begun() -> bool:
        server.turn(MAX_HELD_SECONDS)
        return "response.in_progress" in reader.text

    wait_until(has_begun)
    created, *_ = reader.text.split("\n\n")
    response_id = parse(f"{created}\n\n")[0]["response"]["id"]
    assert cancel(server, response_id).json()["status"] == "cancelled"
    *begun, last = parse(re.sub(r"(?m)^:.*\n\n", "", reader.join()))  # it may have been kept alive
    assert [event["type"] for event in begun] == ["response.created", "response.in_progress"]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
    wait_until(lambda: fake_engine.num_choices == 0)


# Tools.

FUNCTION: Fields = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
SEARCH: Fields = {"type": "web_search"}


def test_tools_of_other_types_are_left_out(server: RunningServer, strict: RunningServer) -> None:
    others = [SEARCH | {"external_web_access": True}, {"type": "namespace", "name": "mcp", "tools": [FUNCTION]}]
    alone = ask_json(server, tools=[FUNCTION])
    expected = prompt_ids(server)
    response = ask(server, tools=[*others, FUNCTION])
    assert response.headers[WARNINGS] == "ignored parameters: tools[0].web_search, tools[1].namespace"
    assert prompt_ids(server) == expected
    assert response.json()["tools"] == alone["tools"] == [FUNCTION | {"description": None, "strict": False}]
    assert check_error(ask(strict, tools=[FUNCTION, *others]), 400)["param"] == "tools[1].web_search"


@pytest.mark.parametrize("tools", [None, [], [SEARCH]])
def test_a_choice_without_tools(server: RunningServer, tools: list[Any] | None) -> None:
    for choice in ("auto", "none"):
        assert ask_json(server, tools=tools, tool_choice=choice)["tool_choice"] == choice


@pytest.mark.parametrize(
    ("others", "choice", "name"),
    [
        ([], "required", "required"),
        ([FUNCTION], SEARCH, "web_search"),
        ([], {"type": "mcp", "server_label": "x"}, "mcp"),
        ([FUNCTION], {"type": "allowed_tools", "mode": "required", "tools": [SEARCH]}, "allowed_tools"),
    ],
)
def test_a_choice_of_ignored_tools(server: RunningServer, others: list[Any], choice: Any, name: str) -> None:
    answer = ask(server, tools=[SEARCH, *others], tool_choice=choice)
    assert answer.json()["tool_choice"] == "auto"
    assert answer.headers[WARNINGS] == f"ignored parameters: tools[0].web_search, tool_choice.{name}"
    assert server.engine.submits[-1].params.grammar is None


def test_choices_force_calls(server: RunningServer) -> None:
    named = {"type": "function", "name": "weather"}
    for choice in ({"type": "allowed_tools", "mode": "required", "tools": [SEARCH, named]}, named, "required"):
        answer = ask(server, tools=[SEARCH, FUNCTION], tool_choice=choice)
        assert answer.headers[WARNINGS] == "ignored parameters: tools[0].web_search"
        assert "weather" in str(server.engine.submits[-1].params.grammar)


CUSTOM: Fields = {"type": "custom", "name": "patch", "description": "Edits a file."}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [('{"input": "*** \\"é\\"\\n"}', '*** "é"\n'), ('{"input": ""}', ""), ('{"wish": 5}', '{"wish": 5}')],
)
def test_calls_of_custom_tools(tools: RunningServer, arguments: str, text: str) -> None:
    called = f'<tool_call>{{"name": "patch", "arguments": {arguments}}}</tool_call>'
    say(tools, called + '<tool_call>{"name": "weather", "arguments": {}}</tool_call>')
    fields: Fields = {"tools": [CUSTOM, FUNCTION], "input": [USER]}
    whole = ask_json(tools, **fields)
    call = whole["output"][0]
    assert (call["type"], call["name"], call["input"]) == ("custom_tool_call", "patch", text)
    assert [item["type"] for item in whole["output"]] == ["custom_tool_call", "function_call"]
    assert whole["tools"][0] == CUSTOM | {"format": {"type": "text"}}
    events = ask_events(tools, **fields)
    pieces = [event for event in events if event["type"].startswith("response.custom_tool_call_input")]
    assert [event.get("delta", event.get("input")) for event in pieces] == [text, text]
    results = [{"type": f"{call['type']}_output", "call_id": call["call_id"], "output": "Done"}]
    ask_json(tools, previous_response_id=whole["id"], tools=[CUSTOM, FUNCTION], input=results)
    expected = prompt_ids(tools)
    shown = json.dumps({"input": text}, ensure_ascii=False)
    assert f'{{"name": "patch", "arguments": {shown}}}' in prompt_of(tools)
    ask_json(tools, **fields | {"input": [*fields["input"], *whole["output"], *results]})
    assert prompt_ids(tools) == expected


def test_custom_tools_are_described_and_can_be_forced(tools: RunningServer) -> None:
    answer = ask(tools, tools=[FUNCTION, CUSTOM | {"format": GRAMMAR}], tool_choice={"type": "custom", "name": "patch"})
    assert (answer.status_code, answer.headers[WARNINGS]) == (200, "ignored parameters: tools[1].format")
    assert '{"name": "patch", "description": "Edits a file."' in prompt_of(tools)
    assert '"input"' in str(tools.engine.submits[-1].params.grammar).replace("\\", "")


def test_hints_that_are_neutral_or_followed(server: RunningServer, tools: RunningServer) -> None:
    for fields in ({"reasoning": {"effort": "none"}}, {"reasoning": {"effort": "medium"}, "text": {}}):
        assert WARNINGS not in ask(server, **fields).headers
    assert WARNINGS not in ask(tools, reasoning={"effort": "high"}).headers


# References.


def refer(item: Fields) -> Fields:
    return {"type": "item_reference", "id": item["id"]}


def test_items_by_reference(tools: RunningServer) -> None:
    say(tools, '<think>Hm.</think>So<tool_call>{"name": "weather", "arguments": {}}</tool_call>')
    first = ask_json(tools, tools=[FUNCTION])
    result = {"type": "function_call_output", "call_id": first["output"][2]["call_id"], "output": "Rain"}
    ask_json(tools, tools=[FUNCTION], input=[USER, *first["output"], result])
    expected = prompt_ids(tools)
    assert "<think>Hm.</think>So" in prompt_of(tools)
    references = list(map(refer, first["output"]))
    del references[1]["type"]  # it is optional
    second = ask_json(tools, tools=[FUNCTION], input=[USER, *references, result])
    assert prompt_ids(tools) == expected
    items = get(tools, f"{second['id']}/input_items?order=asc").json()["data"]
    assert items[1:4] == first["output"]
    ask_json(tools, tools=[FUNCTION], input=list(map(refer, items)))
    assert prompt_ids(tools) == expected  # input items can be referenced too
    delete(tools, first["id"])
    ask_json(tools, tools=[FUNCTION], input=[USER, *references, result])  # the second response has these items too


def test_references_to_more_than_a_request_may_hold(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    item = ask_json(server)["output"][0]
    monkeypatch.setattr(responses, "MAX_REFERENCED_BYTES", 5 * len(json.dumps(item)))
    assert ask(server, input=[refer(item)] * 4 + [USER]).status_code == 200
    error = check_error(ask(server, input=[refer(item)] * 40), 400)
    assert error["message"].startswith(f"Invalid '{error['param']}': the referenced items exceed ")


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_reference(server: RunningServer, stream: bool) -> None:
    def answer(**fields: Any) -> Fields:
        return dict(ask_events(server, **fields)[-1]["response"]) if stream else ask_json(server, **fields)

    kept, unkept = answer(), answer(store=False)
    ask_json(server, input=[USER | {"id": "msg_1"}])  # an id that a client chooses can be guessed by others
    follower = ask_json(server, input=[USER, refer(kept["output"][0])])
    for response in (kept, follower):
        delete(server, response["id"])
    for item in ({"id": "msg_1"}, unkept["output"][0], kept["output"][0]):
        error = check_error(ask(server, input=[USER, refer(item)]), 400)
        assert error["param"] == "input[1].id"
        assert error["message"].startswith(f"Item with id '{item['id']}' not found.")


# Calls and results of other tools.

EXEC: Fields = {"type": "exec", "command": ["ls"], "env": {}}
SHELL: Fields = {"type": "local_shell_call", "id": "lsh_1", "status": "completed", "action": EXEC}
COMMANDS: Fields = {"type": "shell_call", "action": {"commands": ["ls"]}}
CHUNK: Fields = {"stdout": "a", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}
PATCH: Fields = {"type": "apply_patch_call", "status": "completed", "operation": {"type": "delete_file", "path": "a"}}
CUSTOM_CALL: Fields = {"type": "custom_tool_call", "name": "apply_patch", "input": "*** é"}
DONE: Fields = {"type": "custom_tool_call_output", "output": "Done"}
SHOWN_CHUNK = json.dumps([CHUNK], separators=(",", ":"))
OTHER_ITEMS: list[tuple[Fields, str, Fields, Fields, str]] = [  # a call, how it is shown, a result, how that is shown
    (SHELL, "local_shell", EXEC, DONE, "Done"),
    (CUSTOM_CALL, "apply_patch", {"input": "*** é"}, DONE | {"output": [{"type": "input_text", "text": "D"}]}, "D"),
    (COMMANDS, "shell", COMMANDS["action"], {"type": "shell_call_output", "output": [CHUNK]}, SHOWN_CHUNK),
    (PATCH, "apply_patch", PATCH["operation"], {"type": "apply_patch_call_output", "status": "completed"}, "completed"),
]


@pytest.mark.parametrize(("call", "name", "arguments", "output", "shown_output"), OTHER_ITEMS)
def test_calls_of_other_tools_are_shown_as_those_of_functions(
    tools: RunningServer, call: Fields, name: str, arguments: Fields, output: Fields, shown_output: str
) -> None:
    items = [USER, call | {"call_id": "1"}, {"call_id": "1"} | output]
    TypeAdapter(ResponseInputParam).validate_python(items)  # as the official client describes them
    answer = ask(tools, input=items)
    assert (answer.status_code, WARNINGS in answer.headers) == (200, False)
    shown_call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    assert f"<tool_call>\n{shown_call}\n</tool_call>" in prompt_of(tools)
    assert f"<|im_start|>tool\n{shown_output}<|im_end|>" in prompt_of(tools)
    stored = get(tools, f"{answer.json()['id']}/input_items").json()["data"]
    assert [item["type"] for item in stored] == ["function_call_output", "function_call", "message"]


@pytest.mark.parametrize("missing", [{}, {"call_id": None}])
def test_calls_of_the_local_shell_may_have_only_an_id(tools: RunningServer, missing: Fields) -> None:
    output = {"type": "local_shell_call_output", "id": "lsh_1", "output": "Done"}
    answer = ask_json(tools, input=[USER, SHELL | missing, output | missing])
    items = get(tools, f"{answer['id']}/input_items").json()["data"]
    assert [item["call_id"] for item in items if item["type"] != "message"] == ["lsh_1", "lsh_1"]


REFUSED_ITEMS = {"compaction", "compaction_trigger"}  # because a conversation is lost without them


def test_items_of_other_tools_are_left_out(server: RunningServer, strict: RunningServer) -> None:
    read = {"message", "reasoning", "item_reference", "function_call", "function_call_output", *OTHER_CALLS}
    read |= {f"{name}_output" for name in OTHER_CALLS}
    others = sorted(types_of(ResponseInputItemParam) - read - REFUSED_ITEMS)
    assert len(others) > 10
    answer = ask(server, input=[*({"type": name, "id": "x", "status": "failed"} for name in others), USER])
    expected = ", ".join(f"input[{index}].{name}" for index, name in enumerate(others))
    assert answer.headers[WARNINGS] == f"ignored parameters: {expected}"
    assert prompt_ids(server) == chatml(("user", "Hi"))
    assert len(get(server, f"{answer.json()['id']}/input_items").json()["data"]) == 1
    error = check_error(ask(strict, input=[{"type": "web_search_call"}, USER]), 400)
    assert error["param"] == "input[0].web_search_call"


# Truncation.

LONG = "x" * 700  # the context has 2048 tokens


def user_turn(text: str) -> tuple[str, str]:
    return "user", text


@pytest.mark.parametrize(
    ("turns", "kept"),
    [
        ([user_turn("a"), ("assistant", "b"), user_turn("c")], [0, 1, 2]),
        ([user_turn(LONG), ("assistant", LONG), user_turn(LONG)], [2]),
        ([user_turn(LONG), ("assistant", "b"), user_turn(LONG), ("assistant", "d"), user_turn(LONG)], [2, 3, 4]),
        ([("system", "s"), user_turn(LONG), ("developer", "t"), user_turn(LONG), user_turn(LONG)], [0, 2, 3, 4]),
        ([user_turn(LONG * 1000), user_turn("b")], [1]),
    ],
)
def test_the_oldest_turns_are_left_out(server: RunningServer, turns: list[tuple[str, str]], kept: list[int]) -> None:
    items = [{"role": role, "content": text} for role, text in turns]
    fields: Fields = {"input": items, "instructions": "Brief.", "max_output_tokens": 20}
    answer = ask_json(server, truncation="auto", **fields)
    shown = [("system" if role == "developer" else role, text) for role, text in (turns[i] for i in kept)]
    expected = chatml(("system", "Brief."), *shown)
    assert prompt_ids(server) == expected
    assert (answer["truncation"], answer["usage"]["input_tokens"]) == ("auto", len(expected))
    stored = get(server, f"{answer['id']}/input_items").json()["data"]
    assert len(stored) == len(turns)  # not truncated
    assert count(server, truncation="auto", **fields) == len(expected)
    if len(kept) < len(turns):
        assert check_error(ask(server, truncation="disabled", **fields), 400)["code"] == "context_length_exceeded"


def test_room_for_the_answer_counts(server: RunningServer) -> None:
    items = [{"role": "user", "content": text} for text in ("x" * 1000, "b")]
    for max_output_tokens, is_whole in ((500, True), (1500, False), (-1, True), (2048, True), (128_000, True)):
        ask_json(server, input=items, truncation="auto", max_output_tokens=max_output_tokens)
        assert (prompt_ids(server) == chatml(("user", "b"))) == (not is_whole)


def test_a_single_message_that_is_too_long(server: RunningServer) -> None:
    for text in ("x" * 3000, "x" * 3_000_000):
        items = [{"role": "user", "content": "a"}, {"role": "user", "content": text}]
        error = check_error(ask(server, input=items, truncation="auto"), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


def called(number: int, output: str) -> list[Fields]:
    """Return a call and its result."""
    call = {"type": "function_call", "name": "weather", "arguments": "{}", "call_id": f"call_{number}"}
    return [call, {"type": "function_call_output", "call_id": f"call_{number}", "output": output}]


def test_calls_and_their_results_are_left_out_together(tools: RunningServer) -> None:
    items = [{"role": "user", "content": "Go"}]
    for number, output in enumerate((LONG, LONG, LONG, "last")):
        items += called(number, output)
    ask_json(tools, input=items, truncation="auto")
    text = prompt_of(tools)
    assert (text.count("<tool_call>"), text.count("<|im_start|>tool\n")) == (3, 3)
    assert (text.count(LONG), "last" in text) == (2, True)


def test_a_template_that_wants_a_user_first(tmp_path: Path) -> None:
    """The kept part starts with a user message, although the last turn has many other messages."""
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('A user first!') }}{% endif %}"
    write_tiny_model(tmp_path, *TAGS, template=strict + TEMPLATE)
    items: list[Fields] = [{"role": role, "content": LONG} for role in ("user", "assistant", "user")]
    items += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "Go"}]
    for number in range(6):
        items += called(number, "Rain")
    with shared_server(tmp_path, vocab_size=263) as server:
        ask_json(server, input=items, truncation="auto", max_output_tokens=10)
        text = prompt_of(server)
    assert text.startswith(f"<|im_start|>user\n{LONG}<|im_end|>\n<|im_start|>assistant\nb")
    assert text.count("Rain") == 6


# Background streams: several readers follow the logged events from any event on.

STREAM = {"background": True, "stream": True}


def url(server: RunningServer, response_id: str, starting_after: int | None = None) -> str:
    rest = "" if starting_after is None else f"&starting_after={starting_after}"
    return f"{server.url}{RESPONSES}/{response_id}?stream=true{rest}"


def check_gone(text: str) -> None:
    """Check the end of a stream whose response is deleted: a reader that is behind gets only an error."""
    last: dict[str, Any] = json.loads(text.rpartition("\ndata: ")[2])
    RESPONSE_EVENTS.validate_python([last])
    assert last["type"] in ("response.failed", "error")
    error = last if last["type"] == "error" else last["response"]["error"]
    assert "is no longer stored" in error["message"]


@contextmanager
def begun(server: RunningServer, **fields: Any) -> Iterator[str]:
    """Yield the id of a background response whose client has read its first events and disconnects at exit."""
    body = MINIMAL[RESPONSES] | STREAM | fields
    with httpx.stream("POST", server.url + RESPONSES, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["x-lightwell-seed"]
        line = next(line for line in response.iter_lines() if line.startswith("data: "))
        yield json.loads(line.removeprefix("data: "))["response"]["id"]


def wait_idle(server: RunningServer) -> None:
    wait_until(lambda: server.engine.num_choices == 0 and not server.context.background_tasks)


def test_the_events_are_those_of_any_stream(server: RunningServer) -> None:
    kept, other = ask_events(server, background=True), ask_events(server)
    kinds = [[*dict.fromkeys(event["type"] for event in events)] for events in (kept, other)]
    assert kinds[0] == kinds[1]  # how many deltas there are depends on how the engine's steps arrive
    assert text_of(kept[-1]["response"]) == text_of(other[-1]["response"]) == REPLY
    stored = get(server, kept[-1]["response"]["id"]).json()
    assert (stored["status"], stored["output"]) == ("completed", kept[-1]["response"]["output"])


def test_logged_events_can_be_read_from_any_event_on(server: RunningServer) -> None:
    text = ask(server, **STREAM).text
    events = text.split("\n\n")[:-1]
    response_id = parse(text)[0]["response"]["id"]
    assert httpx.get(url(server, response_id)).text == text
    for number in range(len(events)):
        rest = httpx.get(url(server, response_id, number)).text
        assert rest == "".join(f"{event}\n\n" for event in events[number + 1 :])
    with openai_client(server.url) as client:
        stream = client.responses.retrieve(response_id, stream=True, starting_after=3)
        assert [event.sequence_number for event in stream] == list(range(4, len(events)))


@pytest.mark.checklist("E08")
def test_a_reader_that_does_not_read(server: RunningServer, fake_engine: FakeEngine) -> None:
    """A stalled reader blocks neither the generation nor other readers, and finally gets all events."""
    fake_engine.config.endless = True
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.settimeout(60)
        stalled.connect(("127.0.0.1", server.port))
        fake_engine.pause()
        include = ["message.output_text.logprobs"]
        with begun(server, max_output_tokens=1900, include=include, top_logprobs=20) as response_id:
            path = f"{RESPONSES}/{response_id}?stream=true"
        stalled.sendall(raw_request("GET", path, connection="close"))
        fake_engine.resume()
        text = Reader(url(server, response_id)).join()
        assert len(text) > 3_000_000  # exceeds the buffers of a connection
        assert get(server, response_id).json()["status"] == "incomplete"
        answer = HTTPResponse(stalled)
        answer.begin()
        assert answer.read().decode() == text


# Ends.


def test_cancel(slow: RunningServer) -> None:
    with begun(slow) as response_id:
        readers = [Reader(url(slow, response_id)) for _ in range(2)]
        readers.append(Reader(slow.url + RESPONSES, "POST", MINIMAL[RESPONSES] | STREAM))
        wait_until(lambda: all(reader.text.count("delta") > 2 for reader in readers))
        other_id = parse(readers[2].text.partition("\n\n")[0] + "\n\n")[0]["response"]["id"]
        for each in (response_id, other_id):
            assert cancel(slow, each).json()["status"] == "cancelled"
        texts = [reader.join() for reader in readers]
    assert texts[0] == texts[1]
    for text in texts:
        *_, item_done, last = parse(text)
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
        assert last["response"]["output"] == [item_done["item"]]
        assert get(slow, last["response"]["id"]).json() == last["response"]
    assert httpx.get(url(slow, response_id)).text == texts[0]
    wait_idle(slow)


def test_delete(slow: RunningServer) -> None:
    num_bytes = slow.context.part(ResponseStore).num_bytes
    with begun(slow) as response_id:
        reader = Reader(url(slow, response_id))
        wait_until(lambda: reader.text.count("delta") > 2)
        assert delete(slow, response_id).status_code == 200
        check_gone(reader.join())
    check_error(httpx.get(url(slow, response_id)), 404)
    wait_idle(slow)
    assert slow.context.part(ResponseStore).num_bytes == num_bytes


# Memory limits.


def test_a_stream_that_exceeds_the_memory_limit(start_server: StartServer, fake_engine: FakeEngine) -> None:
    """A stream that exceeds the memory limit fails with an error, since nobody could read it."""
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.001
    server = start_server(stored_responses_memory=6_000)
    text = ask(server, **STREAM, max_output_tokens=1900, include=["message.output_text.logprobs"]).text
    check_gone(text)
    assert len("".join(re.findall(r'"delta":"([^"]*)"', text))) < 500  # of 1900
    wait_idle(server)
    assert server.context.part(ResponseStore).num_bytes == 0
    response_id = parse(text.partition("\n\n")[0] + "\n\n")[0]["response"]["id"]
    check_error(get(server, f"{response_id}?stream=true"), 404)
    assert get(server, ask_json(server, max_output_tokens=5)["id"]).status_code == 200


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"max_stored_responses": 0}, {}),
        ({"stored_responses_memory": 2_000}, {"input": "x" * 2_000, "max_output_tokens": 20}),
    ],
)
def test_responses_too_large_to_store_are_not_generated(
    start_server: StartServer, fake_engine: FakeEngine, settings: dict[str, Any], fields: dict[str, Any]
) -> None:
    fake_engine.config.endless, fake_engine.config.step_seconds = True, 0.01
    server = start_server(**settings)
    for stream in (False, True):
        error = check_error(ask(server, background=True, stream=stream, **fields), 400)
        assert error["param"] == "background"
        wait_until(lambda: fake_engine.num_choices == 0)
    assert get(server, ask_json(server, **({"max_output_tokens": 5} | fields))["id"]).status_code == 404


# Invalid requests.


def test_invalid_requests(server: RunningServer) -> None:
    response_id = ask_events(server, background=True)[-1]["response"]["id"]
    last = parse(httpx.get(url(server, response_id)).text)[-1]["sequence_number"]
    positions = [f"stream=true&starting_after={value}" for value in ("-1", "x", "1.5", "", last + 1, "9" * 100)]
    switches = ["stream=maybe", "starting_after=1", "stream=false&starting_after=1", "include_obfuscation=x"]
    for query in (*switches, *positions):
        error = check_error(get(server, f"{response_id}?{query}"), 400)
        param = query.rpartition("&")[2].partition("=")[0]
        assert (error["param"], f"'{param}'" in error["message"]) == (param, True), query
    accepted = f"{response_id}?stream=true&include_obfuscation=true&include[]=message.output_text.logprobs"
    assert get(server, accepted).text == get(server, f"{response_id}?stream=true").text
    for path in (response_id, f"{response_id}?stream=false"):
        assert get(server, path).json()["status"] == "completed"
    check_error(get(server, "resp_unknown?stream=true"), 404)


def test_streams_without_an_event_log(server: RunningServer) -> None:
    for response in (ask_events(server)[-1]["response"], ask_json(server, background=True), ask_json(server)):
        assert check_error(get(server, f"{response['id']}?stream=true"), 400)["param"] == "stream"


def test_a_long_stored_conversation_is_a_long_text(roomy: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SlowTokenizer(roomy.model.tokenizer, monkeypatch)
    tokenizer.go_on.release()
    stored = ask_key(roomy, "/v1/responses", {"input": LONG_TEXT, "max_output_tokens": 1}).json()["id"]
    count = 1 + (os.cpu_count() or 1)  # as many as fill the threads for short texts
    threads = roomy.context.text_threads
    run_in_thread, texts = threads.run, list[int]()

    async def run(tenant: Tenant, num_bytes: int, *work: Any) -> Any:
        texts.append(num_bytes)
        return await run_in_thread(tenant, num_bytes, *work)

    with long_requests(roomy, 30) as waiting, ThreadPoolExecutor(count) as pool:
        monkeypatch.setattr(threads, "run", run)
        body = {"input": "a", "previous_response_id": stored, "max_output_tokens": 1}
        continued = [pool.submit(ask_key, roomy, "/v1/responses", body) for _ in range(count)]
        wait_until(lambda: len(texts) == count)
        assert ask_key(roomy, "/v1/completions", {"prompt": "a"}).status_code == 200
        assert not any(each.done() for each in waiting)
        tokenizer.go_on.release(30 + count)
        assert {each.result().status_code for each in [*waiting, *continued]} == {200}
