"""`POST /v1/chat/completions`."""

from fastapi import APIRouter, Request, Response

from server.generate.chat import ChatEndpoint
from server.generate.frame import respond
from server.middleware import StrictJSONRoute
from server.schemas.chat import ChatCompletionRequest

router = APIRouter(route_class=StrictJSONRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """Answers a conversation."""
    return await respond(request, body, ChatEndpoint())
