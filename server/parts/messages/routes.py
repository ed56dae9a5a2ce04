"""`POST /v1/messages` and `POST /v1/messages/count_tokens` of Anthropic's API."""

from fastapi import APIRouter, Request, Response

from server.api.chat.counting import count_prompt_tokens
from server.api.chat.request_builder import reject_chat_only_fields, renamed_errors
from server.api.chat.schemas import ChatCompletionRequest
from server.api.model_route import StreamRoute
from server.context import get_context
from server.generation.pipeline import respond
from server.generation.preamble import find_model
from server.http.json_response import StructResponse
from server.parts.messages.conversion import MessagesEndpoint, ModelCapabilities, error_names, to_chat
from server.parts.messages.errors import ANTHROPIC_ERRORS
from server.parts.messages.schemas import CountTokensRequest, CountTokensResponse, MessagesRequest


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
