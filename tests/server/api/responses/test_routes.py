"""`/v1/responses` over real sockets, with a fake engine: tokens are bytes, the template is ChatML."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai.types.responses import Response

from server.generation.pipeline import MAX_HELD_SECONDS
from tests.server.api.contract import RESPONSES
from tests.server.api.dialects import REPLY, text_of
from tests.server.api.responses.requests import (
    ask,
    ask_events,
    ask_json,
    cancel,
    count,
    delete,
    get,
    parse,
    prompt_ids,
)
from tests.server.conftest import StartServer
from tests.support.clients import openai_client
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, wait_until
from tests.support.tiny_tokenizer_model import chatml

MINIMAL: dict[str, Any] = {"model": "tiny", "input": "Hi"}

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
            "input_tokens": num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_prompt_tokens + 5,
        },
    }


@pytest.mark.parametrize(("fields", "end"), [({}, "completed"), ({"max_output_tokens": 4}, "incomplete")])
def test_events_of_a_stream(server: RunningServer, fields: dict[str, Any], end: str) -> None:
    events = ask_events(server, **fields)
    created, in_progress, item_added, part_added, *deltas, text_done, part_done, item_done, last = events
    for event, kind in ((created, "created"), (in_progress, "in_progress")):
        assert event["type"] == f"response.{kind}"
        response = event["response"]
        assert (response["status"], response["output"], response["usage"]) == ("in_progress", [], None)
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
        *("response.output_text.done", "response.content_part.done", "response.output_item.done", f"response.{end}"),
    ]
    assert last["response"]["output"] == [item_done["item"]]
    assert (last["response"]["status"], item_done["item"]["status"]) == (end, end)
    whole = ask_json(server, **fields)
    assert last["response"]["usage"] == whole["usage"]
    assert text_of(last["response"]) == text_of(whole) == text


def test_logprobs(server: RunningServer) -> None:
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 2}
    part = ask_json(server, **fields)["output"][0]["content"][0]
    found = [(each["token"], each["bytes"], len(each["top_logprobs"])) for each in part["logprobs"]]
    assert found == [("H", [72], 2), ("e", [101], 2)]
    events = ask_events(server, **fields)
    streamed = [each for event in events if event["type"].endswith("text.delta") for each in event["logprobs"]]
    assert streamed == part["logprobs"] == events[-1]["response"]["output"][0]["content"][0]["logprobs"]


# Conversations.


def test_a_conversation_goes_on(server: RunningServer) -> None:
    first = ask_json(server, instructions="Short.")
    assert prompt_ids(server) == chatml(("system", "Short."), ("user", "Hi"))
    turns = [("user", "Hi"), ("assistant", REPLY)]  # instructions are not stored
    ask_json(server, input=..., previous_response_id=first["id"])
    assert prompt_ids(server) == chatml(*turns)
    assert count(server, input=..., previous_response_id=first["id"]) == len(prompt_ids(server))
    second = ask_json(server, input="Why?", previous_response_id=first["id"])
    turns += [("user", "Why?")]
    assert prompt_ids(server) == chatml(*turns)
    assert second["previous_response_id"] == first["id"]
    for stream in (False, True):
        items = [{"role": "user", "content": [{"type": "input_text", "text": "And"}]}]
        ask(server, input=items, previous_response_id=second["id"], instructions="Long.", stream=stream)
        assert prompt_ids(server) == chatml(("system", "Long."), *turns, ("assistant", REPLY), ("user", "And"))
    delete(server, first["id"])
    ask_json(server, input="Still", previous_response_id=second["id"])
    assert prompt_ids(server) == chatml(*turns, ("assistant", REPLY), ("user", "Still"))


USER, SO = {"role": "user", "content": "Hi"}, {"role": "user", "content": "So?"}
REFUSAL = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
ENCRYPTED = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}


def test_earlier_items(server: RunningServer) -> None:
    said = [*ask_json(server)["output"]]
    for items, turns in ((said, [("assistant", REPLY)]), ([REFUSAL], [("assistant", "No.")]), ([ENCRYPTED], [])):
        ask_json(server, input=[USER, *items, SO])
        assert prompt_ids(server) == chatml(("user", "Hi"), *turns, ("user", "So?"))


def test_input_tokens(server: RunningServer) -> None:
    """The count equals the number of prompt tokens of the same request."""
    first = ask_json(server)
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
    requests: list[dict[str, Any]] = [
        {"input": [{"role": "user", "content": "Why?"}], "instructions": "I"},
        {"input": "Why?", "previous_response_id": first["id"], "instructions": "I"},
        {"input": "Why?", "tools": [tool], "tool_choice": "auto", "parallel_tool_calls": False},
        {"input": "Why?", "text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "low"}},
        {"input": [{"role": "user", "content": "x" * 700}] * 5, "truncation": "auto"},
        {"input": "Why?", "extra_body": {"truncate_prompt_tokens": 7}},
    ]
    with openai_client(server.url) as client:
        for fields in requests:
            counted = client.responses.input_tokens.count(model="tiny", **fields)
            requested = client.responses.create(model="tiny", **fields)
            assert requested.usage is not None
            assert counted.input_tokens == requested.usage.input_tokens == len(prompt_ids(server))
            assert counted.object == "response.input_tokens"
            if "extra_body" not in fields:
                assert client.responses.input_tokens.count(**fields) == counted  # the model defaults to the server's
    num_submits = len(server.engine.submits)
    count(server, input="Hi", background=True, stream=True)
    assert len(server.engine.submits) == num_submits


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
        assert delete(server, id).json() == {"id": id, "object": "response", "deleted": True}
        for response in (get(server, id), get(server, f"{id}/input_items"), cancel(server, id), delete(server, id)):
            assert check_error(response, 404)["message"] == f"Response with id '{id}' not found."


def test_the_number_of_responses_that_are_kept(start_server: StartServer) -> None:
    server = start_server(max_stored_responses=2)
    ids = [ask_json(server)["id"] for _ in range(2)]
    assert get(server, ids[0]).status_code == 200  # which makes it the most recently used
    ids.append(ask_json(server)["id"])
    assert [get(server, each).status_code for each in ids] == [200, 404, 200]


def test_the_size_of_responses_that_are_kept(start_server: StartServer) -> None:
    """Event logs count as memory as well, and the oldest are dropped."""
    server = start_server(stored_responses_memory=24_000)
    num_kept = []
    for fields in ({}, {"background": True, "stream": True}):
        ids = []
        for _ in range(12):
            answer = ask(server, input="x" * 1500, **fields)
            ids.append(parse(answer.text)[-1]["response"]["id"] if fields else answer.json()["id"])
            assert 0 < server.response_store.num_bytes <= 24_000
        kept = [get(server, each).status_code == 200 for each in ids]
        assert kept == sorted(kept)
        num_kept.append(sum(kept))
    assert 1 < num_kept[1] < num_kept[0] < 12
    for each in ids:
        delete(server, each)
    assert server.response_store.num_bytes == 0


def test_input_items(server: RunningServer) -> None:
    items = [{"role": "user", "content": f"{index}", "id": f"msg_{index}"} for index in range(5)]
    response_id = ask_json(server, input=items)["id"]
    page = get(server, f"{response_id}/input_items").json()
    assert [item["content"] for item in page["data"]] == [[{"type": "input_text", "text": text}] for text in "43210"]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", "msg_4", "msg_0", False)
    page = get(server, f"{response_id}/input_items?order=asc&limit=2&after=msg_1").json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == (["msg_2", "msg_3"], True)
    for query in ("order=up", "limit=0", "limit=101", f"limit=0099{'9' * 5000}", "after=x"):
        error = check_error(get(server, f"{response_id}/input_items?{query}"), 400)
        assert error["param"] == query.partition("=")[0]


def test_what_is_answered_with(server: RunningServer) -> None:
    named = {"user": "me", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"k" * 64: "v" * 512}}
    response = ask(server, service_tier="ultrafast", temperature=0.5, **named)
    answer = response.json()
    assert {name: answer[name] for name in named} == named
    assert (answer["service_tier"], answer["temperature"]) == ("default", 0.5)
    assert "x-lightwell-warnings" not in response.headers
    assert get(server, answer["id"]).json() == answer
    assert ask_json(server, max_output_tokens=-1)["max_output_tokens"] is None


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


def test_a_response_in_the_background_is_cancelled(slow: RunningServer) -> None:
    response_id = ask_json(slow, background=True)["id"]
    assert cancel(slow, response_id).json()["status"] == "cancelled"
    wait_until(lambda: slow.engine.num_choices == 0 and not slow.context.background_tasks)
    response = get(slow, response_id).json()
    assert (response["status"], response["usage"]["output_tokens"] < 1000) == ("cancelled", True)
    assert cancel(slow, response_id).json() == response


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
    with httpx.stream("POST", slow.url + RESPONSES, json=MINIMAL | {"stream": True}, timeout=20) as response:
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


def test_what_has_ended_cannot_be_cancelled(server: RunningServer) -> None:
    error = check_error(cancel(server, ask_json(server)["id"]), 400)
    assert error["message"] == "Cannot cancel a synchronous response."


def test_a_stream_that_waits_has_begun(server: RunningServer, fake_engine: FakeEngine) -> None:
    def has_begun() -> bool:
        server.turn(MAX_HELD_SECONDS)
        return sent.done()

    fake_engine.pause()
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(1) as thread:
        request = client.build_request("POST", server.url + RESPONSES, json=MINIMAL | {"stream": True})
        sent = thread.submit(client.send, request, stream=True)
        wait_until(lambda: fake_engine.num_choices == 1)
        assert not sent.done()
        wait_until(has_begun)
        lines = (line.removeprefix("data: ") for line in sent.result().iter_lines() if line.startswith("data: "))
        created, in_progress = json.loads(next(lines)), json.loads(next(lines))
        assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
        assert cancel(server, created["response"]["id"]).json()["status"] == "cancelled"
        last = json.loads(next(lines))
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
        assert last["sequence_number"] == 2
        sent.result().close()
    wait_until(lambda: fake_engine.num_choices == 0)
