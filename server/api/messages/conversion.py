"""What is special about `POST /v1/messages`: Anthropic's messages as those of chat completions, and its answers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from server.api.chat.conversion import chat_request, function_tool, named_tool, text_part, tool_call
from server.api.chat.prompt import reads_effort
from server.api.chat.schemas import ChatCompletionRequest
from server.api.chat.writer import ChatEndpoint
from server.api.messages.schemas import (
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    CountTokensRequest,
    DocumentBlock,
    InputJSONDelta,
    InputMessage,
    Message,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputConfig,
    Part,
    PlainText,
    StopDetails,
    StopSequences,
    SystemMessage,
    Text,
    TextBlock,
    TextDelta,
    Thinking,
    ThinkingBlock,
    ThinkingDelta,
    ThinkingText,
    Tool,
    ToolChoice,
    ToolResultBlock,
    ToolUse,
    ToolUseBlock,
    UserMessage,
)
from server.constrained.constraints import Constraint, chat_constraint
from server.context import ServerContext
from server.generation.choice_state import Addition, Delta, ToolCallDelta
from server.generation.endpoint import Head
from server.generation.event_writer import frame_events
from server.generation.prompts import Prompt
from server.generation.reasoning_budget import can_limit_thoughts
from server.http.errors import APIError, InvalidValueError, MissingParameterError
from server.schemas.common import Account, Usage
from server.text.parts import PartKind

# Why a choice ended -> Anthropic's word. A request that was cancelled can be sent again to go on with.
STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "repetition": "end_turn",
    "abort": "pause_turn",
}
RESPONSE_FORMAT = r"response_format(\.json_schema)?"
NAMES = {  # of chat completions, in errors
    RESPONSE_FORMAT: "output_config.format",
    r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[\d+\])\.function": r"\1",
    "max_completion_tokens": "max_tokens",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
}
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
ERROR_MARK = "Error: "  # before the result of a tool that failed


# The request.


class Chat(ChatCompletionRequest):
    """With as many stop strings as this API allows."""

    stop: StopSequences | None = None


@dataclass(frozen=True, slots=True)
class Abilities:
    """What of this API the model and its chat template can do."""

    can_limit_thoughts: bool = True
    reads_effort: bool = True
    places_system: bool = True  # it writes a system message where it stands

    @classmethod
    def of(cls, context: ServerContext) -> "Abilities":
        template = context.chat_template
        return cls(
            can_limit_thoughts=can_limit_thoughts(context),
            reads_effort=reads_effort(template),
            places_system=template is not None and template.places_system,
        )


def error_names(body: CountTokensRequest) -> dict[str, str]:
    """What a client sent under a name of chat completions keeps it."""
    names = NAMES if body.output_format is None else NAMES | {RESPONSE_FORMAT: "output_format"}
    return {pattern: name for pattern, name in names.items() if pattern not in (body.model_extra or {})}


def to_chat(body: CountTokensRequest, abilities: Abilities) -> ChatCompletionRequest:
    """Raises BadRequestError. What is only advice, and the model cannot follow, is left out."""
    final = body.messages[-1]
    if final.role == "assistant" and any(isinstance(block, ToolUseBlock) for block in final.content):
        message = "Invalid 'messages': the last one calls tools, so their results must follow."
        raise InvalidValueError(message, param="messages")
    _check_thinking(body)
    choice = body.tool_choice
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": list(_turns(body, places_system=abilities.places_system)),
        "tools": [_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": _tool_choice(choice, has_tools=bool(body.tools)),
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "continue_final_message": final.role == "assistant" or None,
        "reasoning_effort": _effort(body.thinking, body.output_config) if abilities.reads_effort else None,
        "include_reasoning": False if body.thinking is not None and body.thinking.display == "omitted" else None,
        "response_format": _response_format(body),
    }
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_completion_tokens": body.max_tokens,
            "thinking_token_budget": _budget(body.thinking) if abilities.can_limit_thoughts else None,
            "stop": body.stop_sequences or None,
            **{name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "stream")},
        }
    return chat_request(body, fields, Chat)


def _check_thinking(body: CountTokensRequest) -> None:
    if body.thinking is None or body.thinking.type != "enabled":
        return
    if body.thinking.budget_tokens is None:
        raise MissingParameterError("thinking.budget_tokens")
    if isinstance(body, MessagesRequest) and body.thinking.budget_tokens >= body.max_tokens:
        message = "`max_tokens` must be greater than `thinking.budget_tokens`."
        raise InvalidValueError(message, param="thinking.budget_tokens")


def _turns(body: CountTokensRequest, *, places_system: bool) -> Iterator[dict[str, Any]]:
    """System messages at the beginning belong to the system prompt. What follows each other between two turns of the
    assistant's is one turn, as is what the assistant said, but for system messages that the template can place.
    """
    messages = _shown(body.messages)
    first = list(takewhile(lambda message: message.role == "system", messages))
    system = [*(_blocks(body.system) if body.system else ()), *_blocks_of(first)]
    if system:
        yield {"role": "system", "content": _content(system)}
    for by_assistant, group in groupby(messages[len(first) :], key=lambda message: message.role == "assistant"):
        turns = list(group)
        yield from _assistant(_blocks_of(turns)) if by_assistant else _input(turns, places_system=places_system)


def _shown(messages: Sequence[InputMessage]) -> list[InputMessage]:
    """Without system messages that were for a turn which is over."""
    last_user = max((index for index, each in enumerate(messages) if isinstance(each, UserMessage)), default=-1)
    return [
        message
        for index, message in enumerate(messages)
        if not (isinstance(message, SystemMessage) and message.clear_at == "next_user_message" and index < last_user)
    ]


def _blocks(content: str | Sequence[Part]) -> list[Part]:
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else list(content)


def _blocks_of(messages: Iterable[InputMessage]) -> list[Part]:
    return [block for message in messages for block in _blocks(message.content)]


def _input(messages: Sequence[InputMessage], *, places_system: bool) -> Iterator[dict[str, Any]]:
    """Results of tools come first: they answer the assistant's turn before.

    Many templates refuse a system message in the middle, leave it out, or move it to the beginning, where it would
    change the prefix that is cached. For these it is text of the user's turn.
    """
    yield from (_result(block) for block in _blocks_of(messages) if isinstance(block, ToolResultBlock))
    for by_system, turns in groupby(messages, key=lambda message: places_system and message.role == "system"):
        content = _content([block for block in _blocks_of(turns) if not isinstance(block, ToolResultBlock)])
        if content is not None:
            yield {"role": "system" if by_system else "user", "content": content}


def _result(block: ToolResultBlock) -> dict[str, Any]:
    parts = _blocks(block.content or "")
    if block.is_error:
        parts = [TextBlock(type="text", text=ERROR_MARK + _text(parts[0])), *parts[1:]]
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": _content(parts)}


def _assistant(blocks: Sequence[Part]) -> Iterator[dict[str, Any]]:
    thoughts = "".join([block.thinking for block in blocks if isinstance(block, ThinkingBlock)])
    calls = [
        tool_call(block.id, block.name, msgspec.json.encode(block.input).decode())
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    content = _content([block for block in blocks if isinstance(block, TextBlock)])
    if content is None and not calls:
        content = ""
    message = {"content": content, "reasoning_content": thoughts or None, "tool_calls": calls or None}
    yield {"role": "assistant", **{name: value for name, value in message.items() if value is not None}}


def _content(blocks: Sequence[Part]) -> Any:
    """None where there is no text."""
    texts = [_text(block) for block in blocks]
    return texts[0] if len(texts) == 1 else [text_part(text) for text in texts] or None


def _text(block: Part) -> str:
    """Of a block of text, or of a document."""
    if isinstance(block, TextBlock):
        return block.text
    assert isinstance(block, DocumentBlock)
    source = block.source
    text = source.data if isinstance(source, PlainText) else "\n".join(_text(part) for part in _blocks(source.content))
    title = f"Document: {block.title}" if block.title else None
    return "\n".join(part for part in (title, block.context, text) if part)


def _tool(tool: Tool) -> dict[str, Any]:
    return function_tool(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)


def _tool_choice(choice: ToolChoice | None, *, has_tools: bool) -> Any:
    if choice is None or (choice.type in ("auto", "none") and not has_tools):  # which says nothing
        return None
    if choice.type != "tool":
        return TOOL_CHOICES[choice.type]
    if choice.name is None:
        raise MissingParameterError("tool_choice.name")
    return named_tool(choice.name)


def _effort(thinking: Thinking | None, config: OutputConfig | None) -> str | None:
    """None leaves it to the model, as the effort `high` does, which is Anthropic's default."""
    if thinking is not None and thinking.type == "disabled":
        return "none"
    if config is not None and config.effort not in (None, "high"):
        return config.effort
    return "medium" if thinking is not None and thinking.type == "enabled" else None


