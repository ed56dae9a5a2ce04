"""Bodies that are no JSON, or not that of a request: what is rejected, with which message, and how fast."""

import json
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from server.http.errors import BadRequestError, InvalidJSONError, InvalidValueError
from server.http.strict_json import MAX_DEPTH, MAX_ELEMENTS, MAX_FIELDS, MAX_NODES, describe_size, parse_json_object
from server.http.validation import from_validation_error
from tests.support.serving import RunningServer, check_error

INVALID = [
    *(b"", b"   ", b"{", b'{"a":1', b'{"a":1}x', b'{"a":1,}', b"{'a': 1}", b"hello"),
    *(b"[1]", b'"x"', b"5", b"null"),
    *(b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e999}', b'{"a":-1e999}', b'{"a":01}', b'{"a":' + b"9" * 100_000 + b"}"),
    *(b'{"a":"\n"}', b'{"a":"\xff"}', b'{"\xff":1}', b'{"a":"\xed\xa0\x80"}'),  # the last one: a surrogate in UTF-8
    *('{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32"), b"\xef\xbb\xbf{}"),
]


@pytest.mark.checklist("A01", "A02", "A03", "A05")
def test_refused_in_openais_words(server: RunningServer) -> None:
    for body in INVALID:
        answer = httpx.post(server.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
        error = check_error(answer, 400)
        assert error["message"].startswith("We could not parse the JSON body of your request."), body[:20]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", None, None)


@pytest.mark.checklist("A04")
@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt":"\\ud800"}', "prompt"),
        (b'{"messages":[{"content":"a"},{"content":"x\\udfffy"}]}', "messages[1].content"),
        (b'{"stop":["ok","\\uD83d"]}', "stop[1]"),
        (b'{"a":{"\\ud800":1}}', "a"),
        (b'{"a":"\\ud83d\\u0041"}', "a"),
    ],
)
def test_lone_surrogates_are_named(body: bytes, param: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        parse_json_object(body)
    assert caught.value.param == param
    caught.value.body().decode("utf-8")


@pytest.mark.checklist("A06")
def test_the_last_value_of_a_repeated_key_counts() -> None:
    assert parse_json_object(b'{"n":1,"n":9999}') == {"n": 9999}
    assert parse_json_object(b'{"a":"\\ud83d\\ude00"}') == {"a": "😀"}  # a pair of surrogates is a character


@pytest.mark.checklist("A07")
def test_the_depth_and_the_number_of_fields_are_limited() -> None:
    """Fields of objects inside do not count."""

    def nested(depth: int) -> bytes:
        return b'{"a":' * depth + b"1" + b"}" * depth

    assert parse_json_object(nested(MAX_DEPTH))
    with pytest.raises(InvalidJSONError, match="nested"):
        parse_json_object(nested(MAX_DEPTH + 1))
    fields = {f"f{number}": number for number in range(MAX_FIELDS)}
    assert parse_json_object(json.dumps(fields).encode()) == fields
    with pytest.raises(InvalidJSONError, match=f"more than {MAX_FIELDS} fields"):
        parse_json_object(json.dumps(fields | {"f": 1}).encode())
    assert parse_json_object(json.dumps({"a": fields | {"f": 1}}).encode())


DEEP = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}",
]
LARGE: list[Callable[[], bytes]] = [
    *(lambda item=item: b'{"a":[' + item * 3_000_000 + b"1]}" for item in (b"[],", b"{},", b"1,")),
    lambda: b'{"a":[' + b'"",' * (MAX_ELEMENTS + 1) + b'""]}',
    lambda: b'{"' + b'":0,"'.join(b"%d" % i for i in range(800_000)) + b'":0}',
    lambda: b'{"a":"' + b'\\"' * 3_000_000 + b":" * MAX_NODES * 2,  # an unterminated string
    lambda: b'"' * 5_000_001 + b"[" * (MAX_NODES + 1),
    lambda: b"\\" * 5_000_001 + b"[" * (MAX_NODES + 1),
]


@pytest.mark.checklist("A07")
def test_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones without being parsed, which would take the event loop's time."""
    parsed: list[int] = []
    decode = msgspec.json.decode

    def note(body: bytes) -> Any:
        parsed.append(len(body))
        return decode(body)

    monkeypatch.setattr(msgspec.json, "decode", note)
    for body in (*DEEP, *(make() for make in LARGE)):
        with pytest.raises(InvalidJSONError):
            parse_json_object(body)
    assert sum(length > 1_000_000 for length in parsed) == 1  # the unterminated string


def test_a_long_text_of_brackets_or_prompt_of_ids_is_no_bomb() -> None:
    for prompt in ('{"a": [1, 2, 3, 4]}\n' * 400_000, list(range(800_000))):
        assert parse_json_object(json.dumps({"prompt": prompt}).encode()) == {"prompt": prompt}


