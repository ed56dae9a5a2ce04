"""What is special about `POST /v1/chat/completions`: messages through the model's template, and roles in the answer."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from server.context import ServerContext
from server.errors import BadRequestError, InvalidValueError
from server.generate.choices import Delta, Position, json_logprob
from server.generate.endpoint import Head
from server.generate.events import ChunkWriter
from server.generate.prompts import Prompt, check_text_size
from server.schemas.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatResponseMessage,
    TokenLogprob,
    TopLogprob,
)
from server.schemas.common import StreamOptions, Usage
from server.text.chat_template import ChatTemplateError, encode_chat
from server.text.choice import token_text
from server.text.tokenizer import Tokenizer


class ChatEndpoint:
    noun = "messages"
    id_prefix = "chatcmpl-"

    def encode(self, context: ServerContext, body: ChatCompletionRequest) -> list[Prompt]:
        if context.chat_template is None:
            raise BadRequestError("This model has no chat template; use /v1/completions.", param="messages")
        messages = [message.for_template() for message in body.messages]
        check_text_size(len(msgspec.json.encode(messages)), context.max_model_len, "messages")
        try:
            token_ids = encode_chat(
                context.chat_template,
                context.tokenizer,
                messages,
                add_generation_prompt=body.add_generation_prompt is not False,
            )
        except ChatTemplateError as error:
            raise InvalidValueError(str(error), param="messages") from error
        if not token_ids:
            raise InvalidValueError(
                "Invalid 'messages': the model's chat template makes nothing of them.", param="messages"
            )
        return [Prompt(token_ids)]

    def writer(
        self, context: ServerContext, body: ChatCompletionRequest, head: Head, prompts: Sequence[Prompt]
    ) -> "ChatWriter":
        return ChatWriter(context.tokenizer, head, body.stream_options, with_logprobs=bool(body.logprobs))


class ChatWriter(ChunkWriter):
    def __init__(self, tokenizer: Tokenizer, head: Head, options: StreamOptions | None, *, with_logprobs: bool) -> None:
        super().__init__(options)
        self._tokenizer = tokenizer
        self._head = head
        self._with_logprobs = with_logprobs
        self._started: set[int] = set()  # choices that the stream has begun

    def chunks(self, delta: Delta) -> list[ChatCompletionChunk]:
        """First one with the role; then at most one with text; at the end one that says why."""
        choices = []
        if delta.index not in self._started:
            self._started.add(delta.index)
            choices.append(ChatChunkChoice(delta.index, ChatDelta("assistant", "")))
        if delta.text or delta.positions:
            choices.append(ChatChunkChoice(delta.index, ChatDelta(UNSET, delta.text), self._logprobs(delta.positions)))
        if delta.finish_reason is not None:
            choices.append(ChatChunkChoice(delta.index, ChatDelta(), finish_reason=delta.finish_reason))
        return [self._chunk([choice]) for choice in choices]

    def usage_chunk(self) -> ChatCompletionChunk:
        return self._chunk([])

    def answer(self, deltas: Sequence[Delta], usage: Usage) -> ChatCompletion:
        head = self._head
        return ChatCompletion(
            id=head.id,
            created=head.created,
            model=head.model,
            choices=[self._choice(delta) for delta in deltas],
            usage=usage,
            system_fingerprint=head.system_fingerprint,
        )

    def _choice(self, delta: Delta) -> ChatChoice:
        message = ChatResponseMessage(content=delta.text)
        return ChatChoice(delta.index, message, self._logprobs(delta.positions), delta.finish_reason or "")

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
        return ChatLogprobs(token_logprobs(self._tokenizer, positions))


def token_logprobs(tokenizer: Tokenizer, positions: Sequence[Position]) -> list[TokenLogprob]:
    """Of tokens of an answer, which all have them."""
    return [_token_logprob(tokenizer, position) for position in positions]


def _token_logprob(tokenizer: Tokenizer, position: Position) -> TokenLogprob:
    logprobs = position.logprobs
    assert logprobs is not None  # only a prompt's first token has none
    top = [
        TopLogprob(*_spell(tokenizer, token_id, logprob))
        for token_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
    ]
    return TokenLogprob(*_spell(tokenizer, position.token_id, logprobs.logprob), top)


def _spell(tokenizer: Tokenizer, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
    return token_text(tokenizer, token_id), json_logprob(logprob), list(tokenizer.token_bytes(token_id))
