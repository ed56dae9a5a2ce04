"""`POST /v1/chat/completions`, and its prompt alone."""

from fastapi import APIRouter, Request, Response

from server.generate.chat import ChatEndpoint
from server.generate.frame import render, respond
from server.middleware import StrictJSONRoute
from server.responses import StructResponse
from server.schemas.chat import ChatCompletionRequest

router = APIRouter(route_class=StrictJSONRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """Answers a conversation."""
    return await respond(request, body, ChatEndpoint())


@router.post("/v1/chat/completions/render")
async def render_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """The prompt that the conversation becomes. Nothing is generated."""
    (prompt,), headers = await render(request, body, ChatEndpoint())
    return StructResponse(prompt, headers=headers)
