"""Items of `/v1/responses`: tools of other types, references, and truncation."""

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import ResponseInputItemParam, ResponseInputParam
from pydantic import TypeAdapter

from server.api.responses import conversion as responses
from server.api.responses.custom_tools import OTHER_CALLS
from tests.server.api.dialects import prompt_of
from tests.server.api.messages.test_routes import types_of
from tests.server.api.responses.requests import ask, ask_events, ask_json, count, delete, get, prompt_ids
from tests.support.clients import shared_server
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import chatml
from tests.support.tool_model import say, write_tool_model

Fields = dict[str, Any]

FUNCTION: Fields = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
USER: Fields = {"role": "user", "content": "Hi"}
WARNINGS = "x-lightwell-warnings"


# Tools.

OTHERS: list[Fields] = [
    {"type": "web_search", "external_web_access": True},
    {"type": "namespace", "name": "mcp", "tools": [FUNCTION]},
    {"type": "shell"},
    {"type": "local_shell"},
]


def test_tools_of_other_types_are_left_out(server: RunningServer, strict: RunningServer) -> None:
    alone = ask(server, tools=[FUNCTION])
    expected = prompt_ids(server)
    response = ask(server, tools=[*OTHERS, FUNCTION])
    names = "tools[0].web_search, tools[1].namespace, tools[2].shell, tools[3].local_shell"
    assert response.headers[WARNINGS] == f"ignored parameters: {names}"
    assert prompt_ids(server) == expected
    assert response.json()["tools"] == alone.json()["tools"] == [FUNCTION | {"description": None, "strict": False}]
    error = check_error(ask(strict, tools=[FUNCTION, *OTHERS]), 400)
    assert (error["param"], error["message"]) == (
        *("tools[1].web_search", "Unrecognized request argument supplied: tools[1].web_search"),
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "custom", "name": "apply_patch"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "apply_patch"}}, "tool_choice"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "apply_patch"}]}},
            "tool_choice.tools[0].type",
        ),
        ({"tools": [FUNCTION, *OTHERS, FUNCTION | {"parameters": {"type": "array"}}]}, "tools[5].parameters"),
    ],
)
def test_errors_beside_tools_that_are_left_out(server: RunningServer, fields: Fields, param: str) -> None:
    assert check_error(ask(server, **({"tools": [*OTHERS, FUNCTION]} | fields)), 400)["param"] == param


@pytest.mark.parametrize("tools", [None, [], [{"type": "web_search"}]])
def test_a_choice_without_tools(server: RunningServer, tools: list[Any] | None) -> None:
    for choice in ("auto", "none"):
        assert ask_json(server, tools=tools, tool_choice=choice)["tool_choice"] == choice
    named = {"type": "function", "name": "weather"}
    assert check_error(ask(server, tools=tools, tool_choice=named), 400)["param"] == "tool_choice"
    required = ask(server, tools=tools, tool_choice="required")
    if tools:
        assert required.json()["tool_choice"] == "auto"
        assert required.headers[WARNINGS] == "ignored parameters: tools[0].web_search, tool_choice.required"
    else:
        assert check_error(required, 400)["param"] == "tool_choice"


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
    for effort, end in (("high", "<think>\n"), ("none", "assistant\n")):
        assert WARNINGS not in ask(tools, reasoning={"effort": effort}).headers
        assert prompt_of(tools).endswith(end)


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
CHUNK: Fields = {"stdout": "a", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}
PATCH: Fields = {"type": "apply_patch_call", "status": "completed", "operation": {"type": "delete_file", "path": "a"}}
DONE: Fields = {"type": "custom_tool_call_output", "output": "Done"}
WRITTEN = [{"type": "input_text", "text": "Done"}]
OTHER_ITEMS: list[tuple[Fields, str, Fields, str]] = [  # a call, a result, and how the template shows them
    (SHELL, f'local_shell", "arguments": {json.dumps(EXEC)}', DONE, "Done"),
    (
        {"type": "custom_tool_call", "name": "apply_patch", "input": "*** é"},
        'apply_patch", "arguments": {"input": "*** é"}',
        DONE | {"output": WRITTEN},
        "Done",
    ),
    (
        {"type": "shell_call", "action": {"commands": ["ls"]}},
        'shell", "arguments": {"commands": ["ls"]}',
        {"type": "shell_call_output", "output": [CHUNK]},
        json.dumps([CHUNK], separators=(",", ":")),
    ),
    (
        PATCH,
        f'apply_patch", "arguments": {json.dumps(PATCH["operation"])}',
        {"type": "apply_patch_call_output", "status": "failed", "output": "no file"},
        "no file",
    ),
    (
        PATCH,
        f'apply_patch", "arguments": {json.dumps(PATCH["operation"])}',
        {"type": "apply_patch_call_output", "status": "completed"},
        "completed",
    ),
    (
        SHELL,
        f'local_shell", "arguments": {json.dumps(EXEC)}',
        {"type": "local_shell_call_output", "id": "1", "output": "Done", "status": "completed"},
        "Done",
    ),
]


@pytest.mark.parametrize(("call", "shown_call", "output", "shown_output"), OTHER_ITEMS)
def test_calls_of_other_tools_are_shown_as_those_of_functions(
    tools: RunningServer, call: Fields, shown_call: str, output: Fields, shown_output: str
) -> None:
    items = [USER, call | {"call_id": "1"}, {"call_id": "1"} | output]
    TypeAdapter(ResponseInputParam).validate_python(items)  # as the official client describes them
    answer = ask(tools, input=items)
    assert (answer.status_code, WARNINGS in answer.headers) == (200, False)
    assert f'<tool_call>\n{{"name": "{shown_call}}}\n</tool_call>' in prompt_of(tools)
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


def user(text: str) -> tuple[str, str]:
    return "user", text


@pytest.mark.parametrize(
    ("turns", "kept"),
    [
        ([user("a"), ("assistant", "b"), user("c")], [0, 1, 2]),
        ([user(LONG), ("assistant", LONG), user(LONG)], [2]),
        ([user(LONG), ("assistant", "b"), user(LONG), ("assistant", "d"), user(LONG)], [2, 3, 4]),
        ([("system", "s"), user(LONG), ("developer", "t"), user(LONG), user(LONG)], [0, 2, 3, 4]),
        ([user(LONG * 1000), user("b")], [1]),
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
    path = write_tool_model(tmp_path, special_tags=True) / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"chat_template": strict + settings["chat_template"]}))
    items: list[Fields] = [{"role": role, "content": LONG} for role in ("user", "assistant", "user")]
    items += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "Go"}]
    for number in range(6):
        items += called(number, "Rain")
    with shared_server(tmp_path, vocab_size=263) as server:
        ask_json(server, input=items, truncation="auto", max_output_tokens=10)
        text = prompt_of(server)
    assert text.startswith(f"<|im_start|>user\n{LONG}<|im_end|>\n<|im_start|>assistant\nb")
    assert text.count("Rain") == 6
