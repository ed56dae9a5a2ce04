"""Converts requests of OpenAI's Responses API to chat completion requests, and creates their response objects."""

import secrets
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import msgspec

from server.api.chat.routes import NEUTRAL_EFFORTS, ChatEndpoint, encode_request, reads_effort
from server.api.chat.schemas import ChatCompletionRequest, ChatMessage
from server.generation.endpoint import AnswerMetadata, TokenFields
from server.generation.prompts import Prompt, max_prompt_tokens
from server.http.errors import BadRequestError, InvalidValueError, MissingParameterError, clip, invalid
from server.models.served_model import ServedModel
from server.parts.conversions import chat_requests
from server.parts.responses import schemas
from server.parts.responses.custom_tools import CUSTOM_PARAMETERS, as_function_item
from server.parts.responses.store import EventLog, ResponseStore, StoredResponse
from server.parts.responses.writer import ResponseWriter
from server.schemas.request_fields import NO_LIMIT
from server.tenants import EVERYBODY
from server.text.templates.chat_template import ChatTemplate

SYSTEM_ROLES = ("system", "developer")


def encode_newest(model: ServedModel, body: ChatCompletionRequest, *, limit: int | None = None) -> Prompt:
    """Return the prompt of the longest suffix of the conversation that fits. System messages are always kept.

    If even the last message does not fit, return the prompt of the whole conversation; the pipeline then reports its
    length in an error. Raises BadRequestError, then also for a long conversation that certainly has more tokens than
    `limit`, which is not tokenized.
    """
    room = max_prompt_tokens(body.requested().max_tokens, model.max_model_len)
    whole = _encode(model, body)
    if whole is not None and len(whole.token_ids) <= room:
        return whole

    def prompt_from(start: int) -> Prompt | None:
        kept = [
            message for index, message in enumerate(body.messages) if index >= start or message.role in SYSTEM_ROLES
        ]
        prompt = _encode(model, body.model_copy(update={"messages": kept}), is_truncated=True)
        return prompt if prompt is not None and len(prompt.token_ids) <= room else None

    for starts in _starts(body.messages):
        # Later starts give shorter prompts, so bisection applies if the template accepts every start of this kind.
        first = bisect_left(starts, True, key=lambda start: prompt_from(start) is not None)
        if first < len(starts) and (prompt := prompt_from(starts[first])) is not None:
            return prompt
    return encode_request(model, body, limit=limit) if whole is None else whole


def _starts(messages: Sequence[ChatMessage]) -> tuple[list[int], list[int]]:
    """Return the indices of messages at which the kept part may start, in two lists to try in order.

    The first has the user messages, as templates expect. The second has messages within the last turn, which not all
    templates accept, without tool results: these must follow their call.
    """
    others = [index for index, message in enumerate(messages) if message.role not in SYSTEM_ROLES]
    users = [index for index in others if messages[index].role == "user"]
    within = [index for index in others if index > max(users, default=-1) and messages[index].role != "tool"]
    return [index for index in users if index != others[0]], [index for index in within if index != others[0]]


def _encode(model: ServedModel, body: ChatCompletionRequest, *, is_truncated: bool = False) -> Prompt | None:
    """Return the prompt; None if it is far too long, or if the template rejects a truncated conversation."""
    try:
        return encode_request(model, body, limit=model.max_model_len)
    except BadRequestError as error:
        if not is_truncated and error.code != "context_length_exceeded":
            raise
        return None


PARAMETER_NAMES = {  # parameter of chat completions -> the parameter of this API
    "messages": "input",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}
# Of both APIs' parameters.
SAME_NAMES = (
    *("model", "temperature", "top_p", "stop", "stream", "parallel_tool_calls", "chat_template_kwargs"),
    *("metadata", "store"),
)
# Parameters that a response repeats as they are.
REPEATED = ("instructions", "max_tool_calls", "previous_response_id", "user", "safety_identifier", "prompt_cache_key")
LOGPROBS = "message.output_text.logprobs"  # value of `include`
MAX_REFERENCED_BYTES = 10 << 20  # per request
ID_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


