"""Converts requests of Ollama's API to chat completion requests, and those without a chat template to completions."""

import dataclasses
import math
import re
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from server.api.chat.routes import reads_effort
from server.api.chat.schemas import ChatCompletionRequest
from server.api.completions.schemas import CompletionRequest
from server.context import get_context
from server.generation.endpoint import AnswerMetadata, Body, Endpoint
from server.generation.prompts import Prompt, encode_prompt
from server.http.errors import UnsupportedParameterError, invalid
from server.models.served_model import ModelVariant, ServedModel
from server.parts.conversions.chat_requests import build_request, present, reject_chat_only_fields, tool_call
from server.parts.embeddings.part import EmbeddingRequest
from server.parts.ollama import schemas
from server.schemas.generation_request import Requested
from server.tenants import get_tenant

DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
MAX_DURATION_CHARS = 64
MAX_DURATION = (2**63 - 1) / 1e9  # seconds; the longest that Ollama knows
_NUMBER = r"(?:[0-9]{1,16}(?:\.[0-9]{0,16})?|\.[0-9]{1,16})"
_SECONDS = re.compile(_NUMBER)
_PART = re.compile(rf"({_NUMBER})({'|'.join(DURATION_UNITS)})")
LATEST = ":latest"  # the tag of a name without one
SAME_OPTIONS = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop"),
    *("repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty"),
    *("mirostat", "mirostat_tau", "mirostat_eta"),
)
OPTIONS: Mapping[str, str] = {"num_predict": "max_tokens", **{name: name for name in SAME_OPTIONS}}  # -> our parameter
INTEGERS = frozenset(("num_predict", "top_k", "seed", "repeat_last_n", "mirostat"))
LOWEST: Mapping[str, float] = {"typical_p": 0.01, "num_predict": -math.inf}  # 0 is excluded; no limit if negative


def _range(option: str, parameter: str) -> tuple[float, float]:
    metadata = CompletionRequest.model_fields[parameter].metadata
    bounds = {end: getattr(each, end) for each in metadata for end in ("ge", "le") if hasattr(each, end)}
    return LOWEST[option] if option in LOWEST else bounds["ge"], bounds["le"]


# Ranges of this server, which are narrower than Ollama's. Values outside get the nearest one inside.
RANGES = {option: _range(option, parameter) for option, parameter in OPTIONS.items() if option != "stop"}
NEUTRAL_ZEROS = ("typical_p", "repeat_penalty")  # 0, which is no possible value, leaves the sampler off, as 1 does
OTHER_NAMES = {  # parameter of chat completions -> the parameter of this API
    **dict.fromkeys(("response_format", "response_format.json_schema", "response_format.json_schema.schema"), "format"),
    "reasoning_effort": "think",
}
EMBED_NAMES = {"truncate_prompt_tokens": "truncate"}
EMBEDDINGS_NAMES = {"input": "prompt"}
NO_IMAGES = "Models of this server read text only."
CALL_ID = "call{:05d}"  # nine letters and digits, which Mistral's templates require


class OllamaChatCompletionRequest(ChatCompletionRequest):
    """A chat request whose timings are always reported."""

    def requested(self) -> Requested:
        return dataclasses.replace(super().requested(), wants_timings=True)


class OllamaCompletionRequest(CompletionRequest):
    """A completion request whose timings are always reported, and whose length is limited by the context alone."""

    def requested(self) -> Requested:
        return dataclasses.replace(super().requested(), wants_timings=True, default_max_tokens=None)


def served_name(request: Request, name: str) -> str:
    """Return the name of a served model, without the tag `:latest` unless the model is served with it.

    As in Ollama, the case of letters is irrelevant unless two served names differ by it alone.
    """
    names = get_context(request).models.names(get_tenant(request))
    for fold in (str, str.lower):
        served = {fold(each): each for each in names}
        wanted = fold(name)
        if found := served.get(wanted) or served.get(wanted.removesuffix(LATEST)):
            return found
    return name.removesuffix(LATEST)


def tagged_name(name: str) -> str:
    """Return the name with the tag that Ollama's clients expect."""
    return name if ":" in name.rpartition("/")[2] else name + LATEST


def error_names(body: schemas.OllamaAnswerRequest) -> dict[str, str]:
    """Return the parameter names to use in errors.

    A field that the client sent under its chat completions name keeps that name.
    """
    names = OTHER_NAMES | {OPTIONS[name]: f"options.{name}" for name in _options(body) if name in OPTIONS}
    if isinstance(body, schemas.OllamaGenerateRequest):
        names["messages"] = "prompt"
    sent = body.model_extra or {}
    return {param: name for param, name in names.items() if param.partition(".")[0] not in sent}


