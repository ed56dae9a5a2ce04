"""The envelopes, the message of each error, and what the framework refuses over real sockets."""

import json

import httpx
import pytest

from server.http import errors
from server.http.errors import APIError
from server.parts.messages.writer import error_body
from tests.support.serving import RunningServer, check_envelope, check_error


@pytest.mark.checklist("A04")
@pytest.mark.parametrize(
    ("error", "message", "for_anthropic"),
    [
        (
            errors.ContextLengthExceededError(4097, 4294),
            "This model's maximum context length is 4097 tokens. However, your messages resulted in 4294 tokens. "
            "Please reduce the length of the messages.",
            "prompt is too long: 4294 tokens > 4097 maximum",
        ),
        (
            errors.ContextLengthExceededError(4097, 3120, 1000),
            "This model's maximum context length is 4097 tokens. However, you requested 4120 tokens "
            "(3120 in the messages, 1000 in the completion). Please reduce the length of the messages or completion.",
            "input length and `max_tokens` exceed context limit: 3120 + 1000 > 4097, decrease input length or "
            "`max_tokens` and try again",
        ),
        (errors.BadRequestError("Not so.", param="tools[0].type"), "Not so.", "tools[0].type: Not so."),
        (errors.InvalidTypeError("n", "an integer", "null"), *["Invalid type for 'n': expected an integer, but"] * 2),
        (APIError(400, "a\ud800b"), *["a?b"] * 2),  # UTF-8 cannot encode it
    ],
)
def test_messages_in_the_words_of_openai_and_anthropic(error: APIError, message: str, for_anthropic: str) -> None:
    assert check_envelope(error.body())["message"].startswith(message)
    body = json.loads(error_body(error, "req_1"))
    assert (body.keys(), body["type"], body["request_id"]) == ({"type", "error", "request_id"}, "error", "req_1")
    assert (body["error"].keys(), body["error"]["type"]) == ({"type", "message"}, "invalid_request_error")
    assert body["error"]["message"].startswith(for_anthropic)


def test_a_wrong_model_names_the_first_that_there_are() -> None:
    many = errors.ModelNotFoundError("m", [f"model-{i}" for i in range(10)]).message
    assert many.startswith("The model `m` does not exist or you do not have access to it. Available models: `model-0`,")
    assert many.endswith("`model-6`, `model-7` and 2 more.")


@pytest.mark.checklist("G10")
@pytest.mark.parametrize(("seconds", "header"), [(0, "1"), (-5, "1"), (0.4, "1"), (17.4, "17"), (1e9, "60")])
def test_retry_after_is_one_to_sixty_whole_seconds(seconds: float, header: str) -> None:
    assert errors.QueueFullError(seconds).headers["retry-after"] == header


@pytest.mark.checklist("A13")
def test_methods_that_a_route_does_not_have(server: RunningServer) -> None:
    for method, path, allowed, hint in (
        ("GET", "/v1/completions", "POST", "POST"),
        ("PUT", "/v1/responses/resp_1", "GET, DELETE", "GET or DELETE"),  # one route for each method
        ("DELETE", "/v1/models/tiny", "GET", "GET"),
    ):
        response = httpx.request(method, server.url + path)
        assert f"(HINT: Use {hint}.)" in check_error(response, 405)["message"]
        assert response.headers["allow"] == allowed
    assert httpx.head(server.url + "/v1/models").status_code == 405


@pytest.mark.checklist("A13")
@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/openai/v1/embeddings", "/v1/embeddings"),
        ("//v1/completions", "/v1/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/metrics", "/metrics"),
        ("/v1/api/tags", "/api/tags"),
        ("/v2/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/completion", "/v1/completions"),
        ("/v1/", "/v1/models"),
        ("/api", "/api/tags"),
        ("/v1/realtime", None),
        ("/x" + "x" * 5000, None),
    ],
)
def test_a_wrong_base_url_or_path_is_recognised(server: RunningServer, path: str, meant: str | None) -> None:
    """A suggested path exists: it gets another answer than 404. What follows the path is not repeated."""
    error = check_error(httpx.post(f"{server.url}{path}?key=secret", json={}), 404)
    hint = f". (HINT: Did you mean {meant}?)" if meant else ""
    repeated = path if len(path) < 99 else path[:128] + "..."
    assert (error["message"], error["code"]) == (f"Invalid URL (POST {repeated}){hint}", None)
    if meant:
        assert httpx.post(server.url + meant, json={}).status_code in (400, 405)
