"""`POST /v1/completions`."""

from fastapi import APIRouter, Request, Response

from server.generate.completions import CompletionEndpoint
from server.generate.frame import respond
from server.middleware import StrictJSONRoute
from server.schemas.completions import CompletionRequest

router = APIRouter(route_class=StrictJSONRoute)


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Continues one or several prompts."""
    return await respond(request, body, CompletionEndpoint())
