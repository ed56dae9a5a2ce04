"""Anthropic's messages: `POST /v1/messages` and `POST /v1/messages/count_tokens`, answered as chat completions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.chat.routes import ChatEndpoint, reads_effort
from server.api.chat.schemas import ChatCompletionRequest
from server.context import ServerContext, get_context
from server.dialect import ID, MESSAGES, MODEL, Dialect, Operation, StreamRoute
from server.generation.endpoint import AnswerMetadata, Writer
from server.generation.parameters import tag_ids
from server.generation.pipeline import respond
from server.generation.preamble import find_model
from server.generation.prompts import Prompt
from server.http.errors import InvalidValueError, MissingParameterError, invalid
from server.http.responses import StructResponse
from server.models.served_model import ServedModel
from server.part import Part
from server.parts.conversions import chat_requests
from server.parts.messages import schemas, writer
from server.schemas.request_fields import NO_LIMIT

_FIELDS: Mapping[str, Any] = {
    "path": {"type": "string", "description": "Path of the file or directory."},
    "file_text": {"type": "string", "description": "With create: content of the new file."},
    "old_str": {"type": "string", "description": "With str_replace: text to replace, which must occur exactly once."},
    "new_str": {"type": "string", "description": "With str_replace: the new text."},
    "insert_line": {"type": "integer", "description": "With insert: number of the line after which to insert."},
    "insert_text": {"type": "string", "description": "With insert: the text to insert."},
    "view_range": {
        "type": "array",
        "items": {"type": "integer"},
        "description": "With view: first and last line to show; -1: the end of the file.",
    },
    "old_path": {"type": "string", "description": "With rename: the present path."},
    "new_path": {"type": "string", "description": "With rename: the new path."},
}
_EDITOR_FIELDS = ("path", "file_text", "old_str", "new_str", "insert_line", "insert_text", "view_range")
_EDITOR_COMMANDS = ("view", "create", "str_replace", "insert")


def _file_schema(commands: Sequence[str], fields: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    properties = {"command": {"type": "string", "enum": list(commands)}} | {name: _FIELDS[name] for name in fields}
    return {"type": "object", "properties": properties, "required": list(required)}


_BASH = (
    "Runs a command in a bash shell that keeps its state between calls.",
    {
        "type": "object",
        "properties": {
            "command": {"type": "string", "description": "The command to run."},
            "restart": {"type": "boolean", "description": "True: restart the shell instead."},
        },
    },
)
_EDITOR = ("Views, creates and edits text files.", _file_schema(_EDITOR_COMMANDS, _EDITOR_FIELDS, ("command", "path")))
_MEMORY = (
    "Views and edits the files below /memories, which are kept between conversations.",
    _file_schema((*_EDITOR_COMMANDS, "delete", "rename"), tuple(_FIELDS), ("command",)),
)
# Type of a tool -> its description and the JSON schema of its input.
CLIENT_TOOLS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bash_20241022": _BASH,
    "bash_20250124": _BASH,
    "text_editor_20250429": _EDITOR,
    "text_editor_20250728": _EDITOR,
    "memory_20250818": _MEMORY,
}


RESPONSE_FORMAT = ("response_format", "response_format.json_schema")
PARAMETER_NAMES = {  # parameter of chat completions -> the parameter of this API
    **dict.fromkeys(RESPONSE_FORMAT, "output_config.format"),
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
}
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
ERROR_PREFIX = "Error: "  # precedes the result of a failed tool call


def error_names(body: schemas.CountTokensRequest) -> dict[str, str]:
    """Return the parameter names to use in errors. Indices of tools differ because unsupported tools are dropped.

    A field that the client sent under its chat completions name keeps that name.
    """
    tools = {}
    for number, (index, _) in enumerate(_known_tools(body)):
        tools[f"tools[{number}].function.parameters"] = f"tools[{index}].input_schema"
        tools[f"tools[{number}].function"] = f"tools[{index}]"
    names = PARAMETER_NAMES
    if body.output_format is not None:
        names = names | dict.fromkeys(RESPONSE_FORMAT, "output_format")
    sent = body.model_extra or {}
    return tools | {param: name for param, name in names.items() if sent.get(param) in (None, False)}


def _known_tools(body: schemas.CountTokensRequest) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the tools that the model can be told, each with its index in the request."""
    for index, tool in enumerate(body.tools or ()):
        if isinstance(tool, schemas.ToolDefinition):
            description, schema = tool.description, tool.input_schema
        elif tool.type in CLIENT_TOOLS:
            description, schema = CLIENT_TOOLS[tool.type]
        else:
            continue
        fields = {"name": tool.name, "description": description, "parameters": schema, "strict": tool.strict}
        yield index, chat_requests.function_tool(**fields)


