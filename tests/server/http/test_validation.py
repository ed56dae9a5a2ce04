"""Errors about invalid bodies: OpenAI's messages and codes, and the path of the field."""

import math
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from server.http.error_handlers import from_validation_error


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class ContentPart(Strict):
    type: Literal["text"]
    text: str


class UserMessage(Strict):
    role: Literal["user"]
    content: str | list[ContentPart]


class ToolMessage(Strict):
    role: Literal["tool"]
    tool_call_id: str


Message = Annotated[UserMessage | ToolMessage, Field(discriminator="role")]


class Body(Strict):
    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[Message] = Field(min_length=1, max_length=3)
    n: int | None = Field(None, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    stop: Annotated[str, Field(min_length=1, max_length=5)] | None = None
    prompt: str | list[str] | list[int] | None = None
    effort: Literal["low", "high"] | None = None
    stream: bool | None = None
    bias: dict[str, float] | None = None
    even: int | None = None
    name: str | None = Field(None, pattern="^[a-z]+$")

    @field_validator("even")
    @classmethod
    def _check_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("expected an even number.")
        return value


GOOD: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def problem(**fields: Any) -> tuple[str, str | None, str | None]:
    """Return message, param and code of the error for a valid body with these fields changed."""
    body = {key: value for key, value in (GOOD | fields).items() if value is not ...}
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    error = from_validation_error(errors, body)
    assert error.status == 400
    assert error.type == "invalid_request_error"
    return error.message, error.param, error.code


def messages(**message: Any) -> dict[str, Any]:
    return {"messages": [message]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": ...}, "messages"),
        (messages(role="user"), "messages[0].content"),
        (messages(content="x"), "messages[0].role"),
        (messages(role="user", content=[{"type": "text"}]), "messages[0].content[0].text"),
    ],
)
def test_what_is_missing(fields: dict[str, Any], param: str) -> None:
    message = f"Missing required parameter: '{param}'."
    assert problem(**fields) == (message, param, "missing_required_parameter")


@pytest.mark.parametrize(
    ("fields", "param", "expected", "got"),
    [
        ({"messages": "x"}, "messages", "an array", "a string"),
        ({"messages": ["x"]}, "messages[0]", "an object", "a string"),
        (messages(role="user", content=5), "messages[0].content", "one of a string or an array", "an integer"),
        (messages(role="tool", tool_call_id=None), "messages[0].tool_call_id", "a string", "null"),
        ({"n": 1.5}, "n", "an integer", "a decimal number"),
        ({"n": True}, "n", "an integer", "a boolean"),
        ({"n": "1"}, "n", "an integer", "a string"),
        ({"prompt": [1, "a"]}, "prompt[0]", "a string", "an integer"),
        ({"prompt": {}}, "prompt", "one of a string or an array", "an object"),
        ({"effort": 3}, "effort", "one of 'low' or 'high'", "an integer"),
        ({"stream": "yes"}, "stream", "a boolean", "a string"),
        ({"bias": {"5": "x"}}, "bias.5", "a decimal", "a string"),
        ({"bias": [1]}, "bias", "an object", "an array"),
    ],
)
def test_wrong_types(fields: dict[str, Any], param: str, expected: str, got: str) -> None:
    message = f"Invalid type for '{param}': expected {expected}, but got {got} instead."
    assert problem(**fields) == (message, param, "invalid_type")


@pytest.mark.parametrize(
    ("param", "value", "code", "what", "expected", "got"),
    [
        ("messages", [], "empty_array", "empty array", "an array with minimum length 1", "an empty array"),
        ("stop", "", "empty_string", "empty string", "a string with minimum length 1", "an empty string"),
        ("n", 130, "integer_above_max_value", "integer above maximum value", "a value <= 128", "130"),
        ("n", 0, "integer_below_min_value", "integer below minimum value", "a value >= 1", "0"),
        ("temperature", 2.5, "decimal_above_max_value", "decimal above maximum value", "a value <= 2", "2.5"),
        ("temperature", -0.5, "decimal_below_min_value", "decimal below minimum value", "a value >= 0", "-0.5"),
    ],
)
def test_values_out_of_bounds(param: str, value: Any, code: str, what: str, expected: str, got: str) -> None:
    message = f"Invalid '{param}': {what}. Expected {expected}, but got {got} instead."
    assert problem(**{param: value}) == (message, param, code)


def test_what_is_too_long() -> None:
    for param, value, a, noun, most in (
        ("messages", ["x"] * 4, "an", "array", 3),
        ("stop", "123456", "a", "string", 5),
    ):
        expected = (
            f"Expected {a} {noun} with maximum length {most}, but got {a} {noun} with length {len(value)} instead."
        )
        message = f"Invalid '{param}': {noun} too long. {expected}"
        assert problem(**{param: value}) == (message, param, f"{noun}_above_max_length")


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"model": ...}, None, None, "you must provide a model parameter"),
        ({"model": 5, "n": 0}, "model", "invalid_type", "Invalid type for 'model'"),  # the first wrong field
        ({"foo": 1}, None, None, "Unrecognized request argument supplied: foo"),
        ({"even": 3}, "even", "invalid_value", "Invalid 'even': expected an even number."),
        (messages(role="x"), "messages[0].role", "invalid_value", "Invalid value: 'x'. Supported values are: 'user'"),
        ({"effort": "some"}, "effort", "invalid_value", "Invalid value: 'some'. Supported values are: 'low'"),
        ({"effort": "'"}, "effort", "invalid_value", """Invalid value: "'"."""),
        ({"name": "A b"}, "name", "invalid_value", "Invalid 'name': string does not match pattern."),
        ({"temperature": math.nan}, "temperature", "invalid_value", "Invalid 'temperature'"),
        ({"temperature": math.inf}, "temperature", "invalid_value", "Invalid 'temperature'"),
    ],
)
def test_other_problems(fields: dict[str, Any], param: str | None, code: str | None, message: str) -> None:
    found = problem(**fields)
    assert found[0].startswith(message)
    assert found[1:] == (param, code)


@pytest.mark.parametrize(
    "fields", [{"effort": "x" * 10_000}, {"n": 10**3000}, {"k" * 10_000: 1}], ids=["text", "number", "name"]
)
def test_what_is_repeated_is_short(fields: dict[str, Any]) -> None:
    assert len(problem(**fields)[0]) < 300
