"""The envelopes, and the status, code and message of each error."""

import inspect
import json

import pytest

from server.http import errors
from server.http.errors import (
    APIError,
    BadRequestError,
    BodyTooLargeError,
    ContextLengthExceededError,
    EngineDeadError,
    EngineUnavailableError,
    InvalidTypeError,
    MissingParameterError,
    ModelNotFoundError,
    QueueFullError,
    ServerError,
    UnauthorizedError,
    UnsupportedParameterError,
)
from server.http.sse import error_event
from tests.support.serving import check_envelope


def test_the_body_always_has_four_keys() -> None:
    body = json.loads(APIError(418, "short").body())
    assert body == {"error": {"message": "short", "type": "invalid_request_error", "param": None, "code": None}}


@pytest.mark.checklist("A04")
def test_a_message_that_utf8_cannot_encode_is_sent_with_replacements() -> None:
    assert check_envelope(APIError(400, "a\ud800b").body())["message"] == "a?b"


def test_context_length_in_openais_wording() -> None:
    alone = ContextLengthExceededError(4097, 4294)
    assert alone.message == (
        "This model's maximum context length is 4097 tokens. However, your messages resulted in 4294 tokens. "
        "Please reduce the length of the messages."
    )
    together = ContextLengthExceededError(4097, 3120, 1000)
    assert together.message == (
        "This model's maximum context length is 4097 tokens. However, you requested 4120 tokens (3120 in the messages, "
        "1000 in the completion). Please reduce the length of the messages or completion."
    )
    assert (alone.code, alone.param) == ("context_length_exceeded", "messages")
    assert ContextLengthExceededError(1, 2, noun="prompt").param == "prompt"
    assert (
        "your messages resulted in at least 4294 tokens." in ContextLengthExceededError(7, 4294, at_least=True).message
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ContextLengthExceededError(4097, 4294), "prompt is too long: 4294 tokens > 4097 maximum"),
        (
            ContextLengthExceededError(4097, 4294, at_least=True),
            "prompt is too long: at least 4294 tokens > 4097 maximum",
        ),
        (
            ContextLengthExceededError(4097, 3120, 1000),
            "input length and `max_tokens` exceed context limit: 3120 + 1000 > 4097, decrease input length or "
            "`max_tokens` and try again",
        ),
        (BadRequestError("Not so.", param="tools[0].type"), "tools[0].type: Not so."),
        (
            InvalidTypeError("n", "an integer", "null"),
            "Invalid type for 'n': expected an integer, but got null instead.",
        ),
        (APIError(400, "a\ud800b"), "a?b"),
    ],
)
def test_anthropics_envelope(error: APIError, message: str) -> None:
    body = json.loads(error.anthropic_body("req_1"))
    assert body == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": message},
        "request_id": "req_1",
    }


@pytest.mark.parametrize(
    ("error", "status", "type_", "code", "param"),
    [
        (MissingParameterError("model"), 400, "invalid_request_error", None, None),
        (
            MissingParameterError("messages"),
            400,
            "invalid_request_error",
            "missing_required_parameter",
            "messages",
        ),
        (InvalidTypeError("n", "an integer", "null"), 400, "invalid_request_error", "invalid_type", "n"),
        (UnsupportedParameterError("tools"), 400, "invalid_request_error", "unsupported_parameter", "tools"),
        (UnauthorizedError(key_given=False), 401, "invalid_request_error", None, None),
        (UnauthorizedError(key_given=True), 401, "invalid_request_error", "invalid_api_key", None),
        (ModelNotFoundError("m"), 404, "invalid_request_error", "model_not_found", "model"),
        (BodyTooLargeError(1), 413, "invalid_request_error", "request_too_large", None),
        (QueueFullError(5), 429, "rate_limit_error", "rate_limit_exceeded", None),
        (ServerError("r"), 500, "server_error", None, None),
        (EngineUnavailableError("x"), 503, "service_unavailable_error", "engine_unavailable", None),
        (EngineDeadError(), 503, "service_unavailable_error", "engine_unavailable", None),
    ],
)
def test_status_type_code_and_param(
    error: APIError, status: int, type_: str, code: str | None, param: str | None
) -> None:
    assert (error.status, error.type, error.code, error.param) == (status, type_, code, param)
    assert check_envelope(error.body())["message"] == error.message
    if status in (429, 503):
        assert 1 <= int(error.headers["retry-after"]) <= 60


def test_a_wrong_model_names_those_there_are() -> None:
    assert ModelNotFoundError("m", ["a", "b"]).message == (
        "The model `m` does not exist or you do not have access to it. Available models: `a`, `b`."
    )
    many = ModelNotFoundError("m", [f"model-{i}" for i in range(10)]).message
    assert many.endswith("`model-6`, `model-7` and 2 more.")


def test_a_401_says_how_to_send_a_key() -> None:
    for key_given in (False, True):
        message = UnauthorizedError(key_given=key_given).message
        assert "Authorization: Bearer YOUR_KEY" in message
        assert "x-api-key" in message


@pytest.mark.checklist("G10")
@pytest.mark.parametrize(("seconds", "header"), [(0, "1"), (-5, "1"), (0.4, "1"), (17.4, "17"), (1e9, "60")])
def test_retry_after_is_one_to_sixty_whole_seconds(seconds: float, header: str) -> None:
    assert QueueFullError(seconds).headers["retry-after"] == header


def test_a_failed_stream_ends_with_the_error_and_done() -> None:
    first, second, end = error_event(EngineDeadError()).split(b"\n\n")
    check_envelope(first.removeprefix(b"data: "))
    assert second == b"data: [DONE]"
    assert end == b""


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = {word for word in (errors.__doc__ or "").split() if word.endswith("Error")}
    defined = {name for name, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, APIError)}
    assert drawn == defined
