"""Converts a completion request to its prompts."""

from collections.abc import Sequence
from typing import Any

from server.api.completions.echo import PromptEchoes
from server.api.completions.schemas import CompletionRequest
from server.api.completions.writer import CompletionWriter
from server.generation.endpoint import AnswerMetadata
from server.generation.prompts import Prompt, encode_fim_prompt, encode_prompt
from server.generation.token_fields import NO_FIELDS, REQUEST_FIELDS, token_fields
from server.models.served_model import ServedModel


class CompletionEndpoint:
    """`POST /v1/completions` for the generation pipeline."""

    noun = "prompt"
    id_prefix = "cmpl-"
    operation = "text_completion"

    def max_tokens_field(self, body: CompletionRequest) -> str:
        return "max_tokens"

    def ignored_fields(self, model: ServedModel, body: CompletionRequest) -> list[str]:
        return []

    def encode(self, model: ServedModel, body: CompletionRequest, *, limit: int | None = None) -> list[Prompt]:
        options: Any = {"add_special_tokens": body.add_special_tokens is not False, "limit": limit}
        if body.suffix:
            return [encode_fim_prompt(model, text, body.suffix, **options) for text in body.prompt]
        return [encode_prompt(model, value, **options) for value in body.prompt]

    def writer(
        self, model: ServedModel, body: CompletionRequest, metadata: AnswerMetadata, prompts: Sequence[Prompt]
    ) -> CompletionWriter:
        tokenizer, with_logprobs = model.tokenizer, body.logprobs is not None
        echoes = None
        if body.echo:
            echoes = PromptEchoes(tokenizer, prompts, num_choices=body.n or 1, num_top=body.logprobs)
        fields = NO_FIELDS if REQUEST_FIELDS.isdisjoint(body.model_fields_set) else token_fields(body, prompts)
        options = body.stream_options
        return CompletionWriter(tokenizer, metadata, echoes, options, with_logprobs=with_logprobs, fields=fields)
