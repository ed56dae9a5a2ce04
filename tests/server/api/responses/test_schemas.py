"""Request fields of `/v1/responses`: tools of other types, item references, hints, and extensions."""

import json
import re
from typing import Any, get_args, get_type_hints

import httpx
import pytest
from openai.types.responses import ResponseInputItemParam, ResponseInputParam
from pydantic import TypeAdapter
from typing_extensions import is_typeddict

from server.api.chat.request_builder import EXTENSIONS
from server.api.responses import conversion as responses
from server.api.responses.custom_tools import OTHER_CALLS
from server.api.responses.schemas import ResponsesRequest
from server.generation import pipeline
from tests.server.api.responses.test_routes import (
    MINIMAL,
    PATH,
    REPLY,
    ask,
    ask_events,
    ask_json,
    cancel,
    get,
    prompt_of,
    text_of,
)
from tests.server.api.test_every_field import RESPONSES, SAMPLING, WRONG, post, seen
from tests.server.conftest import StartServer
from tests.support.clients import openai_client
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, wait_until
from tests.support.tiny_tokenizer_model import chatml
from tests.support.tool_model import say

FUNCTION: dict[str, Any] = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
WARNINGS = "x-lightwell-warnings"
INPUT: TypeAdapter[Any] = TypeAdapter(ResponseInputParam)


# Tools.

OTHERS: list[dict[str, Any]] = [
    {"type": "web_search", "external_web_access": True},
    {"type": "namespace", "name": "mcp", "tools": [FUNCTION]},
    {"type": "shell"},
    {"type": "local_shell"},
]


def test_tools_of_other_types_are_left_out(tiny: RunningServer, start_server: StartServer) -> None:
    alone = ask(tiny, tools=[FUNCTION])
    expected = prompt_of(tiny)
    response = ask(tiny, tools=[*OTHERS, FUNCTION])
    assert response.headers[WARNINGS] == (
        "ignored parameters: tools[0].web_search, tools[1].namespace, tools[2].shell, tools[3].local_shell"
    )
    assert prompt_of(tiny) == expected
    assert response.json()["tools"] == alone.json()["tools"] == [FUNCTION | {"description": None, "strict": False}]
    with openai_client(tiny.url) as client:
        answer = client.responses.create(model="tiny", input="Hi", tools=[{"type": "web_search"}, FUNCTION])  # type: ignore[list-item]
        assert [tool.type for tool in answer.tools] == ["function"]
    error = check_error(ask(start_server(strict=True), tools=[FUNCTION, *OTHERS]), 400)
    assert (error["param"], error["message"]) == (
        "tools[1].web_search",
        "Unrecognized request argument supplied: tools[1].web_search",
    )


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"type": "custom", "name": "apply_patch"}, "tool_choice"),
        ({"type": "function", "name": "apply_patch"}, "tool_choice"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"name": "apply_patch"}]}, "tool_choice.tools[0].type"),
    ],
)
def test_a_choice_of_a_tool_that_is_left_out(tiny: RunningServer, choice: dict[str, Any], param: str) -> None:
    error = check_error(ask(tiny, tools=[*OTHERS, FUNCTION], tool_choice=choice), 400)
    assert error["param"] == param


def test_errors_name_tools_by_their_index_in_the_request(tiny: RunningServer) -> None:
    wrong = FUNCTION | {"parameters": {"type": "array"}}
    error = check_error(ask(tiny, tools=[FUNCTION, *OTHERS, wrong]), 400)
    assert error["param"] == "tools[5].parameters"
    assert "'tools[5].parameters'" in error["message"]


CUSTOM: dict[str, Any] = {"type": "custom", "name": "patch", "description": "Edits a file."}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
REPLIES = [
    ('<tool_call>{"name": "patch", "arguments": {"input": "*** \\"é\\"\\n"}}</tool_call>', '*** "é"\n'),
    ('<tool_call>{"name": "patch", "arguments": {"input": ""}}</tool_call>', ""),
    ('<tool_call>{"name": "patch", "arguments": {"wish": 5}}</tool_call>', '{"wish": 5}'),
]


