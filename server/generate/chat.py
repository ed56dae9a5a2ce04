"""What is special about `POST /v1/chat/completions`: messages through the model's template, and roles in the answer."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from server.context import ServerContext
from server.errors import BadRequestError, InvalidValueError
from server.generate.choices import Delta, Position, json_logprob
from server.generate.endpoint import Head
from server.generate.prompts import Prompt, check_text_size
from server.generate.token_fields import NO_FIELDS, TokenFields
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
from server.schemas.common import Usage
from server.text.chat_template import ChatTemplateError, encode_chat
from server.text.choice import token_text
from server.text.tokenizer import Tokenizer


class ChatEndpoint:
    noun = "messages"
    id_prefix = "chatcmpl"

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
        fields = TokenFields.asked_for(body, prompts)
        return ChatWriter(context.tokenizer, head, with_logprobs=bool(body.logprobs), fields=fields)


class ChatWriter:
    def __init__(
        self, tokenizer: Tokenizer, head: Head, *, with_logprobs: bool, fields: TokenFields = NO_FIELDS
    ) -> None:
        self._tokenizer = tokenizer
        self._head = head
        self._fields = fields
        self._with_logprobs = with_logprobs
        self._started: set[int] = set()  # choices that the stream has begun

    def chunks(self, delta: Delta) -> list[ChatCompletionChunk]:
        """First one with the role; then at most one with text; at the end one that says why."""
        chunks = []
        token_ids = self._fields.token_ids(delta)
        if delta.index not in self._started:
            self._started.add(delta.index)
            chunks.append(self._chunk([ChatChunkChoice(delta.index, ChatDelta("assistant", ""))]))
            chunks[0].prompt_token_ids = self._fields.prompt_token_ids(delta.index)
        if delta.text or delta.positions or token_ids:
            logprobs = self._logprobs(delta.positions)
            choice = ChatChunkChoice(delta.index, ChatDelta(UNSET, delta.text), logprobs, token_ids=token_ids)
            chunks.append(self._chunk([choice]))
        if delta.finish_reason is not None:
            choice = ChatChunkChoice(delta.index, ChatDelta(), finish_reason=delta.finish_reason)
            chunks.append(self._chunk([choice]))
        return chunks

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
            prompt_logprobs=self._fields.prompt_logprobs(self._tokenizer, 0),
            prompt_token_ids=self._fields.prompt_token_ids(0),
        )

    def _choice(self, delta: Delta) -> ChatChoice:
        message = ChatResponseMessage(content=delta.text)
        logprobs, token_ids = self._logprobs(delta.positions), self._fields.token_ids(delta)
        return ChatChoice(delta.index, message, logprobs, delta.finish_reason or "", token_ids)

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
        return ChatLogprobs([self._token_logprob(position) for position in positions])

    def _token_logprob(self, position: Position) -> TokenLogprob:
        logprobs = position.logprobs
        assert logprobs is not None  # only a prompt's first token has none
        top = [
            TopLogprob(*self._spell(token_id, logprob))
            for token_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
        ]
        return TokenLogprob(*self._spell(position.token_id, logprobs.logprob), top)

    def _spell(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        token_bytes = list(self._tokenizer.token_bytes(token_id))
        return token_text(self._tokenizer, token_id), json_logprob(logprob), token_bytes
