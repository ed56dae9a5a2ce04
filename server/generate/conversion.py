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


def chat_request(fields: Mapping[str, Any], extra: Mapping[str, Any] | None) -> ChatCompletionRequest:
    """`fields` are of chat completions; null ones are left out. `extra` are those that the other API does not have.

    Of these, parameters of sampling mean what they mean in chat completions, and what nobody knows is left to the
    frame. Raises BadRequestError for a value that cannot be, and for what only chat completions have.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in (extra or {}).items():
        if name in ChatCompletionRequest.model_fields and name not in EXTENSIONS and value is not None:
            raise UnsupportedParameterError(name, "It is a parameter of /v1/chat/completions.")
        given.setdefault(name, value)
    try:
        return ChatCompletionRequest.model_validate(given)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise from_validation_error(errors, given) from None


def text_part(text: str, source: BaseModel) -> dict[str, Any]:
    """What `source` has beyond its declared fields stays with the part, so that it is reported."""
    return {"type": "text", "text": text} | dict(unknown_fields(source))


def unknown_fields(source: BaseModel) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in (source.model_extra or {}).items() if value is not None)


def function_tool(**function: Any) -> dict[str, Any]:
    """A tool as chat completions have it: name, description, parameters, strict. Null ones are left out."""
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def tool_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of an earlier answer. `arguments` are JSON."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
