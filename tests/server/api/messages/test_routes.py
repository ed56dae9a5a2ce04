"""`POST /v1/messages` over real sockets, with a fake engine: tokens are bytes, the template is ChatML."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic.types import Message

from server.tenants import Tenant
from tests.server.conftest import StartServer
from tests.support.clients import shared_server
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer
from tests.support.tiny_tokenizer_model import chatml

PATH = "/v1/messages"
REPLY = "Hello, world!"
MINIMAL: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def tiny(model_folder: Path) -> Iterator[RunningServer]:
    with shared_server(model_folder) as server:
        yield server


def ask(url: str, path: str = PATH, **fields: Any) -> httpx.Response:
    return httpx.post(url + path, json={k: v for k, v in (MINIMAL | fields).items() if v is not ...})


def ask_json(url: str, **fields: Any) -> dict[str, Any]:
    response = ask(url, **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ask_events(url: str, **fields: Any) -> list[dict[str, Any]]:
    response = ask(url, stream=True, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return parse(response.text)


def parse(text: str) -> list[dict[str, Any]]:
    """Return the data of the events, whose names must equal their types."""
    *events, rest = text.split("\n\n")
    assert rest == ""
    parsed = []
    for event in events:
        name, data = event.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
    return parsed


def error_of(response: httpx.Response, status: int) -> tuple[str, str]:
    """Return type and message of an error in Anthropic's format."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["type", "error", "request_id"]
    assert body["type"] == "error"
    assert list(body["error"]) == ["type", "message"]
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    return body["error"]["type"], body["error"]["message"]


# The answer.


def test_schema_of_the_answer(tiny: RunningServer) -> None:
    response = ask(tiny.url, max_tokens=5)
    answer = response.json()
    Message.model_validate(answer, strict=True)
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "Hello", "citations": None}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(chatml(("user", "Hi"))),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 5,
        },
    }
    assert response.headers["request-id"] == response.headers["x-request-id"]


def test_events_of_a_stream(tiny: RunningServer) -> None:
    num_prompt_tokens = len(chatml(("user", "Hi")))
    start, first, *deltas, last, message_delta, stop = ask_events(tiny.url)
    message = start["message"]
    assert (message["content"], message["stop_reason"], message["usage"]["input_tokens"]) == (
        [],
        None,
        num_prompt_tokens,
    )
    assert message["id"].startswith("msg_")
    block = {"type": "text", "text": "", "citations": None}
    assert first == {"type": "content_block_start", "index": 0, "content_block": block}
    assert {(event["type"], event["index"], event["delta"]["type"]) for event in deltas} == {
        ("content_block_delta", 0, "text_delta")
    }
    assert "".join(event["delta"]["text"] for event in deltas) == REPLY
    assert last == {"type": "content_block_stop", "index": 0}
    assert message_delta == {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": {
            "input_tokens": num_prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": len(REPLY) + 1,
        },
    }
    assert stop == {"type": "message_stop"}


