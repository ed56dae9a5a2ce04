"""Builds requests, mostly chat completions, from those of other APIs. They are validated and answered as such."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from server.api.chat.schemas import ChatCompletionRequest
from server.context import get_context
from server.generation.endpoint import Endpoint
from server.generation.job import encode_prompts
from server.generation.preamble import begin, distinct, find_generating_model
from server.http.errors import BadRequestError, UnsupportedParameterError
from server.http.validation import from_validation_error
from server.schemas.generation_request import GenerationRequest
from server.tenants import get_tenant

Model = TypeVar("Model", bound=BaseModel)

CHAT = "/v1/chat/completions"


class IgnoredObject(BaseModel):
    """An object of a tool or service that this server does not have."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str


# Parameters that the other APIs name differently, or whose results their answers cannot hold.
_CHAT_ONLY = {
    *("model", "n", "stream", "stream_options", "stop", "response_format"),
    *("prompt_logprobs", "return_token_ids", "logprob_token_ids", "post_sampling_probs"),
}
_CHAT_EXTENSIONS = {"chat_template_kwargs"}  # vLLM accepts it in these APIs as well
EXTENSIONS = (frozenset(GenerationRequest.model_fields) | _CHAT_EXTENSIONS) - _CHAT_ONLY


@contextmanager
def renamed_errors(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the parameters in errors raised inside to what the client sent.

    `names` maps parameters of chat completions, or parts of them such as `tools[0].function`, to the client's.
    """
    try:
        yield
    except BadRequestError as error:
        param = error.param or ""
        if found := max((name for name in names if _is_part(param, name)), key=len, default=""):
            error.param = names[found] + param.removeprefix(found)
            error.message = error.message.replace(f"'{param}'", f"'{error.param}'")
        raise


def _is_part(param: str, name: str) -> bool:
    """Return whether a parameter is the one with that name, or a part of it."""
    return param.startswith(name) and param[len(name) :][:1] in ("", ".", "[")


def reject_chat_only_fields(body: BaseModel) -> None:
    """Raise UnsupportedParameterError for parameters that only chat completions have."""
    for name, value in (body.model_extra or {}).items():
        if name in ChatCompletionRequest.model_fields and name not in EXTENSIONS and value not in (None, False):
            raise UnsupportedParameterError(name, f"It is a parameter of {CHAT}.")


def build_request(
    body: BaseModel, fields: Mapping[str, Any], model: type[Model], *, ignored: Sequence[str] = ()
) -> Model:
    """Return the request that corresponds to `body`, such as a chat request.

    Args:
        body: The request of another API. Its undeclared fields are copied: sampling parameters mean what they mean in
            chat completions, and the generation pipeline reports unknown ones.
        fields: The declared fields of `body` as fields of the result. Those that are None are left out.
        model: The class of the result.
        ignored: Names of fields without effect, which are reported as unknown fields are.

    Raises BadRequestError for invalid values.
    """
    values = present(**fields)
    for name, value in (body.model_extra or {}).items():
        values.setdefault(name, value)
    for name in type(body).model_fields:
        values.update(dict.fromkeys(distinct(_unknown_fields(getattr(body, name), name)), True))
    values.update(dict.fromkeys(ignored, True))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise from_validation_error(errors, values) from None


def _unknown_fields(value: object, path: str) -> Iterator[str]:
    """Yield the paths of undeclared fields in nested objects, such as `messages[].content[].x`."""
    if isinstance(value, list):
        for item in value:
            yield from _unknown_fields(item, f"{path}[]")
    elif isinstance(value, BaseModel):
        for name, field in value.__dict__.items():  # the declared ones
            if isinstance(field, list | BaseModel):
                yield from _unknown_fields(field, f"{path}.{name}")
        yield from (f"{path}.{name}" for name, field in (value.model_extra or {}).items() if field is not None)


def present(**fields: Any) -> dict[str, Any]:
    """Return the fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def content_of(texts: Sequence[str]) -> str | list[dict[str, Any]]:
    """Return texts as the content of a message."""
    return [{"type": "text", "text": text} for text in texts] if len(texts) > 1 else "".join(texts)


def assistant_message(texts: Sequence[str], reasoning: str | None, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a turn of the model. It has content, if only an empty one, unless it calls tools."""
    content = content_of(texts) if texts or not calls else None
    return present(role="assistant", content=content, reasoning_content=reasoning, tool_calls=calls or None)


def function_tool(**function: Any) -> dict[str, Any]:
    """Return a tool in the form of chat completions.

    `function` may have name, description, parameters and strict. Those that are None are left out.
    """
    return {"type": "function", "function": present(**function)}


def named_tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def tool_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return a tool call of an earlier answer. `arguments` is a JSON object as text."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


async def count_prompt_tokens(
    request: Request, body: ChatCompletionRequest, endpoint: Endpoint[ChatCompletionRequest]
) -> tuple[int, dict[str, str]]:
    """Return the number of prompt tokens and the headers of the answer.

    Raises BadRequestError or ModelNotFoundError.
    """
    context = get_context(request)
    model = find_generating_model(context, body.model, get_tenant(request))
    ignored = endpoint.ignored_fields(model.base, body)
    preamble = begin(request, body, is_model_missing=body.model is None, ignored=ignored)
    body.check()
    headers = preamble.accept()
    (prompt,) = await context.run_text_work(request, encode_prompts, model.base, body, endpoint)
    return len(prompt.token_ids), headers