@pytest.mark.parametrize(("reply", "text"), REPLIES)
def test_calls_of_custom_tools(tools: RunningServer, reply: str, text: str) -> None:
    say(tools, reply + '<tool_call>{"name": "weather", "arguments": {}}</tool_call>')
    fields: dict[str, Any] = {"tools": [CUSTOM, FUNCTION], "input": [{"role": "user", "content": "Hi"}]}
    whole = ask_json(tools, **fields)
    call = whole["output"][0]
    assert (call["type"], call["name"], call["input"]) == ("custom_tool_call", "patch", text)
    assert [item["type"] for item in whole["output"]] == ["custom_tool_call", "function_call"]
    assert whole["tools"][0] == CUSTOM | {"format": {"type": "text"}}
    events = ask_events(tools, **fields)
    pieces = [event for event in events if event["type"].startswith("response.custom_tool_call_input")]
    assert [event.get("delta", event.get("input")) for event in pieces] == [text, text]
    with openai_client(tools.url) as client:
        answer = client.responses.create(model="tiny", **fields)
        assert (answer.output[0].type, answer.output[0].input) == ("custom_tool_call", text)
    results = [{"type": f"{call['type']}_output", "call_id": call["call_id"], "output": "Done"}]
    ask_json(tools, previous_response_id=whole["id"], tools=[CUSTOM, FUNCTION], input=results)
    expected = prompt_of(tools)
    shown = json.dumps({"input": text}, ensure_ascii=False)
    assert f'{{"name": "patch", "arguments": {shown}}}' in tools.model.tokenizer.decode(expected)
    ask_json(tools, **fields | {"input": [*fields["input"], *whole["output"], *results]})
    assert prompt_of(tools) == expected


def test_custom_tools_are_described_and_can_be_forced(tools: RunningServer) -> None:
    answer = ask(tools, tools=[FUNCTION, CUSTOM | {"format": GRAMMAR}], tool_choice={"type": "custom", "name": "patch"})
    assert (answer.status_code, answer.headers[WARNINGS]) == (200, "ignored parameters: tools[1].format")
    submit = tools.engine.submits[-1]
    assert '{"name": "patch", "description": "Edits a file."' in tools.model.tokenizer.decode(submit.prompt_token_ids)
    assert '"input"' in str(submit.params.grammar).replace("\\", "")


@pytest.mark.parametrize("tools", [None, [], [{"type": "web_search"}]])
def test_a_choice_without_tools(tiny: RunningServer, tools: list[Any] | None) -> None:
    for choice in ("auto", "none"):
        assert ask_json(tiny, tools=tools, tool_choice=choice)["tool_choice"] == choice
    named = {"type": "function", "name": "weather"}
    assert check_error(ask(tiny, tools=tools, tool_choice=named), 400)["param"] == "tool_choice"
    required = ask(tiny, tools=tools, tool_choice="required")
    if tools:
        assert required.json()["tool_choice"] == "auto"
        assert required.headers[WARNINGS] == "ignored parameters: tools[0].web_search, tool_choice.required"
    else:
        assert check_error(required, 400)["param"] == "tool_choice"


# Items.


def test_items_by_reference(tools: RunningServer) -> None:
    say(tools, '<think>Hm.</think>So<tool_call>{"name": "weather", "arguments": {}}</tool_call>')
    first = ask_json(tools, tools=[FUNCTION])
    result = {"type": "function_call_output", "call_id": first["output"][2]["call_id"], "output": "Rain"}
    user = {"role": "user", "content": "Hi"}
    ask_json(tools, tools=[FUNCTION], input=[user, *first["output"], result])
    expected = prompt_of(tools)
    assert "<think>Hm.</think>So" in tools.model.tokenizer.decode(expected, skip_special_tokens=False)
    references: list[dict[str, Any]] = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    references[1] = {"id": references[1]["id"]}  # the type is optional
    second = ask_json(tools, tools=[FUNCTION], input=[user, *references, result])
    assert prompt_of(tools) == expected
    items = get(tools, f"{second['id']}/input_items?order=asc").json()["data"]
    assert items[1:4] == first["output"]
    ask_json(tools, tools=[FUNCTION], input=[{"type": "item_reference", "id": item["id"]} for item in items])
    assert prompt_of(tools) == expected  # input items can be referenced too
    httpx.delete(f"{tools.url}{PATH}/{first['id']}")
    ask_json(tools, tools=[FUNCTION], input=[user, *references, result])  # the second response has these items too


