"""`POST /v1/requests/{id}/cancel` ends a request from another connection."""

from fastapi import APIRouter, Request, Response

from server.api.admin.schemas import CancelResponse
from server.context import get_context
from server.http.errors import RequestNotFoundError
from server.http.json_response import StructResponse
from server.tenants import get_owner

router = APIRouter()


@router.post("/v1/requests/{request_id}/cancel")
async def cancel_request(request: Request, request_id: str) -> Response:
    """Cancel a request by its answer's id or its x-request-id. The answer ends with the finish reason `abort`."""
    if not await get_context(request).cancel(request_id, get_owner(request)):
        raise RequestNotFoundError(request_id)
    return StructResponse(CancelResponse(request_id))
