"""`/v1/responses`: create, retrieve, cancel and delete responses.

They are stored in the memory of this process. What is stored belongs together, so only one process has it.
"""

import asyncio
import logging
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query, Request, Response

from server.api.chat.schemas import ChatCompletionRequest
from server.context import ServerContext, get_context
from server.dialect import ID, MODEL, QUESTION, Dialect, Operation, StreamRoute
from server.generation.endpoint import AnswerMetadata
from server.generation.pipeline import collect, respond, start, stream
from server.generation.preamble import find_generating_model, find_model
from server.http.bodies import TEXT_SIZE, get_text_size
from server.http.errors import APIError, BadRequestError, InvalidValueError, ServerError, clip, invalid
from server.http.responses import EventStream, StructResponse
from server.http.strict_json import end_with_client
from server.models.served_model import ServedModel
from server.part import Part
from server.parts.conversions.chat_requests import count_prompt_tokens, renamed_errors
from server.parts.responses import conversion, schemas
from server.parts.responses.store import EventLog, ResponseStore, StoredResponse, encode_each, get_response_store
from server.parts.responses.writer import RESPONSES_ERRORS, AnyEvent, error_event
from server.tenants import get_owner, get_tenant

logger = logging.getLogger(__name__)

router = APIRouter()


class ResponsesRoute(StreamRoute):
    """A route whose streams fail as those of responses do."""

    errors = RESPONSES_ERRORS


json_router = APIRouter(route_class=ResponsesRoute)

MAX_PAGE_SIZE, DEFAULT_PAGE_SIZE = 100, 20  # input items


@json_router.post("/v1/responses")
async def create_response(request: Request, body: schemas.ResponsesRequest) -> Response:
    """Generate a response, which may continue a stored conversation."""
    context = get_context(request)
    conversion.check(body)
    model = find_generating_model(context, body.model, get_tenant(request)).base
    chat, endpoint = await _convert(request, body, model)
    with renamed_errors(conversion.error_names(body)):
        if not body.background:
            return await respond(request, chat, endpoint, on_end=endpoint.end)
        metadata, headers = await _start_in_background(request, chat, endpoint)
    stored = get_response_store(request).get(metadata.id, get_owner(request))
    if stored is None:
        context.running.cancel(metadata.id, get_owner(request))
        raise invalid("background", "the response exceeds the memory limit for stored responses")
    if stored.events is not None:
        return _follow(request, stored.events, headers=headers)
    return context.long_answer(request, stored.to_json(), headers=headers)


async def _start_in_background(
    request: Request, body: ChatCompletionRequest, endpoint: conversion.ResponsesEndpoint
) -> tuple[AnswerMetadata, dict[str, str]]:
    """Answer a request in a task that outlives the connection. The writer keeps the answer or its stream.

    Returns the metadata of the answer and the headers of the response to the client. Raises APIError for errors before
    the generation starts.
    """
    job = await start(request, body, endpoint, endpoint.end)
    job.reservation.is_answered = True
    account = job.tenant.account

    async def generate() -> None:
        account.num_running += 1
        try:
            if body.stream:
                async for _ in stream(job):
                    pass
            else:
                await collect(job)
        except APIError as error:
            job.failure(error)
        except Exception:
            logger.exception("a background request failed", extra={"request_id": job.request_id})
            job.failure(ServerError(job.request_id))
        finally:
            account.num_running -= 1
            job.end()
            fields = {**job.generation.log_fields(), "request_id": job.request_id}
            logger.info("%s ended in the background", job.metadata.id, extra={"fields": fields})

    task = asyncio.create_task(generate())
    job.context.background_tasks.add(task)
    task.add_done_callback(job.context.background_tasks.discard)
    return job.metadata, job.headers


