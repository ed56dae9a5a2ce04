"""What is special about `POST /v1/chat/completions`: messages through the model's template, and roles in the answer."""

from collections.abc import Callable, Sequence

from msgspec import UNSET, UnsetType

from server.api.chat.prompt import encode_request
from server.api.chat.schemas import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatResponseMessage,
    FunctionChunk,
    ResponseFunction,
    ResponseToolCall,
    TokenLogprob,
    ToolCallChunk,
    TopLogprob,
)
from server.constrained.constraints import Constraint, chat_constraint
from server.context import ServerContext
from server.generation.choice_state import Delta, Position, ToolCallDelta, json_logprob
from server.generation.endpoint import Head
from server.generation.event_writer import ChunkWriter
from server.generation.prompts import Prompt
from server.generation.token_fields import NO_FIELDS, TokenFields
from server.schemas.common import Account, StreamOptions, Usage
from server.text.tokenizer import Tokenizer


class ChatEndpoint:
    noun = "messages"
    id_prefix = "chatcmpl-"

    def encode(self, context: ServerContext, body: ChatCompletionRequest) -> list[Prompt]:
        return [encode_request(context, body)]

    def constraint(self, context: ServerContext, body: ChatCompletionRequest, prompt: Prompt) -> Constraint | None:
        return chat_constraint(context, body, prompt)

    def writer(
        self, context: ServerContext, body: ChatCompletionRequest, head: Head, prompts: Sequence[Prompt]
    ) -> "ChatWriter":
        prompt_text: str | UnsetType = UNSET
        if body.return_prompt_text:
            prompt_text = context.tokenizer.decode(prompts[0].token_ids, skip_special_tokens=False)
        return ChatWriter(
            context.tokenizer,
            head,
            body.stream_options,
            with_logprobs=bool(body.logprobs),
            with_reasoning=body.include_reasoning is not False,
            echoed=body.echoed,
            prompt_text=prompt_text,
            fields=TokenFields.asked_for(body, prompts),
        )


class ChatWriter(ChunkWriter):
    def __init__(
        self,
        tokenizer: Tokenizer,
        head: Head,
        options: StreamOptions | None = None,
        *,
        with_logprobs: bool,
        with_reasoning: bool = True,
        echoed: str = "",
        prompt_text: str | UnsetType = UNSET,
        fields: TokenFields = NO_FIELDS,
    ) -> None:
        super().__init__(options)
        self._tokenizer = tokenizer
        self._head = head
        self._fields = fields
        self._with_logprobs = with_logprobs
        self._with_reasoning = with_reasoning
        self._echoed = echoed
        self._prompt_text = prompt_text
        self._started: set[int] = set()  # choices that the stream has begun

    def chunks(self, delta: Delta) -> list[ChatCompletionChunk]:
        """First one with the role; then at most one with what was added; at the end one that says why."""
        chunks = []
        token_ids = self._fields.token_ids(delta)
        if delta.index not in self._started:
            self._started.add(delta.index)
            chunks.append(self._chunk([ChatChunkChoice(delta.index, ChatDelta("assistant", self._echoed))]))
            chunks[0].prompt_token_ids = self._fields.prompt_token_ids(delta.index)
            chunks[0].prompt_text = self._prompt_text
        addition = self._addition(delta)
        if addition != ChatDelta() or delta.positions or token_ids:
            if addition == ChatDelta():
                addition.content = ""  # its log probabilities come before its text
            logprobs = self._logprobs(delta.positions)
            chunks.append(self._chunk([ChatChunkChoice(delta.index, addition, logprobs, token_ids=token_ids)]))
        if delta.finish_reason is not None:
            choice = ChatChunkChoice(delta.index, ChatDelta(), finish_reason=delta.finish_reason)
            choice.stop_reason = delta.stop_reason
            chunks.append(self._chunk([choice]))
        return chunks

    def _addition(self, delta: Delta) -> ChatDelta:
        addition = ChatDelta()
        if text := delta.text:
            addition.content = text
        if calls := delta.tool_calls:
            addition.tool_calls = [_tool_call_chunk(call) for call in calls]
        if self._with_reasoning and (reasoning := delta.reasoning):
            addition.reasoning = addition.reasoning_content = reasoning
        return addition

    def usage_chunk(self) -> ChatCompletionChunk:
        return self._chunk([])

    def answer(self, deltas: Sequence[Delta], usage: Usage, account: Account | UnsetType = UNSET) -> ChatCompletion:
        head = self._head
        return ChatCompletion(
            id=head.id,
            created=head.created,
            model=head.model,
            choices=[self._choice(delta) for delta in deltas],
            usage=usage,
            system_fingerprint=head.system_fingerprint,
            prompt_logprobs=self._fields.prompt_logprobs(self._tokenizer, 0),
            prompt_token_ids=self._fields.prompt_token_ids(0),
            prompt_text=self._prompt_text,
            lightwell=account,
        )

    def _choice(self, delta: Delta) -> ChatChoice:
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

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        head = self._head
        return ChatCompletionChunk(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=choices,
        )

    def _logprobs(self, positions: Sequence[Position]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs(token_logprobs(self._tokenizer, positions, self._fields))


def token_logprobs(
    tokenizer: Tokenizer, positions: Sequence[Position], fields: TokenFields = NO_FIELDS
) -> list[TokenLogprob]:
    """Of tokens of an answer, which all have them."""

    def spell(token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        return fields.spell(tokenizer, token_id), json_logprob(logprob), list(tokenizer.token_bytes(token_id))

    return [_token_logprob(spell, position) for position in positions]


def _token_logprob(spell: Callable[[int, float], tuple[str, float, list[int]]], position: Position) -> TokenLogprob:
    logprobs = position.logprobs
    assert logprobs is not None  # only a prompt's first token has none
    top = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
    return TokenLogprob(*spell(position.token_id, logprobs.logprob), [TopLogprob(*spell(*entry)) for entry in top])


def _tool_call_chunk(call: ToolCallDelta) -> ToolCallChunk:
    function = FunctionChunk(arguments=call.arguments)
    chunk = ToolCallChunk(index=call.index, function=function)
    if call.id:
        chunk.id, chunk.type, function.name = call.id, "function", call.name
    return chunk
