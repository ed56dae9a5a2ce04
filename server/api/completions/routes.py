"""OpenAI's text completions: `POST /v1/completions`."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.completions.schemas import CompletionRequest
from server.api.completions.writer import Completion, CompletionWriter
from server.dialect import BEGINNING, Dialect, Operation, StreamRoute
from server.generation.endpoint import AnswerMetadata, Endpoint
from server.generation.pipeline import respond
from server.generation.prompts import Prompt, encode_fim_prompt, encode_prompt
from server.models.served_model import ServedModel


class CompletionEndpoint(Endpoint[CompletionRequest]):
    """`POST /v1/completions` for the generation pipeline."""

    noun = "prompt"
    id_prefix = "cmpl-"
    operation = "text_completion"

    def encode(self, model: ServedModel, body: CompletionRequest, *, limit: int | None = None) -> list[Prompt]:
        options: Any = {"add_special_tokens": body.add_special_tokens is not False, "limit": limit}
        if body.suffix:
            return [encode_fim_prompt(model, text, body.suffix, **options) for text in body.prompt]
        return [encode_prompt(model, value, **options) for value in body.prompt]

    def writer(
        self, model: ServedModel, body: CompletionRequest, metadata: AnswerMetadata, prompts: Sequence[Prompt]
    ) -> CompletionWriter:
        return CompletionWriter(model.tokenizer, metadata, body, prompts)


router = APIRouter(route_class=StreamRoute)


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Generate completions of one or more prompts."""
    return await respond(request, body, CompletionEndpoint())


COMPLETIONS = Dialect(
    tag="OpenAI",
    routers=[router],
    operations={
        ("/v1/completions", "post"): Operation(Completion, {"prompt": BEGINNING, "max_tokens": 20}, Completion)
    },
    in_workers=True,
)