def test_references_to_more_than_a_request_may_hold(tiny: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    item = ask_json(tiny)["output"][0]
    monkeypatch.setattr(responses, "MAX_REFERENCED_BYTES", 5 * len(json.dumps(item)))
    reference = {"type": "item_reference", "id": item["id"]}
    assert ask(tiny, input=[reference] * 4 + [{"role": "user", "content": "Hi"}]).status_code == 200
    error = check_error(ask(tiny, input=[reference] * 40), 400)
    assert error["message"].startswith(f"Invalid '{error['param']}': the referenced items exceed ")


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_reference(tiny: RunningServer, stream: bool) -> None:
    def refer(item: dict[str, Any]) -> httpx.Response:
        return ask(tiny, input=[{"role": "user", "content": "Hi"}, {"type": "item_reference", "id": item["id"]}])

    def answer(**fields: Any) -> dict[str, Any]:
        response = ask_events(tiny, **fields)[-1]["response"] if stream else ask_json(tiny, **fields)
        assert isinstance(response, dict)
        return response

    kept, unkept = answer(), answer(store=False)
    follower = refer(kept["output"][0]).json()
    for response in (kept, follower):
        httpx.delete(f"{tiny.url}{PATH}/{response['id']}")
    for item in ({"id": "msg_1"}, unkept["output"][0], kept["output"][0]):
        error = check_error(refer(item), 400)
        assert error["param"] == "input[1].id"
        assert error["message"].startswith(f"Item with id '{item['id']}' not found.")


def test_a_response_goes_on_without_input(tiny: RunningServer) -> None:
    first = ask_json(tiny)
    body = {"model": "tiny", "previous_response_id": first["id"]}
    assert httpx.post(tiny.url + PATH, json=body).status_code == 200
    assert prompt_of(tiny) == chatml(("user", "Hi"), ("assistant", REPLY))
    assert httpx.post(f"{tiny.url}{PATH}/input_tokens", json=body).json()["input_tokens"] == len(prompt_of(tiny))


def test_a_refusal_of_an_earlier_answer_is_text(tiny: RunningServer) -> None:
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    ask_json(tiny, input=[{"role": "user", "content": "Hi"}, refusal, {"role": "user", "content": "Why?"}])
    assert prompt_of(tiny) == chatml(("user", "Hi"), ("assistant", "No."), ("user", "Why?"))


ITEM_CALLS: list[tuple[dict[str, Any], str]] = [
    (
        {"type": "custom_tool_call", "name": "apply_patch", "input": "*** é"},
        'apply_patch", "arguments": {"input": "*** é"}',
    ),
    (
        {"type": "local_shell_call", "action": {"type": "exec", "command": ["ls"], "env": {}}}
        | {"id": "lsh_1", "status": "completed"},
        'local_shell", "arguments": {"type": "exec", "command": ["ls"], "env": {}}',
    ),
    ({"type": "shell_call", "action": {"commands": ["ls"]}}, 'shell", "arguments": {"commands": ["ls"]}'),
    (
        {"type": "apply_patch_call", "operation": {"type": "delete_file", "path": "a"}, "status": "completed"},
        'apply_patch", "arguments": {"type": "delete_file", "path": "a"}',
    ),
]
CHUNK: dict[str, Any] = {"stdout": "a", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}
ITEM_OUTPUTS: list[tuple[dict[str, Any], str]] = [
    ({"type": "custom_tool_call_output", "call_id": "1", "output": "Done"}, "Done"),
    ({"type": "custom_tool_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "Done"}]}, "Done"),
    ({"type": "local_shell_call_output", "id": "1", "output": "Done", "status": "completed"}, "Done"),
    ({"type": "shell_call_output", "call_id": "1", "output": [CHUNK]}, json.dumps([CHUNK], separators=(",", ":"))),
    ({"type": "apply_patch_call_output", "call_id": "1", "status": "failed", "output": "no file"}, "no file"),
    ({"type": "apply_patch_call_output", "call_id": "1", "status": "completed"}, "completed"),
]


@pytest.mark.parametrize(("call", "shown_call"), ITEM_CALLS)
@pytest.mark.parametrize(("output", "shown_output"), ITEM_OUTPUTS)
def test_calls_of_other_tools_are_shown_as_those_of_functions(
    tools: RunningServer, call: dict[str, Any], shown_call: str, output: dict[str, Any], shown_output: str
) -> None:
    items = [{"role": "user", "content": "Hi"}, call | {"call_id": "1"}, output]
    INPUT.validate_python(items)  # as the official client describes them
    answer = ask(tools, input=items)
    assert (answer.status_code, WARNINGS in answer.headers) == (200, False)
    prompt = tools.model.tokenizer.decode(prompt_of(tools), skip_special_tokens=False)
    assert f'<tool_call>\n{{"name": "{shown_call}}}\n</tool_call>' in prompt
    assert f"<|im_start|>tool\n{shown_output}<|im_end|>" in prompt
    stored = get(tools, f"{answer.json()['id']}/input_items").json()["data"]
    assert [item["type"] for item in stored] == ["function_call_output", "function_call", "message"]


@pytest.mark.parametrize("missing", [{}, {"call_id": None}])
def test_calls_of_the_local_shell_may_have_only_an_id(tools: RunningServer, missing: dict[str, Any]) -> None:
    action = {"type": "exec", "command": ["ls"], "env": {}}
    call = {"type": "local_shell_call", "id": "lsh_1", "status": "completed", "action": action}
    output = {"type": "local_shell_call_output", "id": "lsh_1", "output": "Done"}
    answer = ask_json(tools, input=[{"role": "user", "content": "Hi"}, call | missing, output | missing])
    items = get(tools, f"{answer['id']}/input_items").json()["data"]
    assert [item["call_id"] for item in items if item["type"] != "message"] == ["lsh_1", "lsh_1"]


# Types of items in the official client -> those that are refused, because a conversation is lost without them.
REFUSED_ITEMS = {"compaction", "compaction_trigger"}


def types_of(union: Any) -> set[str]:
    """Return the values of `type` of the typed dictionaries of a union."""
    hints = [str(get_type_hints(member)["type"]) for member in get_args(union) if is_typeddict(member)]
    return {name for hint in hints for name in re.findall("'(.+?)'", hint)}


def test_items_of_other_tools_are_left_out(tiny: RunningServer, start_server: StartServer) -> None:
    read = {"message", "reasoning", "item_reference", "function_call", "function_call_output", *OTHER_CALLS}
    read |= {f"{name}_output" for name in OTHER_CALLS}
    others = sorted(types_of(ResponseInputItemParam) - read - REFUSED_ITEMS)
    assert len(others) > 10
    user = {"role": "user", "content": "Hi"}
    answer = ask(tiny, input=[*({"type": name, "id": "x", "status": "failed"} for name in others), user])
    expected = ", ".join(f"input[{index}].{name}" for index, name in enumerate(others))
    assert answer.headers[WARNINGS] == f"ignored parameters: {expected}"
    assert prompt_of(tiny) == chatml(("user", "Hi"))
    assert len(get(tiny, f"{answer.json()['id']}/input_items").json()["data"]) == 1
    error = check_error(ask(start_server(strict=True), input=[{"type": "web_search_call"}, user]), 400)
    assert error["param"] == "input[0].web_search_call"


def test_encrypted_reasoning_is_no_turn(tiny: RunningServer) -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
    ask_json(tiny, input=[{"role": "user", "content": "Hi"}, reasoning, {"role": "user", "content": "So?"}])
    assert prompt_of(tiny) == chatml(("user", "Hi"), ("user", "So?"))


# Fields.


def test_text_that_stops(tiny: RunningServer) -> None:
    for fields, text in (
        ({"stop": "wor"}, "Hello, "),
        ({"stop": ["zz", "o,"], "include_stop_str_in_output": True}, "Hello,"),
    ):
        for response in (ask_json(tiny, **fields), ask_events(tiny, **fields)[-1]["response"]):
            assert (text_of(response), response["status"]) == (text, "completed")


def test_template_options(tools: RunningServer) -> None:
    ask_json(tools, chat_template_kwargs={"enable_thinking": True})
    assert tools.model.tokenizer.decode(prompt_of(tools), skip_special_tokens=False).endswith("<think>\n")
    answer = ask(tools, chat_template_kwargs={"mood": 1})
    assert answer.headers[WARNINGS] == "ignored parameters: chat_template_kwargs.mood"


def test_what_is_answered_with(tiny: RunningServer) -> None:
    named = {"user": "me", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"k" * 64: "v" * 512}}
    response = ask(tiny, service_tier="ultrafast", **named)
    assert {name: response.json()[name] for name in named} == named
    assert response.json()["service_tier"] == "default"
    assert WARNINGS not in response.headers
    with openai_client(tiny.url) as client:
        assert client.responses.retrieve(response.json()["id"]).prompt_cache_key == "k"


ADVICE = [
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"effort": "minimal", "summary": "auto"}}, "reasoning.effort"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
]