def test_an_answer_without_text(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.reply = []
    assert ask_json(server.url)["content"] == []
    assert [event["type"] for event in ask_events(server.url)] == ["message_start", "message_delta", "message_stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_reasons(tiny: RunningServer, stream: bool) -> None:
    for fields, expected in (
        ({}, ("end_turn", None)),
        ({"max_tokens": 3}, ("max_tokens", None)),
        ({"stop_sequences": ["zz", "wor"]}, ("stop_sequence", "wor")),
        ({"stop_sequences": []}, ("end_turn", None)),
    ):
        end = ask_events(tiny.url, **fields)[-2]["delta"] if stream else ask_json(tiny.url, **fields)
        assert (end["stop_reason"], end["stop_sequence"]) == expected


def test_cached_tokens_are_no_input_tokens(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.num_cached_tokens = 7
    for usage in (ask_json(server.url)["usage"], ask_events(server.url)[0]["message"]["usage"]):
        assert usage["cache_read_input_tokens"] == 7
        assert usage["input_tokens"] == len(chatml(("user", "Hi"))) - 7


# The request.


@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        ({"system": "S"}, [("system", "S"), ("user", "Hi")]),
        (
            {"system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}]},
            [("system", "S"), ("user", "Hi")],
        ),
        ({"system": ""}, [("user", "Hi")]),
        (
            {"messages": [("user", "A"), ("assistant", "B"), ("user", "C")]},
            [("user", "A"), ("assistant", "B"), ("user", "C")],
        ),
        ({"messages": [("user", "A"), ("user", "B")]}, [("user", "A\nB")]),
        (
            {"messages": [("user", [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}])]},
            [("user", "A\nB")],
        ),
        (
            {
                "messages": [
                    ("user", "A"),
                    (
                        "assistant",
                        [
                            {"type": "redacted_thinking", "data": "x"},
                            {"type": "text", "text": "B"},
                        ],
                    ),
                    ("user", [{"type": "text", "text": "C", "citations": None}]),
                ]
            },
            [("user", "A"), ("assistant", "B"), ("user", "C")],
        ),
    ],
)
def test_prompts(tiny: RunningServer, fields: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    if "messages" in fields:
        fields = {"messages": [{"role": role, "content": content} for role, content in fields["messages"]]}
    ask_json(tiny.url, **fields)
    assert tiny.engine.submits[-1].prompt_token_ids == chatml(*turns)
    response = ask(tiny.url, f"{PATH}/count_tokens", max_tokens=..., **fields)
    assert response.json() == {"input_tokens": len(chatml(*turns))}


def test_an_answer_that_was_begun(tiny: RunningServer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    assert ask_json(tiny.url, messages=messages)["content"][0]["text"] == REPLY
    assert tiny.engine.submits[-1].prompt_token_ids == [*chatml(("user", "Hi")), *b"Hel"]


def test_parameters_reach_the_engine(tiny: RunningServer) -> None:
    ask_json(tiny.url, temperature=0.5, top_p=0.9, top_k=5, max_tokens=7, min_p=0.1, seed=3, metadata={"user_id": "x"})
    params = tiny.engine.submits[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 5, 7)
    assert (params.min_p, params.seed) == (0.1, 3)


def test_unknown_fields_are_reported(tiny: RunningServer, start_server: StartServer) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi", "mood": 1}]}]
    response = ask(tiny.url, messages=messages, wish=2)
    warnings = "ignored parameters: wish, messages[].content[].mood"
    assert (response.status_code, response.headers["x-lightwell-warnings"]) == (200, warnings)
    counted = ask(tiny.url, f"{PATH}/count_tokens", max_tokens=..., messages=messages, wish=2)
    assert counted.headers["x-lightwell-warnings"] == warnings
    _, message = error_of(ask(tiny.url, f"{PATH}/count_tokens", n=2), 400)
    assert message == "Unsupported parameter: 'n' is not supported yet. It is a parameter of /v1/chat/completions."
    strict = start_server(strict=True)
    for path in (PATH, f"{PATH}/count_tokens"):
        message = "Unrecognized request argument supplied: wish"
        assert error_of(ask(strict.url, path, wish=2), 400) == ("invalid_request_error", message)


def test_a_whole_request_is_counted(tiny: RunningServer, start_server: StartServer) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 5,
        "stream": True,
        "temperature": 0.5,
        "stop_sequences": ["x"],
        "metadata": {},
    }
    for server in (tiny, start_server(strict=True)):
        response = ask(server.url, f"{PATH}/count_tokens", **fields)
        assert response.json() == {"input_tokens": len(chatml(("user", "Hi")))}
        assert "x-lightwell-warnings" not in response.headers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": ...}, "Missing required parameter: 'max_tokens'."),
        ({"messages": ...}, "Missing required parameter: 'messages'."),
        ({"max_tokens": 0}, "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0"),
        ({"temperature": 1.5}, "Invalid 'temperature': decimal above maximum value. Expected a value <= 1"),
        ({"temperature": "1"}, "Invalid type for 'temperature'"),
        ({"stop_sequences": "x"}, "Invalid type for 'stop_sequences': expected an array"),
        ({"min_p": 2}, "Invalid 'min_p'"),
        ({"n": 2}, "Unsupported parameter: 'n' is not supported yet."),
        ({"return_token_ids": True}, "Unsupported parameter: 'return_token_ids'"),
        ({"system": 5}, "Invalid type for 'system'"),
        ({"system": [{"type": "image"}]}, "system[0].type: Invalid value: 'image'. Supported values are: 'text'."),
        ({"messages": []}, "Invalid 'messages': empty array"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: Invalid value: 'tool'. Supported values"),
        ({"messages": [{"role": "user"}]}, "Missing required parameter: 'messages[0].content'."),
        ({"messages": [{"role": "user", "content": []}]}, "Invalid 'messages[0].content': empty array"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0].type: Invalid value: 'image'. Supported values",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "Missing required parameter: 'messages[0].content[0].tool_use_id'.",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "x", "input": {}}]}
                ]
            },
            "Invalid 'messages': the last message calls tools",
        ),
        ({"tool_choice": {"type": "tool"}}, "Missing required parameter: 'tool_choice.name'."),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type: Invalid value: 'some'. Supported values are: 'auto'"),
        ({"tool_choice": {"type": "any"}}, "Invalid 'tool_choice': only allowed when 'tools' are given."),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "Invalid 'tool_choice': only allowed when 'tools' are given."),
        ({"thinking": {"type": "perhaps"}}, "thinking.type: Invalid value: 'perhaps'."),
        ({"thinking": {"type": "enabled"}}, "Missing required parameter: 'thinking.budget_tokens'."),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 100}},
            "`max_tokens` must be greater than `thinking.budget_tokens`.",
        ),
    ],
)
def test_invalid_requests(tiny: RunningServer, fields: dict[str, Any], message: str) -> None:
    kind, text = error_of(ask(tiny.url, **fields), 400)
    assert kind == "invalid_request_error"
    assert text.startswith(message), text