def _ignored(body: schemas.CountTokensRequest) -> Iterator[str]:
    """Yield the names of ignored tools and blocks."""
    known = [index for index, _ in _known_tools(body)]
    yield from (f"tools[{index}].{tool.type}" for index, tool in enumerate(body.tools or ()) if index not in known)
    if _ignores_choice(body) and body.tool_choice is not None:
        yield f"tool_choice.{body.tool_choice.name or body.tool_choice.type}"
    for content in [message.content for message in body.messages if isinstance(message.content, list)]:
        yield from _ignored_blocks(content, "messages[].content[]")


def _ignored_blocks(blocks: Iterable[object], path: str) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, schemas.IgnoredBlock):
            yield f"{path}.{block.type}"
        elif isinstance(block, schemas.ToolResultBlock) and isinstance(block.content, list):
            yield from _ignored_blocks(block.content, f"{path}.content[]")


def _ignores_choice(body: schemas.CountTokensRequest) -> bool:
    """Return whether only ignored tools could satisfy the tool choice."""
    known = [index for index, _ in _known_tools(body)]
    ignored = [tool.name for index, tool in enumerate(body.tools or ()) if index not in known]
    match body.tool_choice:
        case schemas.MessagesToolChoice(type="any"):
            return bool(ignored) and not known
        case schemas.MessagesToolChoice(type="tool", name=str(name)):
            return name in ignored
    return False


def to_chat(body: schemas.CountTokensRequest, model: ServedModel) -> ChatCompletionRequest:
    """Convert a request to a chat request. Hints that the model or its chat template cannot follow are dropped.

    Raises BadRequestError.
    """
    final = body.messages[-1]
    if final.role == "assistant" and any(isinstance(block, schemas.ToolUseBlock) for block in final.content):
        raise invalid("messages", "the last message calls tools, so their results must follow")
    _check_thinking(body)
    choice, template = body.tool_choice, model.chat_template
    keeps_position = template is not None and template.keeps_system_position
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": list(_turns(body, keeps_system_position=keeps_position)),
        "tools": [tool for _, tool in _known_tools(body)],
        "tool_choice": None if _ignores_choice(body) else _tool_choice(choice),
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "continue_final_message": final.role == "assistant" or None,
        "reasoning_effort": _effort(body.thinking, body.output_config) if reads_effort(template) else None,
        "include_reasoning": False if body.thinking is not None and body.thinking.display == "omitted" else None,
        "response_format": _response_format(body),
    }
    if isinstance(body, schemas.MessagesRequest):
        fields |= {
            "max_tokens": body.max_tokens,
            "thinking_token_budget": _budget(body.thinking) if _has_budget(model) else None,
            "stop": body.stop_sequences or None,
            **{name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "stream")},
        }
    return chat_requests.build_request(body, fields, ChatCompletionRequest, ignored=list(_ignored(body)))


def _check_thinking(body: schemas.CountTokensRequest) -> None:
    if body.thinking is None or body.thinking.type != "enabled":
        return
    if body.thinking.budget_tokens is None:
        raise MissingParameterError("thinking.budget_tokens")
    max_tokens = body.max_tokens if isinstance(body, schemas.MessagesRequest) else NO_LIMIT
    if max_tokens != NO_LIMIT and body.thinking.budget_tokens >= max_tokens:
        message = "`max_tokens` must be greater than `thinking.budget_tokens`."
        raise InvalidValueError(message, param="thinking.budget_tokens")


