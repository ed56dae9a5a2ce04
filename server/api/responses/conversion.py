"""What is special about `POST /v1/responses`: items as messages of chat completions, and responses that are kept."""

import secrets
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec

from server.api.chat.conversion import chat_request, check_extra, function_tool, named_tool, text_part, tool_call
from server.api.chat.prompt import NO_EFFORT, reads_effort
from server.api.chat.schemas import ChatCompletionRequest
from server.api.chat.writer import ChatEndpoint
from server.api.responses.event_log import EventLog
from server.api.responses.schemas import (
    AllowedTools,
    CallOutput,
    FunctionTool,
    GivenItem,
    InputMessage,
    ItemReference,
    NamedTool,
    OtherTool,
    PastCall,
    PastReasoning,
    Reasoning,
    ResponseObject,
    ResponsesRequest,
    SchemaFormat,
    TextConfig,
)
from server.api.responses.store import ResponseStore, StoredResponse
from server.api.responses.truncation import encode_newest
from server.api.responses.writer import ResponseWriter
from server.constrained.constraints import Constraint, chat_constraint
from server.context import ServerContext
from server.generation.endpoint import Head
from server.generation.prompts import Prompt
from server.generation.token_fields import TokenFields
from server.http.errors import InvalidValueError, MissingParameterError, UnsupportedParameterError, clip
from server.text.chat_template import ChatTemplate

_NAMES = {  # of chat completions, in errors
    "messages": "input",
    r"response_format(\.json_schema)?": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}
NO_CHOICES = ("none", "auto")  # what a choice may be where there are no tools
LOGPROBS = "message.output_text.logprobs"
NOT_SUPPORTED = ("conversation", "prompt", "context_management")
MAX_REFERENCED_BYTES = 10 << 20  # in one request
ID_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


# The request.


def error_names(body: ResponsesRequest) -> dict[str, str]:
    """Patterns of what errors of chat completions name, and what that is here, where tools may have been left out."""
    left = [index for index, tool in enumerate(body.tools or ()) if isinstance(tool, FunctionTool)]
    return {rf"tools\[{number}\]\.function": f"tools[{index}]" for number, index in enumerate(left)} | _NAMES


def check(body: ResponsesRequest) -> None:
    """What one field says about another, and what cannot be done. Raises BadRequestError."""
    check_extra(body)
    for name in NOT_SUPPORTED:
        if (body.model_extra or {}).get(name) is not None:
            raise UnsupportedParameterError(name)
    if body.input is None and body.previous_response_id is None:
        raise MissingParameterError("input")
    if body.top_logprobs and LOGPROBS not in (body.include or ()):
        message = f"Invalid 'top_logprobs': only allowed with '{LOGPROBS}' in 'include'."
        raise InvalidValueError(message, param="top_logprobs")
    if body.background and body.store is False:
        raise InvalidValueError("Invalid 'background': only allowed when responses are stored.", param="background")
    if body.stream_options is not None and not body.stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise InvalidValueError(message, param="stream_options")


def input_items(body: ResponsesRequest, store: ResponseStore) -> list[dict[str, Any]]:
    """The request's own items in OpenAI's full form, each with an id. Raises InvalidValueError.

    References are to items of responses in `store`.
    """
    if isinstance(body.input, str):
        return [_full_item(InputMessage(role="user", content=body.input))]
    items: list[dict[str, Any]] = []
    num_bytes = 0  # of those that are referred to
    for index, item in enumerate(body.input or ()):
        if isinstance(item, ItemReference):
            items.append(_referenced(item.id, f"input[{index}].id", store))
            num_bytes += len(msgspec.json.encode(items[-1]))
        else:
            items.append(_full_item(item))
        if num_bytes > MAX_REFERENCED_BYTES:
            param = f"input[{index}].id"
            message = f"Invalid '{param}': the items referred to are larger than {MAX_REFERENCED_BYTES} bytes."
            raise InvalidValueError(message, param=param)
    return items