# Under this path all errors have Anthropic's format.


def test_errors_from_everywhere(start_server: StartServer) -> None:
    server = start_server(api_key=("key",), max_body_size=2000)
    url, key = server.url + PATH, {"x-api-key": "key"}
    answers = {
        "authentication_error": (httpx.post(url, json=MINIMAL), 401),
        "request_too_large": (httpx.post(url, json=MINIMAL | {"system": "x" * 2000}, headers=key), 413),
    }
    for kind, (response, status) in answers.items():
        assert error_of(response, status)[0] == kind
    assert error_of(httpx.post(url, json=MINIMAL | {"model": "x"}, headers=key), 404) == (
        "not_found_error",
        "The model `x` does not exist or you do not have access to it. Available models: `tiny`, `org/tiny`.",
    )
    assert error_of(httpx.get(url, headers=key), 405)[0] == "invalid_request_error"
    assert error_of(httpx.post(f"{url}/batches", json={}, headers=key), 404)[0] == "not_found_error"
    assert error_of(httpx.post(url, content=b"{", headers=key | {"content-type": "application/json"}), 400)
    assert error_of(httpx.post(url, content=b"{}", headers=key), 415)[0] == "invalid_request_error"
    version = {"anthropic-version": "2023-06-01"}
    assert error_of(httpx.get(f"{server.url}/v1/models/x", headers=key | version), 404)[0] == "not_found_error"
    for other in ("/v1/messages2", "/v1/models/x"):
        assert "param" in httpx.get(server.url + other, headers=key).json()["error"]


def test_a_failure(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.fail_request = True
    kind, message = error_of(ask(server.url), 500)
    assert kind == "api_error"
    assert "secret" not in message
    (event,) = parse(ask(server.url, stream=True).text)
    assert (event["type"], event["error"]["type"], set(event)) == ("error", "api_error", {"type", "error"})


def test_a_full_queue(start_server: StartServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.max_num_seqs = 1
    server = start_server(max_queued_requests=1)
    with server.model.client.reserve(2, tenant=Tenant(name="127.0.0.1")):
        response = ask(server.url)
    assert error_of(response, 429)[0] == "rate_limit_error"
    assert response.headers["retry-after"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "key"}, 200),
        ({"authorization": "Bearer key"}, 200),
        ({"x-api-key": "wrong", "authorization": "Bearer key"}, 200),
        ({"x-api-key": "key", "authorization": "Bearer wrong"}, 200),
        ({"x-api-key": "wrong"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "Bearer key"}, 401),
        ({}, 401),
    ],
)
def test_keys(start_server: StartServer, headers: dict[str, str], status: int) -> None:
    url = start_server(api_key=("key",)).url
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
    assert httpx.post(url + PATH, json=MINIMAL, headers=headers).status_code == status


def test_two_keys_of_one_kind_are_none(start_server: StartServer) -> None:
    url = start_server(api_key=("key",)).url
    headers = [("x-api-key", "key"), ("x-api-key", "key")]
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401


# Models.


def test_models_in_this_form(tiny: RunningServer) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    page = httpx.get(f"{tiny.url}/v1/models", headers=headers).json()
    assert page["has_more"] is False
    assert [page["first_id"], page["last_id"]] == [page["data"][0]["id"], page["data"][-1]["id"]]
    model = httpx.get(f"{tiny.url}/v1/models/tiny", headers=headers).json()
    assert model in page["data"]
    assert (model["type"], model["display_name"], model["max_input_tokens"]) == ("model", "tiny", 2048)
    assert "object" in httpx.get(f"{tiny.url}/v1/models/tiny").json()