@json_router.post("/v1/responses/input_tokens")
async def count_input_tokens(request: Request, body: schemas.InputTokensRequest) -> Response:
    """Count the prompt tokens of a conversation without generating or storing anything."""
    conversion.check(body)
    model = find_model(request, body.model)
    body.model = model.name
    chat, endpoint = await _convert(request, body, model.base)
    with renamed_errors(conversion.error_names(body)):
        num_tokens, headers = await count_prompt_tokens(request, chat, endpoint)
    return StructResponse(schemas.InputTokens(num_tokens), headers=headers)


def _note_text_size(request: Request, num_bytes: int) -> None:
    """Note that a request refers to stored text, so that its work reads at least `num_bytes`."""
    request.scope["state"][TEXT_SIZE] = max(get_text_size(request), num_bytes)


async def _convert(
    request: Request, body: schemas.ResponsesRequest, model: ServedModel
) -> tuple[ChatCompletionRequest, conversion.ResponsesEndpoint]:
    """Convert a request and the conversation it continues to a chat request. Raises BadRequestError."""
    previous = None if body.previous_response_id is None else _previous(request, body.previous_response_id)
    if previous is not None:
        _note_text_size(request, previous.num_json_bytes)
    return await get_context(request).convert(request, _to_chat, request, body, model, previous)


def _to_chat(
    request: Request, body: schemas.ResponsesRequest, model: ServedModel, previous: StoredResponse | None
) -> tuple[ChatCompletionRequest, conversion.ResponsesEndpoint]:
    store, owner = get_response_store(request), get_owner(request)
    items = conversion.input_items(body, store, owner)
    with renamed_errors(conversion.error_names(body)):
        conversation = [*map(msgspec.json.decode, previous.items if previous else ()), *items]
        chat = conversion.to_chat(body, conversation, conversion.ignored_fields(body, model.chat_template))
    _note_text_size(request, sum(len(message.text) for message in chat.messages))
    return chat, conversion.ResponsesEndpoint(body, encode_each(items), previous, store, owner)


@router.get("/v1/responses/{response_id}")
async def retrieve_response(
    request: Request,
    response_id: str,
    stream: Annotated[
        bool, Query(description="Stream the events of a response created with `background` and `stream`.")
    ] = False,
    starting_after: Annotated[
        int | None, Query(ge=0, description="Send only events after this `sequence_number`.")
    ] = None,
    include_obfuscation: Annotated[bool, Query(description="Accepted and ignored: events are never padded.")] = False,
) -> Response:
    """Return a stored response as generated so far; with `stream`, its events from the first to the last."""
    stored = _find(request, response_id)
    if not stream and starting_after is not None:
        message = "The 'starting_after' parameter is only allowed when 'stream' is enabled."
        raise InvalidValueError(message, param="starting_after")
    if not stream:
        return get_context(request).long_answer(request, stored.to_json())
    if stored.events is None:
        raise invalid("stream", "the response was not created with both 'background' and 'stream'")
    return _follow(request, stored.events, starting_after)


def _follow(
    request: Request, events: EventLog, starting_after: int | None = None, headers: dict[str, str] | None = None
) -> Response:
    """Stream the logged events, then new ones as they occur."""
    if starting_after is not None and starting_after >= events.num_events:
        raise invalid("starting_after", f"the latest event is number {events.num_events - 1}")
    end_with_client(request.scope)
    return EventStream(
        events.read(0 if starting_after is None else starting_after + 1),
        on_error=lambda error: error_event(error, events.num_events),
        headers=headers,
        request_id=request.state.request_id,
    )


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    request: Request,
    response_id: str,
    order: Annotated[Literal["asc", "desc"], Query(description="desc: the latest first.")] = "desc",
    after: Annotated[str | None, Query(description="Only items after the one with this id.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE, description="Maximum number of items.")] = DEFAULT_PAGE_SIZE,
) -> Response:
    """List the input items of a response, the latest first, without those of previous responses."""
    items = [msgspec.json.decode(item) for item in _find(request, response_id).input_items]
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise invalid("after", "the response has no item with that id")
        del items[: ids.index(after) + 1]
    page = items[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else ("", "")
    answer = schemas.ItemList(data=page, first_id=first, last_id=last, has_more=len(items) > limit)
    return get_context(request).long_answer(request, msgspec.json.encode(answer))


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str) -> Response:
    """Cancel a response that is being generated. Its output so far stays stored."""
    context = get_context(request)
    stored = _find(request, response_id)
    if context.running.cancel(response_id, get_owner(request)) and stored.response is not None:
        stored.response.status = "cancelled"
    elif not stored.is_background:
        raise BadRequestError("Cannot cancel a synchronous response.")
    return context.long_answer(request, stored.to_json())


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str) -> Response:
    """Delete a response, cancelling it if it is being generated. Responses that continue it keep its items."""
    if not get_response_store(request).delete(response_id, get_owner(request)):
        raise _not_found(response_id)
    get_context(request).running.cancel(response_id, get_owner(request))
    return StructResponse(schemas.DeletedResponse(response_id))


