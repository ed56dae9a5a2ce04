"""`POST /v1/requests/{id}/cancel` ends a request from another connection; `.../replay` runs a finished one again."""

from fastapi import APIRouter, Request, Response

from server.api.admin.replay import replay
from server.api.admin.schemas import CancelResponse
from server.api.model_route import loaded, patience
from server.context import get_context
from server.http.errors import RecordingNotFoundError, RequestNotFoundError
from server.http.json_response import StructResponse
from server.http.json_route import end_with_client
from server.tenants import get_owner, get_tenant

router = APIRouter()


@router.post("/v1/requests/{request_id}/cancel")
async def cancel_request(request: Request, request_id: str) -> Response:
    """Cancel a request by its answer's id or its x-request-id. The answer ends with the finish reason `abort`."""
    if not await get_context(request).cancel(request_id, get_owner(request)):
        raise RequestNotFoundError(request_id)
    return StructResponse(CancelResponse(request_id))


@router.post("/v1/requests/{request_id}/replay")
async def replay_request(request: Request, request_id: str) -> Response:
    """Run a recorded request again, found by its answer's id or its x-request-id, and compare both answers."""
    end_with_client(request.scope)
    context = get_context(request)
    recording = context.recordings.get(request_id, get_owner(request))
    if recording is None:
        raise RecordingNotFoundError(request_id, num_kept=context.recordings.max_requests)
    tenant = get_tenant(request)
    async with loaded(request, context.models.find_slot(recording.model, tenant), patience(request) or 0.0):
        return StructResponse(await replay(context, tenant, request_id, recording))