def test_the_size_of_several_texts_is_that_of_all_together() -> None:
    quoted = json.dumps('{,\\"' * 2_000_000).encode()
    assert describe_size([quoted, quoted]) is None
    assert describe_size([b"[]"] * MAX_NODES) is None
    assert describe_size([b"[]"] * (MAX_NODES + 1)) == f"more than {MAX_NODES} arrays, objects and keys"
    many = b"[1" + b",1" * (MAX_ELEMENTS // 2) + b"]"
    assert describe_size([many, quoted, many]) is None
    assert describe_size([many, quoted, many, b"[1,1]"]) == f"arrays with more than {MAX_ELEMENTS} elements"


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    SCALARS | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_valid_bodies_are_read_as_by_the_standard_library(value: dict[str, Any]) -> None:
    for ensure_ascii in (False, True):
        body = json.dumps(value, ensure_ascii=ensure_ascii).encode()
        assert parse_json_object(body) == json.loads(body)


@pytest.mark.checklist("A03")
@given(st.binary(max_size=50) | st.text(alphabet='{}[]":,\\u0d8ae1.-', max_size=30).map(str.encode), st.booleans())
def test_anything_else_is_a_bad_request(body: bytes, has_start: bool) -> None:
    """If it names a position, that is in the body."""
    body = b'{"a":' + body if has_start else body
    try:
        assert parse_json_object(body) == json.loads(body)
    except BadRequestError as error:
        error.body().decode()
        if match := re.search(r"line (\d+) column (\d+)", error.message):
            lines = body.split(b"\n")
            assert 1 <= int(match[1]) <= len(lines)
            assert 1 <= int(match[2]) <= len(lines[int(match[1]) - 1].decode(errors="replace")) + 1


@pytest.mark.checklist("A01")
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "it ends too early, line 1 column 1."),
        (b'{"a": 1,\n', "it ends too early, line 2 column 1."),
        (b'{"a": 1,}', "trailing comma in object, line 1 column 9."),
        ('{\n "é": 1,\n "ü" 2}'.encode(), "expected ':', line 3 column 6."),
        (b'{"a": 1e999}', "a number is out of range."),
        (b'{"a": NaN}', "invalid character, line 1 column 7."),
    ],
)
def test_an_invalid_body_is_located(body: bytes, problem: str) -> None:
    with pytest.raises(InvalidJSONError) as caught:
        parse_json_object(body)
    assert caught.value.message.endswith(f"(HINT: the body is not valid JSON: {problem})")


# Errors about the fields of a body: OpenAI's messages and codes, and the path of the field.


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


SUPPORTED = "Supported values are:"
REQUIRED, MISSING = "missing_required_parameter", "Missing required parameter: "
NO_MATCH = "string does not match pattern. Expected a string that matches"
FOUR, SIX = "an array with length 4", "a string with length 6"
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
        ("messages", ["x"] * 4, "array_above_max_length", "array too long", "an array with maximum length 3", FOUR),
        ("stop", "x" * 6, "string_above_max_length", "string too long", "a string with maximum length 5", SIX),
    ],
)
def test_values_out_of_bounds(param: str, value: Any, code: str, what: str, expected: str, got: str) -> None:
    message = f"Invalid '{param}': {what}. Expected {expected}, but got {got} instead."
    assert problem(**{param: value}) == (message, param, code)


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"messages": ...}, "messages", REQUIRED, MISSING),
        (messages(role="user"), "messages[0].content", REQUIRED, MISSING),
        (messages(content="x"), "messages[0].role", REQUIRED, MISSING),
        (messages(role="user", content=[{"type": "text"}]), "messages[0].content[0].text", REQUIRED, MISSING),
        ({"model": ...}, None, None, "you must provide a model parameter"),
        ({"model": 5, "n": 0}, "model", "invalid_type", "Invalid type for 'model'"),  # the first wrong field
        ({"foo": 1}, None, None, "Unrecognized request argument supplied: foo"),
        ({"even": 3}, "even", "invalid_value", "Invalid 'even': expected an even number."),
        (messages(role="x"), "messages[0].role", "invalid_value", f"Invalid value: 'x'. {SUPPORTED} 'user', 'tool'."),
        ({"effort": "some"}, "effort", "invalid_value", f"Invalid value: 'some'. {SUPPORTED} 'low' or 'high'."),
        ({"effort": "'"}, "effort", "invalid_value", """Invalid value: "'"."""),
        ({"name": "A b"}, "name", "invalid_value", f"Invalid 'name': {NO_MATCH} '^[a-z]+$'"),
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
