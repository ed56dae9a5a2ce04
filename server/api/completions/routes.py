"""`POST /v1/completions`, and its prompts alone."""

from fastapi import APIRouter, Request, Response

from server.api.completions.schemas import CompletionRequest
from server.api.completions.writer import CompletionEndpoint
from server.generation.pipeline import render, respond
from server.http.json_response import StructResponse
from server.http.middleware import StrictJSONRoute

router = APIRouter(route_class=StrictJSONRoute)


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Continues one or several prompts."""
    return await respond(request, body, CompletionEndpoint())


@router.post("/v1/completions/render")
async def render_completion(request: Request, body: CompletionRequest) -> Response:
    """The prompts, one or several, as token ids and text. Nothing is generated."""
    prompts, headers = await render(request, body, CompletionEndpoint())
    return StructResponse(prompts, headers=headers)