def _budget(thinking: Thinking | None) -> int | None:
    return thinking.budget_tokens if thinking is not None and thinking.type == "enabled" else None


def _response_format(body: CountTokensRequest) -> dict[str, Any] | None:
    format = body.output_config.format if body.output_config is not None else None
    if format is not None and body.output_format is not None:
        message = "Invalid 'output_format': not allowed with 'output_config.format', whose older name it is."
        raise InvalidValueError(message, param="output_format")
    format = format or body.output_format
    if format is None:
        return None
    schema = {"name": "output", "schema": format.json_schema, "strict": True}
    return {"type": "json_schema", "json_schema": schema}


# The answer.


class MessagesEndpoint:
    noun = "messages"
    id_prefix = "msg_"

    def encode(self, context: ServerContext, body: ChatCompletionRequest) -> list[Prompt]:
        return ChatEndpoint().encode(context, body)

    def constraint(self, context: ServerContext, body: ChatCompletionRequest, prompt: Prompt) -> Constraint | None:
        return chat_constraint(context, body, prompt)

    def writer(
        self, context: ServerContext, body: ChatCompletionRequest, head: Head, prompts: Sequence[Prompt]
    ) -> "MessagesWriter":
        return MessagesWriter(head, with_thinking=body.include_reasoning is not False)