@pytest.mark.parametrize(("fields", "name"), ADVICE)
def test_hints_that_the_template_does_not_read(
    tiny: RunningServer, start_server: StartServer, fields: dict[str, Any], name: str
) -> None:
    response = ask(tiny, **fields)
    assert (response.status_code, response.headers[WARNINGS]) == (200, f"ignored parameters: {name}")
    assert prompt_of(tiny) == chatml(("user", "Hi"))
    assert check_error(ask(start_server(strict=True), **fields), 400)["param"] == name


def test_hints_that_are_neutral_or_followed(tiny: RunningServer, tools: RunningServer) -> None:
    for fields in ({"reasoning": {"effort": "none"}}, {"reasoning": {"effort": "medium"}, "text": {}}):
        assert WARNINGS not in ask(tiny, **fields).headers
    for effort, end in (("high", "<think>\n"), ("none", "assistant\n")):
        assert WARNINGS not in ask(tools, reasoning={"effort": effort}).headers
        assert tools.model.tokenizer.decode(prompt_of(tools), skip_special_tokens=False).endswith(end)


# Start of a stream.


def test_a_stream_that_waits_has_begun(
    server: RunningServer, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_HELD_SECONDS", 0.1)
    fake_engine.pause()
    with httpx.stream("POST", server.url + PATH, json=MINIMAL | {"stream": True}, timeout=5) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        created, in_progress = json.loads(next(lines)), json.loads(next(lines))
        assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
        assert cancel(server, created["response"]["id"]).json()["status"] == "cancelled"
        last = json.loads(next(lines))
        assert (last["type"], last["response"]["status"], last["sequence_number"]) == (
            "response.incomplete",
            "cancelled",
            2,
        )
    fake_engine.resume()
    wait_until(lambda: fake_engine.num_choices == 0)


# Extensions.

INCLUDED = {"include": ["message.output_text.logprobs"]}
ACTING: dict[str, Any] = SAMPLING | {
    "thinking_token_budget": 5,
    "return_tokens_as_token_ids": (INCLUDED, True),
}


IDLE = {"request_id", "queue_timeout"}  # effect not visible here: ids are for other requests, and nothing has to wait


@pytest.mark.parametrize("name", sorted(EXTENSIONS - set(ResponsesRequest.model_fields) - IDLE))
def test_extensions_act_and_are_validated(tools: RunningServer, name: str) -> None:
    say(tools, "<think>Hm.</think>Hello, <|im_end|>world, hello, world!")
    value = ACTING[name]
    others, value = value if isinstance(value, tuple) else ({}, value)
    base = {"model": "tiny", "input": "Hi", "seed": 7} | others
    tools.engine.config.step_seconds = 0.005 if name == "stream_interval" else 0.0
    assert seen(tools, RESPONSES, base | {name: value}) != seen(tools, RESPONSES, base)
    refused = [post(tools, RESPONSES, base | {name: wrong}) for wrong in WRONG]
    errors = [check_error(answer, 400) for answer in refused if answer.status_code != 200]
    assert len(errors) >= 3
    for error in errors:
        assert name in str(error["param"])
