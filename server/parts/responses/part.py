"""OpenAI's responses. What is stored belongs together, so only one process has it."""

from functools import reduce
from operator import or_

from server.context import ServerContext
from server.dialect import ID, MODEL, QUESTION, Dialect, Operation
from server.generation.endpoint import AnswerMetadata
from server.part import Part
from server.parts.responses import event_schemas as events
from server.parts.responses.conversion import new_response
from server.parts.responses.routes import json_router, router
from server.parts.responses.schemas import (
    DeletedResponse,
    InputTokens,
    InputTokensDetails,
    ItemList,
    MessageItem,
    OutputText,
    OutputTokensDetails,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
)
from server.parts.responses.store import ResponseStore
from server.parts.responses.writer import RESPONSES_ERRORS

EVENTS = (
    *(events.Created, events.InProgress, events.ItemAdded, events.PartAdded),
    *(events.OutputTextDelta, events.OutputTextDone),
    *(events.ReasoningDelta, events.ReasoningDone, events.ArgumentsDelta, events.ArgumentsDone, events.PartDone),
    *(events.CustomInputDelta, events.CustomInputDone),
    *(events.ItemDone, events.Completed, events.Incomplete, events.Failed, events.ErrorEvent),
)
ITEM = {
    "id": f"msg_{ID}",
    "type": "message",
    "status": "completed",
    "role": "user",
    "content": [{"type": "input_text", "text": QUESTION}],
}
ITEMS = ItemList(data=[ITEM], first_id=f"msg_{ID}", last_id=f"msg_{ID}", has_more=False)


def _example() -> ResponseObject:
    request = ResponsesRequest.model_validate({"model": MODEL, "input": QUESTION})
    response = new_response(request, AnswerMetadata(f"resp_{ID}", 1_764_000_000, MODEL, ""), {})
    response.status = "completed"
    response.output.append(MessageItem(id=f"msg_{ID}", status="completed", content=[OutputText("Paris.")]))
    response.usage = ResponseUsage(37, InputTokensDetails(0), 4, OutputTokensDetails(0), 41)
    return response


RESPONSE = _example()
PATH = "/v1/responses/{response_id}"

RESPONSES = Dialect(
    tag="OpenAI",
    routers=[router, json_router],
    operations={
        ("/v1/responses", "post"): Operation(
            ResponseObject, {"input": QUESTION, "max_output_tokens": 20}, reduce(or_, EVENTS), RESPONSE
        ),
        (PATH, "get"): Operation(ResponseObject, events=reduce(or_, EVENTS), answer_example=RESPONSE),
        (PATH, "delete"): Operation(DeletedResponse, answer_example=DeletedResponse(f"resp_{ID}")),
        (f"{PATH}/input_items", "get"): Operation(ItemList, answer_example=ITEMS),
        (f"{PATH}/cancel", "post"): Operation(ResponseObject, answer_example=RESPONSE),
        ("/v1/responses/input_tokens", "post"): Operation(
            InputTokens, {"input": QUESTION}, answer_example=InputTokens(37)
        ),
    },
    errors=RESPONSES_ERRORS,
    in_workers=False,
)


def _attach(context: ServerContext) -> None:
    settings = context.settings
    context.of_parts[ResponseStore] = ResponseStore(settings.max_stored_responses, settings.stored_responses_memory)


PART = Part(dialects=[RESPONSES], attach=_attach)
