"""`/v1/responses` over real sockets, with a fake engine: tokens are bytes, the template is ChatML."""

import json
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.conftest import StartServer
from tests.support.clients import openai_client
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, wait_until
from tests.support.tiny_tokenizer_model import chatml

PATH = "/v1/responses"
REPLY = "Hello, world!"
MINIMAL: dict[str, Any] = {"model": "tiny", "input": "Hi"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def ask(server: RunningServer, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + PATH, json=MINIMAL | fields)


def ask_json(server: RunningServer, **fields: Any) -> dict[str, Any]:
    response = ask(server, **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ask_events(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    response = ask(server, stream=True, **fields)
    assert response.status_code == 200, response.text
    return parse(response.text)


def parse(text: str) -> list[dict[str, Any]]:
    """Parse events with the client's schema. Their names must equal their types, their numbers count from 0."""
    *events, rest = text.split("\n\n")
    assert rest == ""
    parsed = []
    for event in events:
        name, data = event.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        EVENT.validate_python(parsed[-1])
        assert name == f"event: {parsed[-1]['type']}"
    assert [event["sequence_number"] for event in parsed] == list(range(len(parsed)))
    return parsed


def get(server: RunningServer, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{PATH}/{path}")


def cancel(server: RunningServer, response_id: str) -> httpx.Response:
    return httpx.post(f"{server.url}{PATH}/{response_id}/cancel")


def prompt_of(server: RunningServer) -> list[int]:
    return server.engine.submits[-1].prompt_token_ids


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


# The answer.


def test_schema_of_the_answer(tiny: RunningServer) -> None:
    answer = ask_json(tiny, max_output_tokens=5, metadata={"a": "b"})
    Response.model_validate(answer, strict=True)
    (item,) = answer.pop("output")
    assert item.pop("id").startswith("msg_")
    content = [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert item == {"type": "message", "status": "incomplete", "role": "assistant", "content": content}
    assert answer.pop("id").startswith("resp_")
    assert answer.pop("created_at") > 1.7e9
    num_prompt_tokens = len(chatml(("user", "Hi")))
    assert answer == {
        "object": "response",
        "status": "incomplete",
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"},
        "instructions": None,
        "max_output_tokens": 5,
        "max_tool_calls": None,
        "model": "tiny",
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_prompt_tokens + 5,
        },
        "metadata": {"a": "b"},
        "service_tier": "default",
        "user": None,
        "safety_identifier": None,
        "prompt_cache_key": None,
    }


@pytest.mark.parametrize(("fields", "end"), [({}, "completed"), ({"max_output_tokens": 4}, "incomplete")])
def test_events_of_a_stream(tiny: RunningServer, fields: dict[str, Any], end: str) -> None:
    events = ask_events(tiny, **fields)
    created, in_progress, item_added, part_added, *deltas, text_done, part_done, item_done, last = events
    for event, kind in ((created, "created"), (in_progress, "in_progress")):
        assert event["type"] == f"response.{kind}"
        assert (event["response"]["status"], event["response"]["output"], event["response"]["usage"]) == (
            "in_progress",
            [],
            None,
        )
    item_id = item_added["item"]["id"]
    assert (item_added["type"], item_added["output_index"]) == ("response.output_item.added", 0)
    assert (item_added["item"]["status"], item_added["item"]["content"]) == ("in_progress", [])
    assert (part_added["type"], part_added["part"]["text"]) == ("response.content_part.added", "")
    assert {event["type"] for event in deltas} == {"response.output_text.delta"}
    for event in (part_added, *deltas, text_done, part_done):
        assert (event["item_id"], event["output_index"], event["content_index"]) == (item_id, 0, 0)
    text = REPLY[: fields.get("max_output_tokens", 100)]
    assert "".join(event["delta"] for event in deltas) == text_done["text"] == part_done["part"]["text"] == text
    assert [event["type"] for event in (text_done, part_done, item_done, last)] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{end}",
    ]
    assert last["response"]["output"] == [item_done["item"]]
    assert (last["response"]["status"], item_done["item"]["status"]) == (end, end)
    whole = ask_json(tiny, **fields)
    assert last["response"]["usage"] == whole["usage"]
    assert text_of(last["response"]) == text_of(whole) == text


def test_logprobs(tiny: RunningServer) -> None:
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 2}
    part = ask_json(tiny, **fields)["output"][0]["content"][0]
    assert [(each["token"], each["bytes"], len(each["top_logprobs"])) for each in part["logprobs"]] == [
        ("H", [72], 2),
        ("e", [101], 2),
    ]
    events = ask_events(tiny, **fields)
    streamed = [each for event in events if event["type"].endswith("text.delta") for each in event["logprobs"]]
    assert streamed == part["logprobs"] == events[-1]["response"]["output"][0]["content"][0]["logprobs"]


def test_official_client(tiny: RunningServer) -> None:
    with openai_client(tiny.url) as client:
        answer = client.responses.create(model="tiny", input="Hi")
        assert (answer.output_text, answer.status) == (REPLY, "completed")
        with client.responses.stream(model="tiny", input="Hi") as stream:
            assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == REPLY
            assert stream.get_final_response().output_text == REPLY
        assert client.responses.retrieve(answer.id) == answer
        (item,) = client.responses.input_items.list(answer.id)
        assert item.type == "message"
        client.responses.delete(answer.id)


# Conversations.


def test_a_conversation_goes_on(tiny: RunningServer) -> None:
    first = ask_json(tiny, instructions="Short.")
    assert tiny.engine.submits[-1].prompt_token_ids == chatml(("system", "Short."), ("user", "Hi"))
    second = ask_json(tiny, input="Why?", previous_response_id=first["id"])
    turns = [("user", "Hi"), ("assistant", REPLY), ("user", "Why?")]  # instructions are not stored
    assert tiny.engine.submits[-1].prompt_token_ids == chatml(*turns)
    assert second["previous_response_id"] == first["id"]
    for stream in (False, True):
        items = [{"role": "user", "content": [{"type": "input_text", "text": "And"}]}]
        ask(tiny, input=items, previous_response_id=second["id"], instructions="Long.", stream=stream)
        turns_now = [("system", "Long."), *turns, ("assistant", REPLY), ("user", "And")]
        assert tiny.engine.submits[-1].prompt_token_ids == chatml(*turns_now)
    httpx.delete(f"{tiny.url}{PATH}/{first['id']}")
    ask_json(tiny, input="Still", previous_response_id=second["id"])
    assert tiny.engine.submits[-1].prompt_token_ids == chatml(*turns, ("assistant", REPLY), ("user", "Still"))


def test_input_tokens(tiny: RunningServer) -> None:
    """The count equals the number of prompt tokens of the same request."""
    first = ask_json(tiny)
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
    requests: list[dict[str, Any]] = [
        {"input": "Why?"},
        {"input": [{"role": "user", "content": "Why?"}], "instructions": "I"},
        {"input": "Why?", "previous_response_id": first["id"], "instructions": "I"},
        {"previous_response_id": first["id"]},
        {"input": "Why?", "tools": [tool], "tool_choice": "auto", "parallel_tool_calls": False},
        {"input": "Why?", "text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "low"}},
        {"input": [{"role": "user", "content": "x" * 700}] * 5, "truncation": "auto"},
        {"input": "Why?", "extra_body": {"truncate_prompt_tokens": 7}},
    ]
    with openai_client(tiny.url) as client:
        for fields in requests:
            counted = client.responses.input_tokens.count(model="tiny", **fields)
            requested = client.responses.create(model="tiny", **fields)
            assert requested.usage is not None
            assert counted.input_tokens == requested.usage.input_tokens == len(tiny.engine.submits[-1].prompt_token_ids)
            assert counted.object == "response.input_tokens"
            given = {name: value for name, value in fields.items() if name != "extra_body"}
            if given == fields:
                assert client.responses.input_tokens.count(**given) == counted  # the model defaults to the server's
    error = check_error(httpx.post(f"{tiny.url}{PATH}/input_tokens", json=MINIMAL | {"model": "x"}), 404)
    assert error["code"] == "model_not_found"
    error = check_error(httpx.post(f"{tiny.url}{PATH}/input_tokens", json={"model": None}), 400)
    assert error["param"] == "input"
    num_submits = len(tiny.engine.submits)
    httpx.post(f"{tiny.url}{PATH}/input_tokens", json=MINIMAL | {"background": True, "stream": True})
    assert len(tiny.engine.submits) == num_submits


def test_output_items_are_valid_input(tiny: RunningServer) -> None:
    first = ask_json(tiny)
    ask_json(tiny, input=[{"role": "user", "content": "Hi"}, *first["output"], {"role": "user", "content": "So?"}])
    assert tiny.engine.submits[-1].prompt_token_ids == chatml(("user", "Hi"), ("assistant", REPLY), ("user", "So?"))


def test_an_unknown_previous_response(tiny: RunningServer) -> None:
    unstored = ask_json(tiny, store=False)["id"]
    for response_id in ("resp_unknown", unstored):
        error = check_error(ask(tiny, previous_response_id=response_id), 400)
        assert error["message"] == f"Previous response with id '{response_id}' not found."
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")


# Storage.


def test_a_response_can_be_retrieved_until_it_is_deleted(tiny: RunningServer) -> None:
    for answer in (ask_json(tiny), ask_events(tiny)[-1]["response"]):
        assert get(tiny, answer["id"]).json() == answer
        deleted = httpx.delete(f"{tiny.url}{PATH}/{answer['id']}")
        assert deleted.json() == {"id": answer["id"], "object": "response", "deleted": True}
        for response in (
            get(tiny, answer["id"]),
            get(tiny, f"{answer['id']}/input_items"),
            cancel(tiny, answer["id"]),
            httpx.delete(f"{tiny.url}{PATH}/{answer['id']}"),
        ):
            assert check_error(response, 404)["message"] == f"Response with id '{answer['id']}' not found."


def test_the_number_of_responses_that_are_kept(start_server: StartServer) -> None:
    server = start_server(max_stored_responses=2)
    ids = [ask_json(server)["id"] for _ in range(2)]
    assert get(server, ids[0]).status_code == 200  # which makes it the most recently used
    ids.append(ask_json(server)["id"])
    assert [get(server, each).status_code for each in ids] == [200, 404, 200]
    nothing = start_server(max_stored_responses=0)
    assert get(nothing, ask_json(nothing)["id"]).status_code == 404


def test_the_size_of_responses_that_are_kept(start_server: StartServer) -> None:
    server = start_server(stored_responses_memory=24_000)
    ids = [ask_json(server, input="x" * 1500)["id"] for _ in range(10)]
    kept = [get(server, each).status_code == 200 for each in ids]
    assert kept == sorted(kept)
    assert 1 < sum(kept) < 10
    assert 0 < server.response_store.num_bytes <= 24_000
    for each in ids:
        httpx.delete(f"{server.url}{PATH}/{each}")
    assert server.response_store.num_bytes == 0


def test_input_items(tiny: RunningServer) -> None:
    contents = [f"{index}" for index in range(5)]
    items = [{"role": "user", "content": text, "id": f"msg_{text}"} for text in contents]
    response_id = ask_json(tiny, input=items)["id"]
    page = get(tiny, f"{response_id}/input_items").json()
    assert [item["content"] for item in page["data"]] == [[{"type": "input_text", "text": t}] for t in contents[::-1]]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", "msg_4", "msg_0", False)
    page = get(tiny, f"{response_id}/input_items?order=asc&limit=2&after=msg_1").json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == (["msg_2", "msg_3"], True)
    for query, param in (
        ("order=up", "order"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        (f"limit=0099{'9' * 5000}", "limit"),
        ("after=x", "after"),
    ):
        assert check_error(get(tiny, f"{response_id}/input_items?{query}"), 400)["param"] == param


# Cancellation, disconnects and background responses.


@pytest.fixture
def slow(start_server: StartServer, fake_engine: FakeEngine) -> RunningServer:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.01
    return start_server()


def test_a_response_in_the_background(slow: RunningServer) -> None:
    answer = ask_json(slow, background=True, max_output_tokens=20)
    assert (answer["status"], answer["output"], answer["background"]) == ("in_progress", [], True)
    assert check_error(ask(slow, previous_response_id=answer["id"]), 400)["param"] == "previous_response_id"
    wait_until(lambda: get(slow, answer["id"]).json()["status"] != "in_progress")
    response = get(slow, answer["id"]).json()
    assert (response["status"], response["usage"]["output_tokens"]) == ("incomplete", 20)
    assert text_of(response) == (REPLY * 2)[:20]
    assert cancel(slow, answer["id"]).json() == response
    wait_until(lambda: not slow.context.background_tasks)
    assert len(slow.context.running) == 0


def test_a_response_in_the_background_is_cancelled(slow: RunningServer) -> None:
    response_id = ask_json(slow, background=True)["id"]
    assert cancel(slow, response_id).json()["status"] == "cancelled"
    wait_until(lambda: slow.engine.num_choices == 0 and not slow.context.background_tasks)
    response = get(slow, response_id).json()
    assert (response["status"], response["usage"]["output_tokens"] < 1000) == ("cancelled", True)
    assert cancel(slow, response_id).json() == response


def test_a_response_in_the_background_fails(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.fail_request = True
    response_id = ask_json(server, background=True)["id"]
    wait_until(lambda: get(server, response_id).json()["status"] == "failed")
    error = get(server, response_id).json()["error"]
    assert error["code"] == "server_error"
    assert "secret" not in error["message"]


@pytest.mark.parametrize("end", ["cancel", "delete", "disconnect"])
def test_a_stream_that_ends_early(slow: RunningServer, end: str) -> None:
    with httpx.stream("POST", slow.url + PATH, json=MINIMAL | {"stream": True}, timeout=20) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        response_id = json.loads(next(lines))["response"]["id"]
        assert get(slow, response_id).json()["status"] == "in_progress"
        if end == "cancel":
            assert cancel(slow, response_id).json()["status"] == "cancelled"
        elif end == "delete":
            assert httpx.delete(f"{slow.url}{PATH}/{response_id}").status_code == 200
        if end != "disconnect":
            *_, last = map(json.loads, lines)
            assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
    wait_until(lambda: slow.engine.num_choices == 0 and len(slow.context.running) == 0)
    found = get(slow, response_id)
    if end == "delete":
        assert found.status_code == 404
    else:
        assert found.json()["status"] == "cancelled"


def test_what_has_ended_cannot_be_cancelled(tiny: RunningServer) -> None:
    error = check_error(cancel(tiny, ask_json(tiny)["id"]), 400)
    assert error["message"] == "Cannot cancel a synchronous response."


def test_a_failure(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.fail_request = True
    check_error(ask(server), 500)
    events = ask_events(server)
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    response = events[-1]["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert get(server, response["id"]).json() == response


# Invalid requests.


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": []}, "input", "Invalid 'input': empty array."),
        ({"input": 5}, "input", "Invalid type for 'input'"),
        ({"input": [{"role": "user"}]}, "input[0].content", "Missing required parameter: 'input[0].content'."),
        ({"input": [{"role": "user", "content": [{"type": "file"}]}]}, "input[0].content[0].type", "Invalid value"),
        ({"input": [{"type": "compaction", "id": "x"}]}, "input[0].type", "Invalid value: 'compaction'."),
        ({"input": [{"type": "custom_tool_call", "call_id": "1", "name": "f"}]}, "input[0]", "Invalid 'input[0]': exp"),
        ({"input": [{"type": "shell_call", "call_id": "1", "action": 5}]}, "input[0]", "Invalid 'input[0]': expected"),
        ({"input": [{"type": "shell_call", "action": {}}]}, "input[0].call_id", "Missing required parameter"),
        (
            {"input": [{"type": "shell_call_output", "output": []}]},
            "input[0].call_id",
            "Missing required parameter: 'input[",
        ),
        ({"input": [{"type": ["message"]}]}, "input[0].type", "Invalid value"),
        ({"input": [{"type": "web_search_call"}]}, "input", "Invalid 'input': empty array."),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "Unsupported parameter: 'prompt' is not supported yet."),
        ({"conversation": "conv_1"}, "conversation", "Unsupported parameter: 'conversation' is not supported yet."),
        ({"input": None}, "input", "Missing required parameter: 'input'."),
        ({"input": "x" * 3000}, "input", "This model's maximum context length is 2048 tokens."),
        ({"max_output_tokens": 0}, "max_output_tokens", "Invalid 'max_output_tokens': integer below minimum value."),
        ({"temperature": 3}, "temperature", "Invalid 'temperature'"),
        ({"tools": [{}]}, "tools[0].type", "Missing required parameter: 'tools[0].type'."),
        ({"tools": [{"type": 5}]}, "tools[0].type", "Invalid type for 'tools[0].type'"),
        ({"tools": [5]}, "tools[0]", "Invalid type for 'tools[0]'"),
        ({"tool_choice": "some"}, "tool_choice", "Invalid value: 'some'."),
        ({"truncation": "some"}, "truncation", "Invalid value: 'some'."),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort", "Invalid value: 'some'."),
        ({"reasoning": {"summary": "some"}}, "reasoning.summary", "Invalid value: 'some'."),
        ({"text": {"verbosity": "some"}}, "text.verbosity", "Invalid value: 'some'."),
        ({"service_tier": 5}, "service_tier", "Invalid type for 'service_tier'"),
        ({"stop": [5]}, "stop[0]", "Invalid type for 'stop[0]'"),
        ({"conversation": "conv_1"}, "conversation", "Unsupported parameter: 'conversation'"),
        ({"prompt": {"id": "x"}}, "prompt", "Unsupported parameter: 'prompt'"),
        ({"top_logprobs": 2}, "top_logprobs", "Invalid 'top_logprobs': only allowed with"),
        ({"background": True, "store": False}, "background", "Invalid 'background'"),
        ({"stream_options": {}}, "stream_options", "The 'stream_options' parameter is only allowed"),
        ({"n": 2}, "n", "Unsupported parameter: 'n'"),
        ({"messages": []}, "messages", "Unsupported parameter: 'messages'"),
        ({"metadata": {"a": 1}}, "metadata.a", "Invalid type for 'metadata.a'"),
        ({"metadata": {"a" * 65: ""}}, "metadata", "Invalid 'metadata': expected keys of at most 64 characters"),
        ({"metadata": {"a": "b" * 513}}, "metadata", "Invalid 'metadata': expected values of at most 512 characters"),
        ({"seed": "x"}, "seed", "Invalid type for 'seed'"),
    ],
)
def test_invalid_requests(tiny: RunningServer, fields: dict[str, Any], param: str, message: str) -> None:
    error = check_error(ask(tiny, **fields), 400)
    assert (error["param"], error["message"][: len(message)]) == (param, message)


def test_parameters_reach_the_engine(tiny: RunningServer) -> None:
    answer = ask_json(tiny, temperature=0.5, top_p=0.9, top_k=5, max_output_tokens=7, min_p=0.1, seed=3, user="me")
    params = tiny.engine.submits[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 5, 7)
    assert (params.min_p, params.seed) == (0.1, 3)
    assert (answer["temperature"], answer["top_p"]) == (0.5, 0.9)


def test_unknown_fields_are_reported(tiny: RunningServer, start_server: StartServer) -> None:
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hi", "mood": 1}]}]
    response = ask(tiny, input=items, wish=2, user="me", service_tier="auto")
    assert response.headers["x-lightwell-warnings"] == "ignored parameters: wish, input[].content[].mood"
    error = check_error(ask(start_server(strict=True), input=items), 400)
    assert error["message"] == "Unrecognized request argument supplied: input[].content[].mood"


def test_a_response_is_not_streamed_again(tiny: RunningServer) -> None:
    assert check_error(get(tiny, f"{ask_json(tiny)['id']}?stream=true"), 400)["param"] == "stream"
