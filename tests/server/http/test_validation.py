"""Errors about invalid bodies: OpenAI's messages and codes, and the path of the field."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from server.http.error_handlers import from_validation_error
from server.http.validation import echo, format_path


class ContentPart(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class UserMessage(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Literal["user"]
    content: str | list[ContentPart]


class ToolMessage(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Literal["tool"]
    content: str
    tool_call_id: str


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    model: str
    messages: list[Annotated[UserMessage | ToolMessage, Field(discriminator="role")]] = Field(
        min_length=1, max_length=3
    )
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


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": ...}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
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
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "one of a string or an array",
            "an integer",
        ),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": None}]},
            "messages[0].tool_call_id",
            "a string",
            "null",
        ),
        ({"n": 1.5}, "n", "an integer", "a decimal number"),
        ({"n": True}, "n", "an integer", "a boolean"),
        ({"n": "1"}, "n", "an integer", "a string"),
        ({"prompt": [1, "a"]}, "prompt[0]", "a string", "an integer"),
        ({"prompt": {}}, "prompt", "one of a string or an array", "an object"),
        ({"effort": 3}, "effort", "one of 'low' or 'high'", "an integer"),
        ({"stream": "yes"}, "stream", "a boolean", "a string"),
        ({"bias": {"5": "x"}}, "bias.5", "a decimal", "a string"),
    ],
)
def test_wrong_types(fields: dict[str, Any], param: str, expected: str, got: str) -> None:
    message = f"Invalid type for '{param}': expected {expected}, but got {got} instead."
    assert problem(**fields) == (message, param, "invalid_type")


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        (
            {"messages": []},
            "empty_array",
            "empty array. Expected an array with minimum length 1, but got an empty array instead.",
        ),
        (
            {"messages": GOOD["messages"] * 4},
            "array_above_max_length",
            "array too long. Expected an array with maximum length 3, but got an array with length 4 instead.",
        ),
        (
            {"n": 130},
            "integer_above_max_value",
            "integer above maximum value. Expected a value <= 128, but got 130 instead.",
        ),
        ({"n": 0}, "integer_below_min_value", "integer below minimum value. Expected a value >= 1, but got 0 instead."),
        (
            {"temperature": 2.5},
            "decimal_above_max_value",
            "decimal above maximum value. Expected a value <= 2, but got 2.5 instead.",
        ),
        (
            {"temperature": -0.5},
            "decimal_below_min_value",
            "decimal below minimum value. Expected a value >= 0, but got -0.5 instead.",
        ),
        (
            {"stop": "123456"},
            "string_above_max_length",
            "string too long. Expected a string with maximum length 5, but got a string with length 6 instead.",
        ),
        (
            {"stop": ""},
            "empty_string",
            "empty string. Expected a string with minimum length 1, but got an empty string instead.",
        ),
        ({"even": 3}, "invalid_value", "expected an even number."),
    ],
)
def test_values_out_of_bounds(fields: dict[str, Any], code: str, message: str) -> None:
    (param,) = fields
    assert problem(**fields) == (f"Invalid '{param}': {message}", param, code)


def test_other_problems() -> None:
    assert problem(model=...) == ("you must provide a model parameter", None, None)
    assert problem(foo=1) == ("Unrecognized request argument supplied: foo", None, None)
    message = "Invalid value: 'x'. Supported values are: 'user', 'tool'."
    assert problem(messages=[{"role": "x", "content": ""}]) == (message, "messages[0].role", "invalid_value")
    message = "Invalid value: 'medium'. Supported values are: 'low' or 'high'."
    assert problem(effort="medium") == (message, "effort", "invalid_value")
    message, param, code = problem(name="A b")
    assert (param, code) == ("name", "invalid_value")
    assert "^[a-z]+$" in message
    assert problem(model=5, n=0)[1] == "model"  # the first wrong field


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_floats_that_are_no_numbers(value: float) -> None:
    message, param, code = problem(temperature=value)
    assert (param, code) == ("temperature", "invalid_value") or code == "decimal_above_max_value"
    assert message.startswith("Invalid 'temperature'")


def test_what_is_repeated_is_short() -> None:
    message, param, _ = problem(effort="x" * 10_000)
    assert param == "effort"
    assert len(message) < 200
    assert len(problem(n=10**3000)[0]) < 200
    assert len(problem(**{"k" * 10_000: 1})[0]) < 300
    assert echo("'") == '"\'"'


@pytest.mark.parametrize(
    ("path", "text"), [(["a", 0, "b"], "a[0].b"), ([], ""), (["a", 1, 2], "a[1][2]"), (["a"], "a")]
)
def test_paths(path: list[int | str], text: str) -> None:
    assert format_path(path) == text
