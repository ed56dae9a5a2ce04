"""`POST /v1/requests/{id}/cancel`: the end of a request that is being answered, from outside of its connection."""

from fastapi import APIRouter, Request, Response

from server.context import get_context
from server.errors import RequestNotFoundError
from server.responses import StructResponse
from server.schemas.requests import CancelResponse

router = APIRouter()


@router.post("/v1/requests/{request_id}/cancel")
async def cancel_request(request: Request, request_id: str) -> Response:
    """Ends a request by the id of its answer or by its x-request-id; its answer gets the finish reason `abort`."""
    if not get_context(request).running.cancel(request_id):
        raise RequestNotFoundError(request_id)
    return StructResponse(CancelResponse(request_id))
