"""`POST /v1/chat/completions`, and its prompt alone."""

from fastapi import APIRouter, Request, Response

from server.api.chat.schemas import ChatCompletionRequest
from server.api.chat.writer import ChatEndpoint
from server.generation.pipeline import render, respond
from server.http.json_response import StructResponse
from server.http.middleware import StrictJSONRoute

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