class MessagesWriter:
    """One choice, as blocks of thinking, text, and calls of tools."""

    def __init__(self, head: Head, *, with_thinking: bool = True) -> None:
        self._head = head
        self._with_thinking = with_thinking
        self._has_begun = False
        self._index = 0  # of the block that is open, else of the next
        self._open: tuple[str, int] | None = None  # its kind, and which call of a tool it is
        self._last = Delta(0)  # says how the choice ended
        self._has_calls = False

    def events(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        events: list[msgspec.Struct] = []
        if deltas and not self._has_begun:
            self._has_begun = True
            events.append(MessageStart(self._message([], None, None, usage)))
        for delta in deltas:
            events += self._additions(delta)
            self._last = delta
            self._has_calls |= bool(delta.tool_calls)
        return frame_events(events)

    def end(self, usage: Usage, account: Account | UnsetType = UNSET) -> bytes:
        stop = StopDetails(*_stop(self._last, has_calls=self._has_calls))
        return frame_events([*self._close(), MessageDelta(stop, _usage(usage), account), MessageStop()])

    def failure(self, error: APIError) -> bytes:
        return b"event: error\ndata: " + error.anthropic_body() + b"\n\n"

    def answer(self, deltas: Sequence[Delta], usage: Usage, account: Account | UnsetType = UNSET) -> Message:
        (delta,) = deltas
        shown = Delta(0)
        for part in filter(self._is_shown, delta.parts):
            shown.write(part)
        message = self._message(list(map(_block, shown.parts)), *_stop(delta, has_calls=bool(delta.tool_calls)), usage)
        message.lightwell = account
        return message

    def _is_shown(self, part: Addition) -> bool:
        return self._with_thinking or isinstance(part, ToolCallDelta) or part.kind is not PartKind.REASONING

    def _message(self, content: list[Block], reason: str | None, sequence: str | None, usage: Usage) -> Message:
        return Message(
            id=self._head.id,
            model=self._head.model,
            content=content,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=_usage(usage),
        )

    def _additions(self, delta: Delta) -> Iterator[msgspec.Struct]:
        for part in filter(self._is_shown, delta.parts):
            if isinstance(part, ToolCallDelta):
                yield from self._call(part)
            elif part.kind is PartKind.REASONING:
                yield from self._switch(("thinking", 0), ThinkingText(""))
                yield BlockDelta(self._index, ThinkingDelta(part.text))
            else:
                yield from self._switch(("text", 0), Text(""))
                yield BlockDelta(self._index, TextDelta(part.text))

    def _call(self, call: ToolCallDelta) -> Iterator[msgspec.Struct]:
        yield from self._switch(("tool_use", call.index), ToolUse(call.id, call.name, {}))
        if call.arguments:
            yield BlockDelta(self._index, InputJSONDelta(call.arguments))

    def _switch(self, block: tuple[str, int], start: Block) -> Iterator[msgspec.Struct]:
        """Only one block is open at a time."""
        if self._open != block:
            yield from self._close()
            self._open = block
            yield BlockStart(self._index, start)

    def _close(self) -> list[msgspec.Struct]:
        if self._open is None:
            return []
        self._open = None
        self._index += 1
        return [BlockStop(self._index - 1)]


def _stop(delta: Delta, *, has_calls: bool) -> tuple[str, str | None]:
    if delta.stop_string is not None:
        return "stop_sequence", delta.stop_string
    reason = STOP_REASONS[delta.finish_reason or "stop"]
    return "tool_use" if reason == "end_turn" and has_calls else reason, None


def _block(part: Addition) -> Block:
    if isinstance(part, ToolCallDelta):
        return ToolUse(part.id, part.name, _tool_input(part.arguments))
    return ThinkingText(part.text) if part.kind is PartKind.REASONING else Text(part.text)


def _tool_input(arguments: str) -> dict[str, Any]:
    """What is no JSON object, perhaps cut at max_tokens, is the text that it is."""
    try:
        value = msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def _usage(usage: Usage) -> MessageUsage:
    num_cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - num_cached,
        cache_read_input_tokens=num_cached,
        output_tokens=usage.completion_tokens,
    )
