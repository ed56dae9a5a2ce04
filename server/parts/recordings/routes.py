"""`POST /v1/requests/{id}/replay` runs a finished request again."""

from fastapi import APIRouter, Request, Response

from server.context import get_context
from server.http.errors import APIError, clip
from server.http.json_route import end_with_client
from server.http.responses import StructResponse
from server.parts.recordings.replay import replay
from server.parts.recordings.store import Recordings
from server.tenants import get_owner, get_tenant

router = APIRouter()


@router.post("/v1/requests/{request_id}/replay")
async def replay_request(request: Request, request_id: str) -> Response:
    """Run a recorded request again, found by its answer's id or its x-request-id, and compare both answers."""
    end_with_client(request.scope)
    context = get_context(request)
    recordings = context.part(Recordings)
    recording = recordings.get(request_id, get_owner(request))
    if recording is None:
        message = "Requests are not recorded: start the server with --record-requests."
        if num_kept := recordings.max_requests:
            message = f"No request with the id '{clip(request_id)}' is among the last {num_kept} finished requests."
        raise APIError(404, message, code="request_not_found")
    tenant = get_tenant(request)
    async with context.source.loaded(request, context.models.find_slot(recording.model, tenant)):
        return StructResponse(await replay(context, tenant, request_id, recording))