def _turns(body: schemas.CountTokensRequest, *, keeps_system_position: bool) -> Iterator[dict[str, Any]]:
    """Yield the chat messages.

    Leading system messages join the system prompt. Consecutive messages of the assistant become one message, and so do
    those between two turns of the assistant, except system messages that the template renders in place.
    """
    messages = _active(body.messages)
    first = list(takewhile(lambda message: message.role == "system", messages))
    system = [*(_blocks(body.system) if body.system else ()), *_blocks_of(first)]
    if system:
        yield {"role": "system", "content": chat_requests.content_of([_text(block) for block in system])}
    for by_assistant, group in groupby(messages[len(first) :], key=lambda message: message.role == "assistant"):
        turns = list(group)
        if by_assistant:
            yield _assistant(_blocks_of(turns))
        else:
            yield from _input(turns, keeps_system_position=keeps_system_position)


def _active(messages: Sequence[schemas.MessageParam]) -> list[schemas.MessageParam]:
    """Drop system messages that apply only up to a user message that has followed."""
    last_user = max((index for index, each in enumerate(messages) if isinstance(each, schemas.UserMessage)), default=-1)
    return [
        message
        for index, message in enumerate(messages)
        if not (
            isinstance(message, schemas.SystemMessage) and message.clear_at == "next_user_message" and index < last_user
        )
    ]


def _blocks(content: str | Sequence[schemas.MessagesObject | schemas.IgnoredBlock]) -> list[schemas.MessagesObject]:
    """Return the blocks that the model sees."""
    if isinstance(content, str):
        return [schemas.TextBlock(type="text", text=content)]
    return [block for block in content if not isinstance(block, schemas.IgnoredBlock)]


def _blocks_of(messages: Iterable[schemas.MessageParam]) -> list[schemas.MessagesObject]:
    return [block for message in messages for block in _blocks(message.content)]


def _input(messages: Sequence[schemas.MessageParam], *, keeps_system_position: bool) -> Iterator[dict[str, Any]]:
    """Yield the chat messages between two turns of the assistant. Tool results come first: they answer its calls.

    Many templates reject system messages within a conversation, drop them, or move them to the beginning, which would
    change the cached prefix. For these templates a system message becomes text of the user's turn.
    """
    yield from (_result(block) for block in _blocks_of(messages) if isinstance(block, schemas.ToolResultBlock))
    for by_system, turns in groupby(messages, key=lambda message: keeps_system_position and message.role == "system"):
        texts = [_text(block) for block in _blocks_of(turns) if not isinstance(block, schemas.ToolResultBlock)]
        if texts:
            yield {"role": "system" if by_system else "user", "content": chat_requests.content_of(texts)}


def _result(block: schemas.ToolResultBlock) -> dict[str, Any]:
    first, *others = map(_text, _blocks(block.content or "") or _blocks(""))
    texts = [ERROR_PREFIX + first if block.is_error else first, *others]
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": chat_requests.content_of(texts)}


def _assistant(blocks: Sequence[schemas.MessagesObject]) -> dict[str, Any]:
    reasoning = "".join([block.thinking for block in blocks if isinstance(block, schemas.ThinkingBlock)])
    calls = [
        chat_requests.tool_call(block.id, block.name, msgspec.json.encode(block.input).decode())
        for block in blocks
        if isinstance(block, schemas.ToolUseBlock)
    ]
    texts = [_text(block) for block in blocks if isinstance(block, schemas.TextBlock | schemas.CompactionBlock)]
    return chat_requests.assistant_message(texts, reasoning or None, calls)


def _text(block: schemas.MessagesObject) -> str:
    """Return the text of a block that has text."""
    if isinstance(block, schemas.CompactionBlock):
        return block.content or ""
    if isinstance(block, schemas.TextBlock):
        return block.text
    if isinstance(block, schemas.SearchResultBlock):
        return "\n".join([f"Search result: {block.title}", block.source, *map(_text, block.content)])
    assert isinstance(block, schemas.DocumentBlock)
    source = block.source
    text = (
        source.data
        if isinstance(source, schemas.PlainText)
        else "\n".join(_text(part) for part in _blocks(source.content))
    )
    title = f"Document: {block.title}" if block.title else None
    return "\n".join(part for part in (title, block.context, text) if part)


