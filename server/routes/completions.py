"""`POST /v1/completions`, and its prompts alone."""

from fastapi import APIRouter, Request, Response

from server.generate.completions import CompletionEndpoint
from server.generate.frame import render, respond
from server.middleware import StrictJSONRoute
from server.responses import StructResponse
from server.schemas.completions import CompletionRequest

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
