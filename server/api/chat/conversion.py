"""From a request of another API to one of chat completions, which is then judged and answered as any other."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ValidationError

from server.api.chat.schemas import ChatCompletionRequest
from server.http.errors import BadRequestError, UnsupportedParameterError, from_validation_error
from server.schemas.common import GenerationRequest

CHAT = "/v1/chat/completions"

# What the other APIs have under other names, or what their answers have no place for.
_OF_CHAT_ONLY = {
    *("model", "n", "stream", "stream_options", "stop", "response_format"),
    *("prompt_logprobs", "return_token_ids", "logprob_token_ids", "post_sampling_probs"),
}
_OF_CHAT = {"chat_template_kwargs"}  # as vLLM takes it, too
EXTENSIONS = (frozenset(GenerationRequest.model_fields) | _OF_CHAT) - _OF_CHAT_ONLY


@contextmanager
def renamed_errors(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name what the client sent. `names` are patterns of chat completions' names, and what they are here."""
    try:
        yield
    except BadRequestError as error:
        given = error.param or ""
        for pattern, name in names.items():
            if re.match(pattern, given):
                error.param = re.sub(pattern, name, given, count=1)
                error.message = error.message.replace(f"'{given}'", f"'{error.param}'")
                break
        raise


def check_extra(body: BaseModel, path: str = CHAT, model: type[BaseModel] = ChatCompletionRequest) -> None:
    """Raises UnsupportedParameterError for what chat completions have, and no endpoint of the other API but perhaps
    `path`, whose requests are of `model`.
    """
    for name, value in (body.model_extra or {}).items():
        if name in ChatCompletionRequest.model_fields and name not in EXTENSIONS and value not in (None, False):
            owner = path if name in model.model_fields else CHAT
            raise UnsupportedParameterError(name, f"It is a parameter of {owner}.")


def chat_request(
    body: BaseModel,
    fields: Mapping[str, Any],
    model: type[ChatCompletionRequest] = ChatCompletionRequest,
    *,
    ignored: Sequence[str] = (),
) -> ChatCompletionRequest:
    """`fields` are what the declared fields of `body` are in chat completions; null ones are left out. `ignored` are
    names of those without effect, which are reported as unknown ones are. `model` may have other limits.

    Of its others, parameters of sampling mean what they mean in chat completions, and what nobody knows is left to
    the frame. Raises BadRequestError for a value that cannot be.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in (body.model_extra or {}).items():
        given.setdefault(name, value)
    for name in type(body).model_fields:
        given.update(dict.fromkeys(_unknown_fields(getattr(body, name), name), True))
    given.update(dict.fromkeys(ignored, True))
    try:
        return model.model_validate(given)
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
