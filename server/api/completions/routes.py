"""`POST /v1/completions`, and `.../render` for its prompts."""

from fastapi import APIRouter, Request, Response

from server.api.completions.conversion import CompletionEndpoint
from server.api.completions.schemas import CompletionRequest
from server.api.model_route import StreamRoute
from server.generation.pipeline import render, respond
from server.http.json_response import StructResponse

router = APIRouter(route_class=StreamRoute)


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Generate completions of one or more prompts."""
    return await respond(request, body, CompletionEndpoint())


@router.post("/v1/completions/render")
async def render_completion(request: Request, body: CompletionRequest) -> Response:
    """Return the prompts as token ids and text without generating."""
    prompts, headers = await render(request, body, CompletionEndpoint())
    return StructResponse(prompts, headers=headers)
