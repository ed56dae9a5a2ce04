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
    ("fields", "message", "param", "code"),
    [
        ({"model": ...}, "you must provide a model parameter", None, None),
        ({"messages": ...}, "Missing required parameter: 'messages'.", "messages", "missing_required_parameter"),
        (
            {"messages": [{"role": "user"}]},
            "Missing required parameter: 'messages[0].content'.",
            "messages[0].content",
            "missing_required_parameter",
        ),
        (
            {"messages": [{"content": "x"}]},
            "Missing required parameter: 'messages[0].role'.",
            "messages[0].role",
            "missing_required_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "Missing required parameter: 'messages[0].content[0].text'.",
            "messages[0].content[0].text",
            "missing_required_parameter",
        ),
        (
            {"messages": []},
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
            "messages",
            "empty_array",
        ),
        (
            {"messages": GOOD["messages"] * 4},
            "Invalid 'messages': array too long. Expected an array with maximum length 3, but got an array with length "
            "4 instead.",
            "messages",
            "array_above_max_length",
        ),
        (
            {"messages": "x"},
            "Invalid type for 'messages': expected an array, but got a string instead.",
            "messages",
            "invalid_type",
        ),
        (
            {"messages": ["x"]},
            "Invalid type for 'messages[0]': expected an object, but got a string instead.",
            "messages[0]",
            "invalid_type",
        ),
        (
            {"messages": [{"role": "x", "content": ""}]},
            "Invalid value: 'x'. Supported values are: 'user', 'tool'.",
            "messages[0].role",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "Invalid type for 'messages[0].content': expected one of a string or an array, but got an integer instead.",
            "messages[0].content",
            "invalid_type",
        ),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": None}]},
            "Invalid type for 'messages[0].tool_call_id': expected a string, but got null instead.",
            "messages[0].tool_call_id",
            "invalid_type",
        ),
        (
            {"n": 130},
            "Invalid 'n': integer above maximum value. Expected a value <= 128, but got 130 instead.",
            "n",
            "integer_above_max_value",
        ),
        (
            {"n": 0},
            "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead.",
            "n",
            "integer_below_min_value",
        ),
        (
            {"n": 1.5},
            "Invalid type for 'n': expected an integer, but got a decimal number instead.",
            "n",
            "invalid_type",
        ),
        ({"n": True}, "Invalid type for 'n': expected an integer, but got a boolean instead.", "n", "invalid_type"),
        ({"n": "1"}, "Invalid type for 'n': expected an integer, but got a string instead.", "n", "invalid_type"),
        (
            {"temperature": 2.5},
            "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 2.5 instead.",
            "temperature",
            "decimal_above_max_value",
        ),
        (
            {"temperature": -0.5},
            "Invalid 'temperature': decimal below minimum value. Expected a value >= 0, but got -0.5 instead.",
            "temperature",
            "decimal_below_min_value",
        ),
        (
            {"stop": "123456"},
            "Invalid 'stop': string too long. Expected a string with maximum length 5, but got a string with length 6 "
            "instead.",
            "stop",
            "string_above_max_length",
        ),
        (
            {"stop": ""},
            "Invalid 'stop': empty string. Expected a string with minimum length 1, but got an empty string instead.",
            "stop",
            "empty_string",
        ),
        (
            {"prompt": [1, "a"]},
            "Invalid type for 'prompt[0]': expected a string, but got an integer instead.",
            "prompt[0]",
            "invalid_type",
        ),
        (
            {"prompt": {}},
            "Invalid type for 'prompt': expected one of a string or an array, but got an object instead.",
            "prompt",
            "invalid_type",
        ),
        (
            {"effort": "medium"},
            "Invalid value: 'medium'. Supported values are: 'low' or 'high'.",
            "effort",
            "invalid_value",
        ),
        (
            {"effort": 3},
            "Invalid type for 'effort': expected one of 'low' or 'high', but got an integer instead.",
            "effort",
            "invalid_type",
        ),
        (
            {"stream": "yes"},
            "Invalid type for 'stream': expected a boolean, but got a string instead.",
            "stream",
            "invalid_type",
        ),
        (
            {"bias": {"5": "x"}},
            "Invalid type for 'bias.5': expected a decimal, but got a string instead.",
            "bias.5",
            "invalid_type",
        ),
        ({"even": 3}, "Invalid 'even': expected an even number.", "even", "invalid_value"),
        ({"foo": 1}, "Unrecognized request argument supplied: foo", None, None),
    ],
)
def test_words_and_codes(fields: dict[str, Any], message: str, param: str | None, code: str | None) -> None:
    assert problem(**fields) == (message, param, code)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_floats_that_are_no_numbers(value: float) -> None:
    message, param, code = problem(temperature=value)
    assert (param, code) == ("temperature", "invalid_value") or code == "decimal_above_max_value"
    assert message.startswith("Invalid 'temperature'")


def test_the_first_wrong_field_is_named() -> None:
    assert problem(model=5, n=0)[1] == "model"


def test_what_is_repeated_is_short() -> None:
    message, param, _ = problem(effort="x" * 10_000)
    assert param == "effort"
    assert len(message) < 200
    assert len(problem(n=10**3000)[0]) < 200
    assert len(problem(**{"k" * 10_000: 1})[0]) < 300
    assert echo("'") == '"\'"'


def test_patterns() -> None:
    message, param, code = problem(name="A b")
    assert (param, code) == ("name", "invalid_value")
    assert "^[a-z]+$" in message


@pytest.mark.parametrize(
    ("path", "text"), [(["a", 0, "b"], "a[0].b"), ([], ""), (["a", 1, 2], "a[1][2]"), (["a"], "a")]
)
def test_paths(path: list[int | str], text: str) -> None:
    assert format_path(path) == text