def _referenced(item_id: str, param: str, store: ResponseStore) -> dict[str, Any]:
    item = store.item(item_id)
    if item is None:
        message = (
            f"Item with id '{clip(item_id)}' not found. Items are kept as long as a stored response that has them."
        )
        raise InvalidValueError(message, param=param)
    return item


def _full_item(item: GivenItem) -> dict[str, Any]:
    full: dict[str, Any] = {
        "id": item.id or ID_PREFIXES[item.type] + secrets.token_hex(16),
        "type": item.type,
        "status": item.status or "completed",
    }
    match item:
        case InputMessage():
            kind = "output_text" if item.role == "assistant" else "input_text"
            return full | {"role": item.role, "content": _full_parts(item.content, kind)}
        case PastCall():
            return full | {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        case CallOutput():
            output = item.output if isinstance(item.output, str) else _full_parts(item.output, "input_text")
            return full | {"call_id": item.call_id, "output": output}
        case PastReasoning():
            content = [{"type": "reasoning_text", "text": part.text} for part in item.content or ()]
            return full | {"summary": item.summary or [], "content": content}


def _full_parts(content: str | list[Any], kind: str) -> list[dict[str, Any]]:
    texts = [content] if isinstance(content, str) else [part.text for part in content]
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return [{"type": kind, "text": text, **more} for text in texts]


def ignored_fields(body: ResponsesRequest, template: ChatTemplate | None) -> list[str]:
    """What is of no effect here: tools that cannot be called, and advice that the model cannot be given."""
    tools = enumerate(body.tools or ())
    names = [f"tools[{index}].{tool.type}" for index, tool in tools if isinstance(tool, OtherTool)]
    effort = body.reasoning.effort if body.reasoning else None
    if effort not in NO_EFFORT and not reads_effort(template):
        names.append("reasoning.effort")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        names.append("text.verbosity")
    return names


def to_chat(
    body: ResponsesRequest, items: Sequence[dict[str, Any]], ignored: Sequence[str] = ()
) -> ChatCompletionRequest:
    """`items` are the whole conversation, `ignored` the `ignored_fields`. Raises BadRequestError."""
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    with_logprobs = LOGPROBS in (body.include or ())
    tools = [function_tool(**_tool_fields(tool)) for tool in _tools(body)]
    fields = {
        "model": body.model,
        "messages": [*system, *_messages(items)],
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stop": body.stop,
        "stream": body.stream,
        "logprobs": with_logprobs or None,
        "top_logprobs": body.top_logprobs if with_logprobs else None,
        "tools": tools or None,
        "tool_choice": None if not tools and body.tool_choice in NO_CHOICES else _tool_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort if body.reasoning and "reasoning.effort" not in ignored else None,
        "chat_template_kwargs": body.chat_template_kwargs,
        "response_format": _response_format(body.text),
        "metadata": body.metadata,
        "store": body.store,
    }
    return chat_request(body, fields, ignored=ignored)


def _messages(items: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the model made between two inputs, its thoughts, text and calls, is one message."""
    for by_model, group in groupby(items, key=_is_by_model):
        if by_model:
            yield _assistant(list(group))
        else:
            yield from map(_input_message, group)


def _is_by_model(item: dict[str, Any]) -> bool:
    return item["type"] in ("reasoning", "function_call") or item.get("role") == "assistant"


def _assistant(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    texts = [part["text"] for item in items if item["type"] == "message" for part in item["content"]]
    thoughts = [part["text"] for item in items if item["type"] == "reasoning" for part in item["content"]]
    calls = [
        tool_call(item["call_id"], item["name"], item["arguments"]) for item in items if item["type"] == "function_call"
    ]
    message: dict[str, Any] = {"role": "assistant"}
    if texts or not calls:
        message["content"] = _content(texts)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _input_message(item: dict[str, Any]) -> dict[str, Any]:
    if item["type"] == "message":
        return {"role": item["role"], "content": _content([part["text"] for part in item["content"]])}
    output = item["output"]
    content = output if isinstance(output, str) else _content([part["text"] for part in output])
    return {"role": "tool", "tool_call_id": item["call_id"], "content": content}


def _content(texts: Sequence[str]) -> str | list[dict[str, Any]]:
    return [text_part(text) for text in texts] if len(texts) > 1 else "".join(texts)


def _tools(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The tools as they are answered with: those that can be called."""
    return [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": bool(tool.strict),
        }
        for tool in body.tools or ()
        if isinstance(tool, FunctionTool)
    ]


def _tool_fields(tool: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tool.items() if name != "type"}


def _tool_choice(choice: str | NamedTool | AllowedTools | None) -> Any:
    match choice:
        case NamedTool():
            return named_tool(choice.name)
        case AllowedTools():
            tools = [named_tool(tool.name) for tool in choice.tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    if not isinstance(text.format, SchemaFormat):
        return {"type": text.format.type}
    schema = _without_nulls(text.format)
    return {"type": "json_schema", "json_schema": {name: value for name, value in schema.items() if name != "type"}}


def _without_nulls(model: TextConfig | SchemaFormat | Reasoning | None) -> dict[str, Any]:
    return {} if model is None else model.model_dump(exclude_none=True, by_alias=True)


# The answer.


class ResponsesEndpoint:
    noun = "input"
    id_prefix = "resp_"

    def __init__(self, body: ResponsesRequest, items: list[dict[str, Any]], previous: StoredResponse | None) -> None:
        """`items` are those of the request alone."""
        self._body = body
        self._items = items
        self._previous = previous
        self._stored: StoredResponse | None = None

    def encode(self, context: ServerContext, body: ChatCompletionRequest) -> list[Prompt]:
        if self._body.truncation == "auto":
            return [encode_newest(context, body)]
        return ChatEndpoint().encode(context, body)

    def constraint(self, context: ServerContext, body: ChatCompletionRequest, prompt: Prompt) -> Constraint | None:
        return chat_constraint(context, body, prompt)

    def writer(
        self, context: ServerContext, body: ChatCompletionRequest, head: Head, prompts: Sequence[Prompt]
    ) -> ResponseWriter:
        asked = self._body
        response = new_response(asked, head, context.model_config.default_sampling)
        earlier = [] if self._previous is None else self._previous.items
        events = EventLog(head.id) if asked.background and asked.stream else None
        stored = self._stored = StoredResponse(response, self._items, earlier, events)
        store = None if asked.store is False else context.responses
        if store is not None and (asked.stream or asked.background):
            store.put(stored)
        return ResponseWriter(
            context.tokenizer,
            stored,
            store,
            with_logprobs=bool(body.logprobs),
            fields=TokenFields.asked_for(body, prompts),
        )

    def end(self, store: ResponseStore) -> None:
        """What was generated in the background has ended, in whatever way: there are no more events."""
        if self._stored is not None and self._stored.events is not None:
            self._stored.events.close()
            store.count_events(self._stored)


def new_response(body: ResponsesRequest, head: Head, defaults: Any) -> ResponseObject:
    choice = body.tool_choice
    text = _without_nulls(body.text)
    return ResponseObject(
        id=head.id,
        created_at=head.created,
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        model=head.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning={"effort": None, "summary": None} | _without_nulls(body.reasoning),
        store=body.store is not False,
        temperature=defaults.get("temperature", 1.0) if body.temperature is None else body.temperature,
        text={"format": {"type": "text"}} | text,
        tool_choice=(choice or "auto") if isinstance(choice, str | None) else choice.model_dump(),
        tools=_tools(body),
        top_logprobs=body.top_logprobs or 0,
        top_p=defaults.get("top_p", 1.0) if body.top_p is None else body.top_p,
        truncation=body.truncation or "disabled",
        metadata=body.metadata or {},
        user=body.user,
        safety_identifier=body.safety_identifier,
        prompt_cache_key=body.prompt_cache_key,
    )
