"""Anthropic's messages: `POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from fastapi import APIRouter, Request, Response

from server.api.chat.schemas import ChatCompletionRequest
from server.api.model_route import StreamRoute
from server.context import ServerContext, get_context
from server.dialect import ID, MESSAGES, MODEL, Dialect, Operation
from server.generation.pipeline import respond
from server.generation.preamble import find_model
from server.http.responses import StructResponse
from server.part import Part
from server.parts.conversions.requests import count_prompt_tokens, reject_chat_only_fields, renamed_errors
from server.parts.messages.conversion import MessagesEndpoint, ModelCapabilities, error_names, to_chat
from server.parts.messages.schemas import CountTokensRequest, MessagesRequest
from server.parts.messages.writer import (
    ANTHROPIC_ERRORS,
    VERSION_HEADER,
    AnthropicMessage,
    AnthropicModels,
    CountTokensResponse,
    MessageEvent,
    MessageUsage,
    OutputTextBlock,
)


class MessagesRoute(StreamRoute):
    """A route whose streams fail as Anthropic's do."""

    errors = ANTHROPIC_ERRORS


router = APIRouter(route_class=MessagesRoute)


@router.post("/v1/messages")
async def create_message(request: Request, body: MessagesRequest) -> Response:
    """Generate the next message of a conversation."""
    reject_chat_only_fields(body)
    with renamed_errors(error_names(body)):
        return await respond(request, await _to_chat(request, body), MessagesEndpoint())


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """Count the prompt tokens of a conversation without generating.

    Clients send the body of /v1/messages; its parameters that do not affect the prompt have no effect.
    """
    extra = body.model_extra or {}
    for name in MessagesRequest.model_fields.keys() & extra.keys():
        del extra[name]
    reject_chat_only_fields(body)
    with renamed_errors(error_names(body)):
        num_tokens, headers = await count_prompt_tokens(request, await _to_chat(request, body), MessagesEndpoint())
    return StructResponse(CountTokensResponse(num_tokens), headers=headers)


async def _to_chat(request: Request, body: CountTokensRequest) -> ChatCompletionRequest:
    model = find_model(request, body.model).base
    return await get_context(request).convert(request, to_chat, body, ModelCapabilities.of(model))


MESSAGE = AnthropicMessage(
    id=f"msg_{ID}",
    model=MODEL,
    content=[OutputTextBlock("Paris.")],
    stop_reason="end_turn",
    stop_sequence=None,
    usage=MessageUsage(input_tokens=37, cache_read_input_tokens=0, output_tokens=4),
)

ANTHROPIC = Dialect(
    tag="Anthropic",
    routers=[router],
    operations={
        ("/v1/messages", "post"): Operation(
            AnthropicMessage, {"messages": MESSAGES, "max_tokens": 20}, MessageEvent, MESSAGE
        ),
        ("/v1/messages/count_tokens", "post"): Operation(
            CountTokensResponse, {"messages": MESSAGES}, answer_example=CountTokensResponse(37)
        ),
    },
    errors=ANTHROPIC_ERRORS,
    in_workers=True,
)


def _attach(context: ServerContext) -> None:
    context.model_formats[VERSION_HEADER] = AnthropicModels()


PART = Part(dialects=[ANTHROPIC], attach=_attach)
