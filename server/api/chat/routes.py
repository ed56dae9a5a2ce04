"""`POST /v1/chat/completions`, and `.../render` for its prompt."""

from fastapi import APIRouter, Request, Response

from server.api.chat.conversion import ChatEndpoint
from server.api.chat.schemas import ChatCompletionRequest
from server.api.model_route import StreamRoute
from server.generation.pipeline import render, respond
from server.http.json_response import StructResponse

router = APIRouter(route_class=StreamRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """Generate the next message of a conversation."""
    return await respond(request, body, ChatEndpoint())


@router.post("/v1/chat/completions/render")
async def render_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """Return the rendered prompt of a conversation without generating."""
    (prompt,), headers = await render(request, body, ChatEndpoint())
    return StructResponse(prompt, headers=headers)