def ignored_names(body: schemas.OllamaRequest) -> list[str]:
    """Return the names of the declared fields and options of a request that have no effect."""
    used = OPTIONS if isinstance(body, schemas.OllamaAnswerRequest) else {}
    options = [f"options.{name}" for name, value in _options(body).items() if name not in used and value is not None]
    if used:
        capped = [(name, value) for name, value in _options(body).items() if _number(name, value) != value]
        options += [f"options.{name}.{value}" for name, value in capped]
    return options if body.keep_alive is None else [*options, "keep_alive"]


def keep_alive_seconds(keep_alive: object) -> float | None:
    """Return for how long a model stays loaded: by a number of seconds, or a duration such as `1h30m` as text.

    A negative one has no end, as in Ollama, nor one that is longer than Ollama knows. None: it says nothing.
    """
    if isinstance(keep_alive, str):
        seconds = _duration(keep_alive)
    else:
        seconds = keep_alive if isinstance(keep_alive, int | float) and not isinstance(keep_alive, bool) else None
    if seconds is None:
        return None
    return seconds if 0 <= seconds <= MAX_DURATION else math.inf


def _duration(text: str) -> float | None:
    """Return the seconds of a duration such as `-1`, `2.5` or `1h30m`. None: it is none."""
    if len(text) > MAX_DURATION_CHARS:
        return None
    sign, number = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if _SECONDS.fullmatch(number):
        return sign * float(number)
    parts = list(_PART.finditer(number))
    if not parts or "".join(part[0] for part in parts) != number:
        return None
    return sign * sum(float(part[1]) * DURATION_UNITS[part[2]] for part in parts)


def to_chat(body: schemas.OllamaChatRequest, model: ModelVariant) -> OllamaChatCompletionRequest:
    """Convert a request that has messages. As in Ollama, the answer continues a final message of the assistant.

    Raises BadRequestError.
    """
    fields: dict[str, Any] = {
        "messages": list(_turns(body.messages or ())),
        "tools": [{"type": "function", **tool} for tool in body.tools or ()] or None,
    }
    final = body.messages[-1] if body.messages else None
    if final and final.role == "assistant" and final.content and not final.tool_calls:
        fields["continue_final_message"] = True
    return _build(body, model, fields, OllamaChatCompletionRequest)


def generate_to_chat(body: schemas.OllamaGenerateRequest, model: ModelVariant) -> OllamaChatCompletionRequest:
    """Convert a request with a prompt to a chat of one message, or two with `system`. Raises BadRequestError."""
    _check_generate(body)
    system = [{"role": "system", "content": body.system}] if body.system else []
    messages = [*system, {"role": "user", "content": body.prompt}]
    return _build(body, model, {"messages": messages}, OllamaChatCompletionRequest)


def generate_to_completion(body: schemas.OllamaGenerateRequest, model: ModelVariant) -> OllamaCompletionRequest:
    """Convert a request whose prompt is completed as it is, or that has a suffix. Raises BadRequestError."""
    _check_generate(body)
    ignored = ["system"] if body.system and not body.raw else []  # models are trained to fill in without one
    for name in ("system", "context"):
        if getattr(body, name) and name not in ignored:
            other = "'raw': true" if body.raw else "'suffix'"
            raise invalid(name, f"not allowed with {other}")
    fields: dict[str, Any] = {"prompt": body.prompt, "suffix": body.suffix or None}
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    return _build(body, model, fields, OllamaCompletionRequest, ignored=ignored)


def _check_generate(body: schemas.OllamaGenerateRequest) -> None:
    if body.images:
        raise UnsupportedParameterError("images", NO_IMAGES)
    if body.template:
        raise UnsupportedParameterError("template", "Render the prompt yourself and send it with 'raw'.")


def _build(
    body: schemas.OllamaAnswerRequest,
    model: ModelVariant,
    fields: Mapping[str, Any],
    result: type[Body],
    *,
    ignored: Sequence[str] = (),
) -> Body:
    is_chat = issubclass(result, ChatCompletionRequest)
    reads_think = is_chat and reads_effort(model.base.chat_template)
    ignored = [*ignored_names(body), *ignored, *(("think",) if body.think and not reads_think else ())]
    shared = {
        "model": model.name,
        "stream": body.stream is not False,
        "response_format": _response_format(body.format),
        "reasoning_effort": _effort(body.think) if reads_think else None,
        "logprobs": body.logprobs if is_chat else None,
        "top_logprobs": body.top_logprobs if is_chat else None,
        **_sampling(body),
    }
    reject_chat_only_fields(body)
    return build_request(body, {**shared, **fields}, result, ignored=ignored)


def _options(body: schemas.OllamaRequest) -> Mapping[str, Any]:
    return body.options or {}


def _sampling(body: schemas.OllamaRequest) -> dict[str, Any]:
    """Return the options as parameters of this server."""
    fields = {OPTIONS[name]: _number(name, value) for name, value in _options(body).items() if name in OPTIONS}
    max_tokens = fields.get("max_tokens")
    if isinstance(max_tokens, int) and max_tokens <= 0:  # as much as fits the context
        fields["max_tokens"] = None
    return fields


