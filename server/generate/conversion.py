"""From a request of another API to one of chat completions, which is then judged and answered as any other."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from server.errors import UnsupportedParameterError, from_validation_error
from server.schemas.chat import ChatCompletionRequest
from server.schemas.common import GenerationRequest

# What the other APIs have under other names, or not at all.
_OF_CHAT_ONLY = {"model", "n", "stream", "stream_options", "stop"}
EXTENSIONS = frozenset(GenerationRequest.model_fields) - _OF_CHAT_ONLY


def chat_request(body: BaseModel, fields: Mapping[str, Any]) -> ChatCompletionRequest:
    """`fields` are what the declared fields of `body` are in chat completions; null ones are left out.

    Of its others, parameters of sampling mean what they mean in chat completions, and what nobody knows is left to
    the frame. Raises BadRequestError for a value that cannot be, and for what only chat completions have.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in (body.model_extra or {}).items():
        if name in ChatCompletionRequest.model_fields and name not in EXTENSIONS and value is not None:
            raise UnsupportedParameterError(name, "It is a parameter of /v1/chat/completions.")
        given.setdefault(name, value)
    for name in type(body).model_fields:
        given.update(dict.fromkeys(_unknown_fields(getattr(body, name), name), True))
    try:
        return ChatCompletionRequest.model_validate(given)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise from_validation_error(errors, given) from None


def _unknown_fields(value: object, path: str) -> Iterator[str]:
    """Where objects within a request have fields that are not declared: `messages[].content[].x`."""
    if isinstance(value, list):
        for item in value:
            yield from _unknown_fields(item, f"{path}[]")
    elif isinstance(value, BaseModel):
        for name, field in value:  # the undeclared ones, too
            if name in type(value).model_fields:
                yield from _unknown_fields(field, f"{path}.{name}")
            elif field is not None:
                yield f"{path}.{name}"


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def function_tool(**function: Any) -> dict[str, Any]:
    """A tool as chat completions have it: name, description, parameters, strict. Null ones are left out."""
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def named_tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def tool_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of an earlier answer. `arguments` are JSON."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
