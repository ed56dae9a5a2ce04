"""`POST /v1/messages` and `POST /v1/messages/count_tokens`, which are Anthropic's."""

from fastapi import APIRouter, Request, Response

from server.context import get_context
from server.generate.conversion import check_extra, renamed_errors
from server.generate.frame import respond
from server.generate.messages import NAMES, MessagesEndpoint, to_chat
from server.generate.parameters import check_model, unknown_parameters, warnings_header
from server.middleware import StrictJSONRoute
from server.responses import StructResponse
from server.schemas.messages import CountTokensRequest, CountTokensResponse, MessagesRequest

router = APIRouter(route_class=StrictJSONRoute)


@router.post("/v1/messages")
async def create_message(request: Request, body: MessagesRequest) -> Response:
    """Answers a conversation."""
    check_extra(body)
    with renamed_errors(NAMES):
        return await respond(request, to_chat(body), MessagesEndpoint())


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """How many tokens the conversation is as a prompt. Nothing is generated."""
    context = get_context(request)
    check_model(body.model, context.model_names)
    check_extra(body)
    with renamed_errors(NAMES):
        chat = to_chat(body)
        unknown = unknown_parameters(chat, strict=context.settings.strict)
        context.metrics.count_unknown_parameters(len(unknown))
        chat.check()
        (prompt,) = await context.run_text_work(MessagesEndpoint().encode, context, chat)
    headers = {"x-lightwell-warnings": warnings_header(unknown)} if unknown else None
    return StructResponse(CountTokensResponse(len(prompt.token_ids)), headers=headers)
