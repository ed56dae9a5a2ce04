"""`POST /v1/messages` and `POST /v1/messages/count_tokens`, which are Anthropic's."""

from fastapi import APIRouter, Request, Response

from server.api.chat.conversion import check_extra, renamed_errors
from server.api.chat.counting import count_prompt_tokens
from server.api.chat.schemas import ChatCompletionRequest
from server.api.messages.conversion import Abilities, MessagesEndpoint, error_names, to_chat
from server.api.messages.schemas import CountTokensRequest, CountTokensResponse, MessagesRequest
from server.context import get_context
from server.generation.pipeline import respond
from server.http.json_response import StructResponse
from server.http.middleware import StrictJSONRoute

router = APIRouter(route_class=StrictJSONRoute)


@router.post("/v1/messages")
async def create_message(request: Request, body: MessagesRequest) -> Response:
    """Answers a conversation."""
    check_extra(body)
    with renamed_errors(error_names(body)):
        return await respond(request, _to_chat(request, body), MessagesEndpoint())


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """How many tokens the conversation is as a prompt. Nothing is generated."""
    check_extra(body, "/v1/messages", MessagesRequest)
    with renamed_errors(error_names(body)):
        num_tokens, headers = await count_prompt_tokens(request, _to_chat(request, body), MessagesEndpoint())
    return StructResponse(CountTokensResponse(num_tokens), headers=headers)


def _to_chat(request: Request, body: CountTokensRequest) -> ChatCompletionRequest:
    return to_chat(body, Abilities.of(get_context(request)))
