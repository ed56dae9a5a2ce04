"""Chat completions: whole answers, streams of chunks, and how they are written."""

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from server.api.chat.schemas import ChatCompletionRequest
from server.generation.choice import ChoiceDelta, TokenPosition, ToolCallDelta, json_logprob
from server.generation.endpoint import NO_FIELDS, AnswerMetadata, ChunkWriter, TokenFields
from server.generation.prompts import Prompt
from server.schemas.answers import PromptLogprobs, RequestTimings, Usage, encoded
from server.text.parsers.answer_parts import AnswerPart, PartKind
from server.text.tokenizer import Tokenizer


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob] | msgspec.Raw


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class ResponseFunction(msgspec.Struct):
    name: str
    arguments: str


class ResponseToolCall(msgspec.Struct, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: ResponseFunction


class ChatResponseMessage(msgspec.Struct, kw_only=True):
    """An assistant message. Reasoning is returned under both names that clients read."""

    role: Literal["assistant"] = "assistant"
    content: str | None  # null if there are only tool calls or reasoning
    refusal: None = None
    tool_calls: list[ResponseToolCall] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None  # the stop string or stop token id that ended the text
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    lightwell: RequestTimings | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET


class FunctionChunk(msgspec.Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCallChunk(msgspec.Struct, kw_only=True):
    """A piece of a tool call. The first piece of a call has its id, type and name."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionChunk


class ChatDelta(msgspec.Struct):
    """An addition to a message. The first of a choice has the role; the last is empty."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallChunk] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET  # only in the last chunk of a choice
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    lightwell: RequestTimings | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET  # only in the first chunk of a choice
    prompt_text: str | UnsetType = UNSET  # only in the first chunk of a choice


class ChatWriter(ChunkWriter):
    """Writes the answer or the stream of one chat request."""

    def __init__(
        self, tokenizer: Tokenizer, metadata: AnswerMetadata, body: ChatCompletionRequest, prompts: Sequence[Prompt]
    ) -> None:
        super().__init__(tokenizer, metadata, body, prompts)
        last = body.messages[-1]
        self._with_logprobs = bool(body.logprobs)
        self._with_reasoning = body.include_reasoning is not False
        self._echoed = last.text if body.echo and last.role == "assistant" else ""
        self._prompt_text: str | UnsetType = UNSET
        if body.return_prompt_text:
            self._prompt_text = tokenizer.decode(prompts[0].token_ids, skip_special_tokens=False)

    def chunks(self, delta: ChoiceDelta) -> list[ChatCompletionChunk]:
        """Return the chunks for the role (first delta of a choice only), the additions, and the finish reason."""
        token_ids = UNSET if self._fields is NO_FIELDS else self._fields.token_ids(delta)
        positions, num_hidden = delta.positions, 0
        if positions and positions[-1].is_hidden_end:
            positions, num_hidden = positions[:-1], 1
        choices = [ChatChunkChoice(delta.index, addition) for addition in self._additions(delta)]
        if not choices and (positions or token_ids):
            choices.append(ChatChunkChoice(delta.index, ChatDelta(content="")))  # these can precede the text
        if choices:
            choices[0].token_ids = token_ids
            choices[0].logprobs = self._logprobs(positions) if self._with_logprobs else None
        if delta.finish_reason is not None:
            last = ChatChunkChoice(delta.index, ChatDelta(), finish_reason=delta.finish_reason)
            last.stop_reason = delta.stop_reason
            last.logprobs = self._logprobs(delta.positions[-1:]) if num_hidden else None
            choices.append(last)
        chunks = [ChatCompletionChunk(**self._envelope, choices=[choice]) for choice in choices]
        if delta.index in self._started:
            return chunks
        self._started.add(delta.index)
        first = ChatChunkChoice(delta.index, ChatDelta("assistant", self._echoed))
        start = ChatCompletionChunk(**self._envelope, choices=[first], prompt_text=self._prompt_text)
        if self._fields is not NO_FIELDS:
            start.prompt_token_ids = self._fields.prompt_token_ids(delta.index)
        return [start, *chunks]

    def _additions(self, delta: ChoiceDelta) -> list[ChatDelta]:
        """Return an addition for the reasoning, one for the content and one for each tool call.

        Clients that expect them apart, as OpenAI sends them, drop the calls of an addition that has content too.
        """
        if not delta.parts:
            return []
        part = delta.parts[0]
        if len(delta.parts) == 1 and isinstance(part, AnswerPart) and part.kind is PartKind.CONTENT and part.text:
            return [ChatDelta(content=part.text)]
        additions = []
        if self._with_reasoning and (reasoning := delta.reasoning):
            additions.append(ChatDelta(reasoning=reasoning, reasoning_content=reasoning))
        if text := delta.text:
            additions.append(ChatDelta(content=text))
        additions += [ChatDelta(tool_calls=[_tool_call_chunk(call)]) for call in delta.tool_calls]
        return additions

    def usage_chunk(self) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._envelope, choices=[])

    def answer(
        self, deltas: Sequence[ChoiceDelta], usage: Usage, timings: RequestTimings | UnsetType = UNSET
    ) -> ChatCompletion:
        return ChatCompletion(
            **self._envelope,
            choices=[self._choice(delta) for delta in deltas],
            usage=usage,
            prompt_logprobs=self._fields.prompt_logprobs(self._tokenizer, 0),
            prompt_token_ids=self._fields.prompt_token_ids(0),
            prompt_text=self._prompt_text,
            lightwell=timings,
        )

    def _choice(self, delta: ChoiceDelta) -> ChatChoice:
        message = ChatResponseMessage(content=self._echoed + delta.text)
        if delta.tool_calls:
            message.tool_calls = [
                ResponseToolCall(id=call.id, function=ResponseFunction(call.name, call.arguments))
                for call in delta.tool_calls
            ]
        if delta.reasoning and self._with_reasoning:
            message.reasoning = message.reasoning_content = delta.reasoning
        if not message.content and (delta.tool_calls or delta.reasoning):
            message.content = None
        logprobs, token_ids = self._logprobs(delta.positions), self._fields.token_ids(delta)
        return ChatChoice(delta.index, message, logprobs, delta.finish_reason or "", delta.stop_reason, token_ids)

    def _logprobs(self, positions: Sequence[TokenPosition]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs(token_logprobs(self._tokenizer, positions, self._fields))


def token_logprobs(
    tokenizer: Tokenizer, positions: Sequence[TokenPosition], fields: TokenFields = NO_FIELDS
) -> list[TokenLogprob]:
    """Return the log probabilities of output tokens. Each position must have them."""

    def spell(token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        return fields.token_name(tokenizer, token_id), json_logprob(logprob), list(tokenizer.token_bytes(token_id))

    return [_token_logprob(spell, position) for position in positions]


def _token_logprob(
    spell: Callable[[int, float], tuple[str, float, list[int]]], position: TokenPosition
) -> TokenLogprob:
    logprobs = position.logprobs
    assert logprobs is not None  # only the first token of a prompt has none
    top = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
    alternatives = encoded([TopLogprob(*spell(*entry)) for entry in top])
    return TokenLogprob(*spell(position.token_id, logprobs.logprob), alternatives)


def _tool_call_chunk(call: ToolCallDelta) -> ToolCallChunk:
    function = FunctionChunk(arguments=call.arguments)
    chunk = ToolCallChunk(index=call.index, function=function)
    if call.id:
        chunk.id, chunk.type, function.name = call.id, "function", call.name
    return chunk