def error_names(body: schemas.ResponsesRequest) -> dict[str, str]:
    """Return the parameter names to use in errors. Indices of tools differ because unsupported tools are dropped."""
    sent = [index for index, tool in enumerate(body.tools or ()) if not isinstance(tool, schemas.UnsupportedTool)]
    return {f"tools[{number}].function": f"tools[{index}]" for number, index in enumerate(sent)} | PARAMETER_NAMES


def check(body: schemas.ResponsesRequest) -> None:
    """Raise BadRequestError if fields contradict each other or are not supported."""
    chat_requests.reject_chat_only_fields(body)
    if body.input is None and body.previous_response_id is None:
        raise MissingParameterError("input")
    if body.top_logprobs and LOGPROBS not in (body.include or ()):
        raise invalid("top_logprobs", f"only allowed with '{LOGPROBS}' in 'include'")
    if body.background and body.store is False:
        raise invalid("background", "only allowed when responses are stored")
    if body.stream_options is not None and not body.stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise InvalidValueError(message, param="stream_options")


def input_items(body: schemas.ResponsesRequest, store: ResponseStore, owner: str = EVERYBODY) -> list[dict[str, Any]]:
    """Return the request's input items in OpenAI's full form, each with an id.

    References are resolved to items of responses in `store`. Raises InvalidValueError for unknown ones.
    """
    if isinstance(body.input, str):
        return [_full_item(schemas.InputMessage(role="user", content=body.input))]
    items: list[dict[str, Any]] = []
    num_bytes = 0  # total size of referenced items
    for index, item in enumerate(body.input or ()):
        if isinstance(item, schemas.IgnoredItem):
            continue
        if isinstance(item, schemas.ItemReference):
            items.append(_referenced(item.id, f"input[{index}].id", store, owner))
            num_bytes += len(msgspec.json.encode(items[-1]))
        else:
            items.append(_full_item(item))
        if num_bytes > MAX_REFERENCED_BYTES:
            param = f"input[{index}].id"
            raise invalid(param, f"the referenced items exceed {MAX_REFERENCED_BYTES} bytes")
    return items


def _referenced(item_id: str, param: str, store: ResponseStore, owner: str) -> dict[str, Any]:
    item = store.item(item_id, owner)
    if item is None:
        message = (
            f"Item with id '{clip(item_id)}' not found. Items are kept as long as a stored response contains them."
        )
        raise InvalidValueError(message, param=param)
    found: dict[str, Any] = msgspec.json.decode(item)
    return found


