"""`/v1/models` and `/version`: the served models and the version of the server.

LoRA adapters are listed as models, after their base model. Parts have formats of other APIs.
"""

import importlib.metadata
from typing import Protocol

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from server.api.admin.schemas import LoadProgress, Model, ModelList, ServerVersion
from server.context import ServerContext, get_context
from server.http.errors import InvalidURLError, ModelNotFoundError
from server.http.json_response import StructResponse
from server.models.registry import ModelSlot, ModelState
from server.schemas.default_sampling import DefaultSampling
from server.tenants import Tenant, get_tenant

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """List the models and their LoRA adapters, with their state."""
    tenant = get_tenant(request)
    models = [_model(request, name) for name in get_context(request).models.names(tenant)]
    return StructResponse(_format(request).of_list(models))


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> Response:
    """Return one model or LoRA adapter, with its state."""
    if not model_id:
        raise InvalidURLError(request.method, request.scope["path"], "/v1/models")
    return StructResponse(_format(request).of_model(_model(request, model_id)))


@router.get("/version")
async def version(request: Request) -> Response:
    """Return the version of the server, and the default sampling."""
    served = get_context(request).models.slots[0].served
    sampling = DefaultSampling() if served is None else served.default_sampling
    version = importlib.metadata.version("lightwell")
    return StructResponse(ServerVersion(version, sampling.values, sampling.sources))


class ModelFormat(Protocol):
    """How an API describes models."""

    def of_model(self, model: Model) -> msgspec.Struct: ...

    def of_list(self, models: list[Model]) -> msgspec.Struct: ...


class OpenAIModels:
    """The models in OpenAI's format."""

    def of_model(self, model: Model) -> Model:
        return model

    def of_list(self, models: list[Model]) -> ModelList:
        return ModelList(data=models)


def _format(request: Request) -> ModelFormat:
    """Return the format of the API whose header the client sends."""
    formats = get_context(request).model_formats
    found: ModelFormat = next((formats[name] for name, _ in request.headers.raw if name in formats), OpenAIModels())
    return found


def _model(request: Request, name: str) -> Model:
    """Return the model or adapter with this name. Raises ModelNotFoundError."""
    context, tenant = get_context(request), get_tenant(request)
    slot = _find_slot(context, name, tenant)
    if context.source.unloads and slot.state is not ModelState.LOADED:
        return _unloaded_model(slot, name, context.created, shows_reason=tenant.is_admin)
    model = context.models.find(name, tenant)
    base, adapter, template = model.base, model.adapter, model.base.chat_template
    root = model.name if adapter is None or not tenant.is_admin else adapter.path  # paths are for admins
    return Model(
        id=model.name,
        created=context.created,
        root=base.name if adapter is None else root,
        parent=None if adapter is None else base.name,
        state=ModelState.LOADED,
        max_model_len=base.max_model_len,
        default_max_tokens=context.settings.default_max_tokens,
        default_sampling=base.default_sampling.values,
        default_sampling_sources=base.default_sampling.sources,
        tool_format=None if template is None else template.tool_format_name,
        reasoning_format=None if template is None else template.reasoning_format_name,
    )


def _find_slot(context: ServerContext, name: str, tenant: Tenant) -> ModelSlot:
    slot = context.models.find_slot(name, tenant)
    if slot is None:
        raise ModelNotFoundError(name, context.models.names(tenant))
    return slot


def _unloaded_model(slot: ModelSlot, name: str, created: int, *, shows_reason: bool) -> Model:
    seconds = slot.seconds_loading
    return Model(
        id=name,
        created=created,
        root=slot.name if name in slot.names else name,
        parent=None if name in slot.names else slot.name,
        state=slot.state,
        reason=slot.reason if slot.reason and shows_reason else UNSET,  # it may name files
        loading=UNSET if seconds is None else LoadProgress(seconds, slot.fraction_loaded),
    )