def _number(name: str, value: Any) -> Any:
    """Return an option's value within its range, and 40.5 as 40 for an option that is an integer, as Ollama does."""
    if name not in RANGES or isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if name in NEUTRAL_ZEROS and value == 0:
        return 1
    lowest, highest = RANGES[name]
    nearest = min(max(value, lowest), highest)
    return int(nearest) if name in INTEGERS else nearest


def _response_format(format: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if format in (None, ""):
        return None
    if isinstance(format, dict):
        return {"type": "json_schema", "json_schema": {"name": "format", "schema": format}}
    return {"type": "json_object"}


def _effort(think: bool | str | None) -> str | None:
    if isinstance(think, bool):
        return "medium" if think else "none"
    return think


def _turns(messages: Sequence[schemas.OllamaMessage]) -> Iterator[dict[str, Any]]:
    """Yield the messages of chat completions. Calls and results without ids, as most clients send them, get some."""
    num_calls = 0
    waiting: OrderedDict[int, str] = OrderedDict()  # number -> id of the calls whose results follow
    numbers: dict[str | None, deque[int]] = {}  # of the calls by the name of the tool; those that have results, too
    for index, message in enumerate(messages):
        if message.images:
            raise UnsupportedParameterError(f"messages[{index}].images", NO_IMAGES)
        calls = [_call(call, num_calls + number) for number, call in enumerate(message.tool_calls or ())]
        for number, call in enumerate(calls, num_calls):
            waiting[number] = call["id"]
            numbers.setdefault(call["function"]["name"], deque()).append(number)
        num_calls += len(calls)
        call_id = message.tool_call_id
        if message.role == "tool" and call_id is None and waiting:
            call_id = _take(waiting, numbers.get(message.tool_name, deque()))
        yield present(
            role=message.role,
            content=message.content or "",
            name=message.tool_name,
            reasoning_content=message.thinking or None,
            tool_calls=calls or None,
            tool_call_id=call_id,
        )


def _take(waiting: OrderedDict[int, str], numbers: deque[int]) -> str:
    """Remove the first of the calls with these numbers that is waiting, or the first one, and return its id.

    The time does not depend on how many there are.
    """
    while numbers:
        if (number := numbers.popleft()) in waiting:
            return waiting.pop(number)
    return waiting.popitem(last=False)[1]


def _call(call: schemas.OllamaCall, number: int) -> dict[str, Any]:
    arguments = msgspec.json.encode(call.function.arguments).decode()
    return tool_call(call.id or CALL_ID.format(number), call.function.name, arguments)


def embed_request(body: schemas.OllamaEmbedRequest, model: str) -> EmbeddingRequest:
    """Convert a request that has an input. Raises BadRequestError."""
    fields = {
        "input": body.input,
        "dimensions": body.dimensions or None,
        **({} if body.truncate is False else {"truncate_prompt_tokens": -1, "truncation_side": "right"}),
    }
    return _embedding_request(body, model, fields)


def embeddings_request(body: schemas.OllamaEmbeddingsRequest, model: str) -> EmbeddingRequest:
    """Convert a request of the older form that has a prompt. Raises BadRequestError."""
    return _embedding_request(body, model, {"input": body.prompt})


def _embedding_request(body: schemas.OllamaRequest, model: str, fields: Mapping[str, Any]) -> EmbeddingRequest:
    return build_request(body, {"model": model, **fields}, EmbeddingRequest, ignored=ignored_names(body))


@dataclasses.dataclass(eq=False)
class OllamaEndpoint(Endpoint[Body]):
    """An endpoint for the generation pipeline whose answers are written in Ollama's form."""

    id_prefix = "ollama-"

    inner: Endpoint[Body]  # that of the API to which the request was converted
    original: schemas.OllamaAnswerRequest
    context_ids: Sequence[int] | None = None  # those of an earlier answer; None: the answer does not return its own

    def __post_init__(self) -> None:
        self.noun = "messages" if isinstance(self.original, schemas.OllamaChatRequest) else "prompt"
        self.operation = self.inner.operation

    def max_tokens_field(self, body: Body) -> str:
        return "options.num_predict"

    def ignored_fields(self, model: ServedModel, body: Body) -> list[str]:
        return self.inner.ignored_fields(model, body)

    def encode(self, model: ServedModel, body: Body, *, limit: int | None = None) -> list[Prompt]:
        prompts = self.inner.encode(model, body, limit=limit)
        if self.context_ids:
            earlier = encode_prompt(model, list(self.context_ids), noun="context").token_ids
            for prompt in prompts:
                prompt.token_ids = [*earlier, *prompt.token_ids]
        return prompts

    def writer(
        self, model: ServedModel, body: Body, metadata: AnswerMetadata, prompts: Sequence[Prompt]
    ) -> schemas.OllamaWriter:
        return schemas.OllamaWriter(
            model.tokenizer,
            self.original,
            prompt_ids=None if self.context_ids is None else prompts[0].token_ids,
            explains=body.lightwell is not None and bool(body.lightwell.explain),
        )
