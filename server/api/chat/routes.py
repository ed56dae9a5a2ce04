"""OpenAI's chat completions: `POST /v1/chat/completions`, and `.../render` for its prompt."""

from fastapi import APIRouter, Request, Response

from server.api.chat.conversion import ChatEndpoint
from server.api.chat.schemas import ChatCompletionRequest
from server.api.chat.writer import ChatCompletion, ChatCompletionChunk
from server.api.model_route import StreamRoute
from server.dialect import EXAMPLE_PROMPT, MESSAGES, Dialect, Operation
from server.generation.pipeline import render, respond
from server.http.responses import StructResponse
from server.schemas.answers import RenderedPrompt

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


REQUEST = {"messages": MESSAGES, "max_completion_tokens": 20}

CHAT = Dialect(
    tag="OpenAI",
    routers=[router],
    operations={
        ("/v1/chat/completions", "post"): Operation(ChatCompletion, REQUEST, ChatCompletionChunk),
        ("/v1/chat/completions/render", "post"): Operation(
            RenderedPrompt, REQUEST, answer_example=EXAMPLE_PROMPT, reaches_engine=True
        ),
    },
    in_workers=True,
)
