"""`/v1/models` and `/version`: what is served, and by what."""

import importlib.metadata

from fastapi import APIRouter, Request, Response

from server.context import ServerContext, get_context
from server.errors import ModelNotFoundError
from server.responses import StructResponse
from server.schemas.models import Model, ModelList

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    context = get_context(request)
    return StructResponse(ModelList(data=[_model(context, name) for name in context.model_names]))


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> Response:
    context = get_context(request)
    if model_id not in context.model_names:
        raise ModelNotFoundError(model_id)
    return StructResponse(_model(context, model_id))


@router.get("/version")
async def version() -> Response:
    return StructResponse({"version": importlib.metadata.version("lightwell")})


def _model(context: ServerContext, name: str) -> Model:
    return Model(id=name, created=context.created, root=context.model_names[0], max_model_len=context.max_model_len)