def _full_item(item: schemas.FullInputItem) -> dict[str, Any]:
    full: dict[str, Any] = {
        "id": item.id or ID_PREFIXES[item.type] + secrets.token_hex(16),
        "type": item.type,
        "status": item.status or "completed",
    }
    match item:
        case schemas.InputMessage():
            kind = "output_text" if item.role == "assistant" else "input_text"
            return full | {"role": item.role, "content": _full_parts(item.content, kind)}
        case schemas.PastCall():
            return full | {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        case schemas.CallOutput():
            output = item.output if isinstance(item.output, str) else _full_parts(item.output, "input_text")
            return full | {"call_id": item.call_id, "output": output}
        case schemas.PastReasoning():
            content = [{"type": "reasoning_text", "text": part.text} for part in item.content or ()]
            return full | {"summary": item.summary or [], "content": content}


def _full_parts(content: str | list[Any], kind: str) -> list[dict[str, Any]]:
    texts = [content] if isinstance(content, str) else [part.text for part in content]
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return [{"type": kind, "text": text, **more} for text in texts]


def ignored_fields(body: schemas.ResponsesRequest, template: ChatTemplate | None) -> list[str]:
    """Return the names of ignored fields: unsupported tools and items, and options that the template does not read."""
    tools, items = body.tools or (), enumerate(() if isinstance(body.input, str) else body.input or ())
    names = [
        f"tools[{index}].{tool.type}" for index, tool in enumerate(tools) if isinstance(tool, schemas.UnsupportedTool)
    ]
    if (choice := _ignored_choice(body)) is not None:
        names.append(f"tool_choice.{choice}")
    names += [
        f"tools[{index}].format"
        for index, tool in enumerate(tools)
        if isinstance(tool, schemas.CustomTool) and (tool.format or {}).get("type") == "grammar"
    ]
    names += [f"input[{index}].{item.type}" for index, item in items if isinstance(item, schemas.IgnoredItem)]
    effort = body.reasoning.effort if body.reasoning else None
    if effort not in NEUTRAL_EFFORTS and not reads_effort(template):
        names.append("reasoning.effort")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        names.append("text.verbosity")
    return names


def _ignored_choice(body: schemas.ResponsesRequest) -> str | None:
    """Return the name of a tool choice that only ignored tools could satisfy, or None if it has an effect."""
    choice, tools = body.tool_choice, body.tools
    match choice:
        case schemas.UnsupportedTool():
            return choice.type
        case schemas.ResponsesAllowedTools(tools=allowed):
            return choice.type if all(isinstance(tool, schemas.UnsupportedTool) for tool in allowed) else None
        case "required" if tools and all(isinstance(tool, schemas.UnsupportedTool) for tool in tools):
            return "required"
    return None


def to_chat(
    body: schemas.ResponsesRequest, items: Sequence[dict[str, Any]], ignored: Sequence[str] = ()
) -> ChatCompletionRequest:
    """Convert a request to a chat request.

    `items` are those of the whole conversation; `ignored` is the result of `ignored_fields`. Raises BadRequestError.
    """
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    with_logprobs = LOGPROBS in (body.include or ())
    tools = [_chat_tool(tool) for tool in body.tools or () if not isinstance(tool, schemas.UnsupportedTool)]
    fields = {
        **{name: getattr(body, name) for name in SAME_NAMES},
        "messages": [*system, *_messages(items)],
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": with_logprobs or None,
        "top_logprobs": body.top_logprobs if with_logprobs else None,
        "tools": tools,
        "tool_choice": None if _ignored_choice(body) else _tool_choice(body.tool_choice),
        "reasoning_effort": body.reasoning.effort if body.reasoning and "reasoning.effort" not in ignored else None,
        "response_format": _response_format(body.text),
    }
    return chat_requests.build_request(body, fields, ChatCompletionRequest, ignored=ignored)


def _messages(items: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the chat messages. Consecutive items of the model (reasoning, text, calls) become one message."""
    for from_model, group in groupby(map(as_function_item, items), key=_is_from_model):
        if from_model:
            yield from _assistant(list(group))
        else:
            yield from map(_input_message, group)


def _is_from_model(item: dict[str, Any]) -> bool:
    return item["type"] in ("reasoning", "function_call") or item.get("role") == "assistant"


def _assistant(items: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the message, if there is more to it than reasoning that is encrypted."""
    texts = [part["text"] for item in items if item["type"] == "message" for part in item["content"]]
    reasoning = [part["text"] for item in items if item["type"] == "reasoning" for part in item["content"]]
    calls = [
        chat_requests.tool_call(item["call_id"], item["name"], item["arguments"])
        for item in items
        if item["type"] == "function_call"
    ]
    if reasoning or calls or any(item["type"] == "message" for item in items):
        yield chat_requests.assistant_message(texts, "".join(reasoning) if reasoning else None, calls)


def _input_message(item: dict[str, Any]) -> dict[str, Any]:
    if item["type"] == "message":
        return {"role": item["role"], "content": chat_requests.content_of([part["text"] for part in item["content"]])}
    output = item["output"]
    content = output if isinstance(output, str) else chat_requests.content_of([part["text"] for part in output])
    return {"role": "tool", "tool_call_id": item["call_id"], "content": content}


def _tool(tool: schemas.FunctionTool | schemas.CustomTool) -> dict[str, Any]:
    """Return a tool in the form of the answer."""
    shared = {"type": tool.type, "name": tool.name, "description": tool.description}
    if isinstance(tool, schemas.CustomTool):
        return shared | {"format": tool.format or {"type": "text"}}
    return shared | {"parameters": tool.parameters, "strict": bool(tool.strict)}


def _chat_tool(tool: schemas.FunctionTool | schemas.CustomTool) -> dict[str, Any]:
    shared = {"name": tool.name, "description": tool.description}
    if isinstance(tool, schemas.CustomTool):
        return chat_requests.function_tool(**shared, parameters=CUSTOM_PARAMETERS, strict=True)
    return chat_requests.function_tool(**shared, parameters=tool.parameters, strict=bool(tool.strict))


def _tool_choice(choice: schemas.ResponsesToolChoice | None) -> Any:
    match choice:
        case schemas.ResponsesNamedTool():
            return chat_requests.named_tool(choice.name)
        case schemas.ResponsesAllowedTools():
            tools = [
                chat_requests.named_tool(tool.name)
                for tool in choice.tools
                if isinstance(tool, schemas.ResponsesNamedTool)
            ]
            return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice


def _response_format(text: schemas.TextConfig | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    if not isinstance(text.format, schemas.SchemaFormat):
        return {"type": text.format.type}
    schema = _without_nulls(text.format)
    return {"type": "json_schema", "json_schema": {name: value for name, value in schema.items() if name != "type"}}


def _without_nulls(model: schemas.TextConfig | schemas.SchemaFormat | schemas.ReasoningConfig | None) -> dict[str, Any]:
    return {} if model is None else model.model_dump(exclude_none=True, by_alias=True)


@dataclass(eq=False)
class ResponsesEndpoint(ChatEndpoint):
    """`POST /v1/responses` for the generation pipeline. Made for one request, whose response it stores."""

    noun = "input"
    id_prefix = "resp_"

    original: schemas.ResponsesRequest
    items: list[bytes]  # the input items of this request, without those of the `previous` response
    previous: StoredResponse | None
    store: ResponseStore
    owner: str
    _stored: StoredResponse | None = field(default=None, init=False)

    def max_tokens_field(self, body: ChatCompletionRequest) -> str:
        return "max_output_tokens"

    def encode(self, model: ServedModel, body: ChatCompletionRequest, *, limit: int | None = None) -> list[Prompt]:
        if self.original.truncation == "auto":
            return [encode_newest(model, body, limit=limit)]
        return super().encode(model, body, limit=limit)

    def writer(
        self, model: ServedModel, body: ChatCompletionRequest, metadata: AnswerMetadata, prompts: Sequence[Prompt]
    ) -> ResponseWriter:
        original = self.original
        response = new_response(original, metadata, model.default_sampling.values)
        earlier = [] if self.previous is None else self.previous.items
        events = EventLog(metadata.id) if original.background and original.stream else None
        stored = self._stored = StoredResponse(response, self.items, earlier, events, self.owner)
        store = None if original.store is False else self.store
        if store is not None and (original.stream or original.background):
            store.put(stored)
        return ResponseWriter(
            model.tokenizer,
            stored,
            store,
            with_logprobs=bool(body.logprobs),
            custom_tools=[tool.name for tool in original.tools or () if isinstance(tool, schemas.CustomTool)],
            fields=TokenFields(body, prompts),
        )

    def end(self) -> None:
        """Close the event log and keep the answer as JSON, whether it was generated successfully or not."""
        if self._stored is None:
            return
        if self._stored.events is not None:
            self._stored.events.close()
        self.store.end(self._stored)


def new_response(body: schemas.ResponsesRequest, metadata: AnswerMetadata, defaults: Any) -> schemas.ResponseObject:
    """Return the response to a request before generation. `defaults` are the default sampling."""
    choice = None if _ignored_choice(body) else body.tool_choice
    text = _without_nulls(body.text)
    return schemas.ResponseObject(
        id=metadata.id,
        created_at=metadata.created,
        **{name: getattr(body, name) for name in REPEATED},
        background=bool(body.background),
        max_output_tokens=None if body.max_output_tokens == NO_LIMIT else body.max_output_tokens,
        model=metadata.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning={"effort": None, "summary": None} | _without_nulls(body.reasoning),
        store=body.store is not False,
        temperature=defaults.get("temperature", 1.0) if body.temperature is None else body.temperature,
        text={"format": {"type": "text"}} | text,
        tool_choice=(choice or "auto") if isinstance(choice, str | None) else choice.model_dump(),
        tools=[_tool(tool) for tool in body.tools or () if not isinstance(tool, schemas.UnsupportedTool)],
        top_logprobs=body.top_logprobs or 0,
        top_p=defaults.get("top_p", 1.0) if body.top_p is None else body.top_p,
        truncation=body.truncation or "disabled",
        metadata=body.metadata or {},
    )