def _tool_choice(choice: schemas.MessagesToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type != "tool":
        return TOOL_CHOICES[choice.type]
    if choice.name is None:
        raise MissingParameterError("tool_choice.name")
    return chat_requests.named_tool(choice.name)


def _effort(thinking: schemas.ThinkingConfig | None, config: schemas.OutputConfig | None) -> str | None:
    """Return the reasoning effort. None, as `high`, which is Anthropic's default, leaves it to the model."""
    if thinking is not None and thinking.type == "disabled":
        return "none"
    if config is not None and config.effort not in (None, "high"):
        return config.effort
    return "medium" if thinking is not None and thinking.type == "enabled" else None


def _has_budget(model: ServedModel) -> bool:
    """Return whether chats with this model may have a `thinking_token_budget`."""
    tags = None if model.chat_template is None else model.chat_template.reasoning_tags
    return tags is not None and tag_ids(model, tags) is not None


def _budget(thinking: schemas.ThinkingConfig | None) -> int | None:
    return thinking.budget_tokens if thinking is not None and thinking.type == "enabled" else None


def _response_format(body: schemas.CountTokensRequest) -> dict[str, Any] | None:
    format = body.output_config.format if body.output_config is not None else None
    if format is not None and body.output_format is not None:
        raise invalid("output_format", "it is an alias of 'output_config.format', so only one is allowed")
    format = format or body.output_format
    if format is None:
        return None
    schema = {"name": "output", "schema": format.json_schema, "strict": True}
    return {"type": "json_schema", "json_schema": schema}


class MessagesEndpoint(ChatEndpoint):
    """`POST /v1/messages` for the generation pipeline."""

    id_prefix = "msg_"

    def writer(
        self, model: ServedModel, body: ChatCompletionRequest, metadata: AnswerMetadata, prompts: Sequence[Prompt]
    ) -> Writer:
        return writer.MessagesWriter(metadata, with_thinking=body.include_reasoning is not False)


class MessagesRoute(StreamRoute):
    """A route whose streams fail as Anthropic's do."""

    errors = writer.ANTHROPIC_ERRORS


router = APIRouter(route_class=MessagesRoute)


@router.post("/v1/messages")
async def create_message(request: Request, body: schemas.MessagesRequest) -> Response:
    """Generate the next message of a conversation."""
    chat_requests.reject_chat_only_fields(body)
    with chat_requests.renamed_errors(error_names(body)):
        return await respond(request, await _to_chat(request, body), MessagesEndpoint())


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, body: schemas.CountTokensRequest) -> Response:
    """Count the prompt tokens of a conversation without generating.

    Clients send the body of /v1/messages; its parameters that do not affect the prompt have no effect.
    """
    extra = body.model_extra or {}
    for name in schemas.MessagesRequest.model_fields.keys() & extra.keys():
        del extra[name]
    chat_requests.reject_chat_only_fields(body)
    with chat_requests.renamed_errors(error_names(body)):
        num_tokens, headers = await chat_requests.count_prompt_tokens(
            request, await _to_chat(request, body), MessagesEndpoint()
        )
    return StructResponse(writer.CountTokensResponse(num_tokens), headers=headers)


async def _to_chat(request: Request, body: schemas.CountTokensRequest) -> ChatCompletionRequest:
    return await get_context(request).convert(request, to_chat, body, find_model(request, body.model).base)


MESSAGE = writer.AnthropicMessage(
    id=f"msg_{ID}",
    model=MODEL,
    content=[writer.OutputTextBlock("Paris.")],
    stop_reason="end_turn",
    stop_sequence=None,
    usage=writer.MessageUsage(input_tokens=37, cache_read_input_tokens=0, output_tokens=4),
)

ANTHROPIC = Dialect(
    tag="Anthropic",
    routers=[router],
    operations={
        ("/v1/messages", "post"): Operation(
            writer.AnthropicMessage, {"messages": MESSAGES, "max_tokens": 20}, writer.MessageEvent, MESSAGE
        ),
        ("/v1/messages/count_tokens", "post"): Operation(
            writer.CountTokensResponse, {"messages": MESSAGES}, answer_example=writer.CountTokensResponse(37)
        ),
    },
    errors=writer.ANTHROPIC_ERRORS,
    in_workers=True,
)


def _attach(context: ServerContext) -> None:
    context.model_formats[writer.VERSION_HEADER] = writer.AnthropicModels()


PART = Part(dialects=[ANTHROPIC], attach=_attach)
