"""What is special about `POST /v1/messages`: Anthropic's messages as those of chat completions, and its answers."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from server.context import ServerContext
from server.errors import APIError, InvalidValueError, MissingParameterError
from server.generate.chat import ChatEndpoint
from server.generate.choices import Delta, ToolCallDelta
from server.generate.constraints import Constraint, chat_constraint
from server.generate.conversion import chat_request, function_tool, named_tool, text_part, tool_call
from server.generate.endpoint import Head
from server.generate.events import frame_events
from server.generate.prompts import Prompt
from server.schemas.chat import ChatCompletionRequest
from server.schemas.common import Account, Usage
from server.schemas.messages import (
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    CountTokensRequest,
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
    StopDetails,
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
)

# Why a choice ended -> Anthropic's word. A request that was cancelled can be sent again to go on with.
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "abort": "pause_turn"}
RESPONSE_FORMAT = r"response_format(\.json_schema)?"
NAMES = {  # of chat completions, in errors
    RESPONSE_FORMAT: "output_config.format",
    r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[\d+\])\.function": r"\1",
    "max_completion_tokens": "max_tokens",
    "reasoning_effort": "output_config.effort",
}
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


# The request.


def error_names(body: CountTokensRequest) -> dict[str, str]:
    names = dict(NAMES)
    if body.output_format is not None:
        names[RESPONSE_FORMAT] = "output_format"
    if body.thinking is not None:
        names["thinking_token_budget"] = "thinking.budget_tokens"
    return names


def to_chat(body: CountTokensRequest, *, can_limit_thoughts: bool) -> ChatCompletionRequest:
    """Raises BadRequestError. Where thoughts cannot be limited, their budget is left to `max_tokens`."""
    final = body.messages[-1]
    if final.role == "assistant" and any(isinstance(block, ToolUseBlock) for block in final.content):
        message = "Invalid 'messages': the last one calls tools, so their results must follow."
        raise InvalidValueError(message, param="messages")
    choice = body.tool_choice
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": [*_system(body.system), *_messages(body.messages)],
        "tools": [_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": _tool_choice(choice),
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "continue_final_message": final.role == "assistant" or None,
        "reasoning_effort": _effort(body.thinking, body.output_config),
        "include_reasoning": False if body.thinking is not None and body.thinking.display == "omitted" else None,
        "response_format": _response_format(body),
    }
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_completion_tokens": body.max_tokens,
            "thinking_token_budget": _budget(body.thinking) if can_limit_thoughts else None,
            "stop": body.stop_sequences or None,
            **{name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "stream")},
        }
    return chat_request(body, fields)


def _system(system: str | list[TextBlock] | None) -> list[dict[str, Any]]:
    if not system:
        return []
    content = system if isinstance(system, str) else [text_part(block.text) for block in system]
    return [{"role": "system", "content": content}]


def _messages(messages: Sequence[InputMessage]) -> Iterator[dict[str, Any]]:
    """Turns of one role that follow each other are one turn."""
    for role, turns in groupby(messages, key=lambda message: message.role):
        blocks = [block for turn in turns for block in _blocks(turn.content)]
        yield from _assistant(blocks) if role == "assistant" else _user(blocks)


def _blocks(content: str | Sequence[Part]) -> list[Part]:
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else list(content)


def _user(blocks: Sequence[Part]) -> Iterator[dict[str, Any]]:
    """Results of tools come first: they answer the assistant's turn before."""
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            content: Any = block.content or ""
            if isinstance(content, list):
                content = [text_part(part.text) for part in content]
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
    if texts := [block for block in blocks if isinstance(block, TextBlock)]:
        yield {"role": "user", "content": _content(texts)}


def _assistant(blocks: Sequence[Part]) -> Iterator[dict[str, Any]]:
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    thoughts = "".join([block.thinking for block in blocks if isinstance(block, ThinkingBlock)])
    calls = [
        tool_call(block.id, block.name, msgspec.json.encode(block.input).decode())
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    content = _content(texts)
    if content is None and not calls:
        content = ""
    message = {"content": content, "reasoning_content": thoughts or None, "tool_calls": calls or None}
    yield {"role": "assistant", **{name: value for name, value in message.items() if value is not None}}


def _content(texts: Sequence[TextBlock]) -> Any:
    """None where there is no text."""
    if len(texts) == 1:
        return texts[0].text
    return [text_part(block.text) for block in texts] or None


def _tool(tool: Tool) -> dict[str, Any]:
    return function_tool(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)


def _tool_choice(choice: ToolChoice | None) -> Any:
    if choice is None:
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
        self._last = Delta(0, "")  # says how the choice ended
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
        content: list[Block] = []
        if delta.reasoning and self._with_thinking:
            content.append(ThinkingText(delta.reasoning))
        if delta.text:
            content.append(Text(delta.text))
        content += [ToolUse(call.id, call.name, _tool_input(call.arguments)) for call in delta.tool_calls]
        message = self._message(content, *_stop(delta, has_calls=bool(delta.tool_calls)), usage)
        message.lightwell = account
        return message

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
        if delta.reasoning and self._with_thinking:
            yield from self._switch(("thinking", 0), ThinkingText(""))
            yield BlockDelta(self._index, ThinkingDelta(delta.reasoning))
        if delta.text:
            yield from self._switch(("text", 0), Text(""))
            yield BlockDelta(self._index, TextDelta(delta.text))
        for call in delta.tool_calls:
            yield from self._call(call)

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