def _not_found(response_id: str) -> APIError:
    return APIError(404, f"Response with id '{clip(response_id)}' not found.")


def _find(request: Request, response_id: str) -> StoredResponse:
    stored = get_response_store(request).get(response_id, get_owner(request))
    if stored is None:
        raise _not_found(response_id)
    return stored


def _previous(request: Request, response_id: str) -> StoredResponse:
    stored = get_response_store(request).get(response_id, get_owner(request))
    if stored is None:
        message = f"Previous response with id '{clip(response_id)}' not found."
        raise BadRequestError(message, param="previous_response_id", code="previous_response_not_found")
    if stored.is_in_progress:
        raise invalid("previous_response_id", "that response is still being generated")
    return stored


ITEM = {
    "id": f"msg_{ID}",
    "type": "message",
    "status": "completed",
    "role": "user",
    "content": [{"type": "input_text", "text": QUESTION}],
}
ITEMS = schemas.ItemList(data=[ITEM], first_id=f"msg_{ID}", last_id=f"msg_{ID}", has_more=False)


def _example() -> schemas.ResponseObject:
    request = schemas.ResponsesRequest.model_validate({"model": MODEL, "input": QUESTION})
    response = conversion.new_response(request, AnswerMetadata(f"resp_{ID}", 1_764_000_000, MODEL, ""), {})
    response.status = "completed"
    response.output.append(
        schemas.MessageItem(id=f"msg_{ID}", status="completed", content=[schemas.OutputText("Paris.")])
    )
    response.usage = schemas.ResponseUsage(37, schemas.InputTokensDetails(0), 4, schemas.OutputTokensDetails(0), 41)
    return response


RESPONSE = _example()
PATH = "/v1/responses/{response_id}"

RESPONSES = Dialect(
    tag="OpenAI",
    routers=[router, json_router],
    operations={
        ("/v1/responses", "post"): Operation(
            schemas.ResponseObject, {"input": QUESTION, "max_output_tokens": 20}, AnyEvent, RESPONSE
        ),
        (PATH, "get"): Operation(schemas.ResponseObject, events=AnyEvent, answer_example=RESPONSE),
        (PATH, "delete"): Operation(schemas.DeletedResponse, answer_example=schemas.DeletedResponse(f"resp_{ID}")),
        (f"{PATH}/input_items", "get"): Operation(schemas.ItemList, answer_example=ITEMS),
        (f"{PATH}/cancel", "post"): Operation(schemas.ResponseObject, answer_example=RESPONSE),
        ("/v1/responses/input_tokens", "post"): Operation(
            schemas.InputTokens, {"input": QUESTION}, answer_example=schemas.InputTokens(37)
        ),
    },
    errors=RESPONSES_ERRORS,
    in_workers=False,
)


def _attach(context: ServerContext) -> None:
    settings = context.settings
    context.of_parts[ResponseStore] = ResponseStore(settings.max_stored_responses, settings.stored_responses_memory)


PART = Part(dialects=[RESPONSES], attach=_attach)
