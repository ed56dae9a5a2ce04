"""`/v1/models` and `/version`: the served models and the version of the server.

LoRA adapters are listed as models, after their base model. Anthropic clients get models in Anthropic's format.
"""

import importlib.metadata
from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from server.api.admin.schemas import AnthropicModel, AnthropicModelList, Model, ModelList, ServerVersion
from server.context import ServerContext, get_context
from server.http.errors import InvalidURLError, is_for_anthropic
from server.http.json_response import StructResponse
from server.models.served_model import ModelVariant
from server.tenants import Tenant, get_tenant

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """List the served models and their LoRA adapters."""
    context, tenant = get_context(request), get_tenant(request)
    variants = context.models.variants(tenant)
    if is_for_anthropic(request.scope):
        models = [_anthropic_model(context, model) for model in variants]
        return StructResponse(AnthropicModelList(data=models, first_id=models[0].id, last_id=models[-1].id))
    return StructResponse(ModelList(data=[_model(context, model, tenant) for model in variants]))


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> Response:
    """Return one model or LoRA adapter."""
    context = get_context(request)
    if not model_id:
        raise InvalidURLError(request.method, request.scope["path"], "/v1/models")
    tenant = get_tenant(request)
    model = context.models.find(model_id, tenant)
    if is_for_anthropic(request.scope):
        return StructResponse(_anthropic_model(context, model))
    return StructResponse(_model(context, model, tenant))


@router.get("/version")
async def version(request: Request) -> Response:
    """Return the version of the server, and the default sampling."""
    sampling = get_context(request).models.default.default_sampling
    version = importlib.metadata.version("lightwell")
    return StructResponse(ServerVersion(version, sampling.values, sampling.sources))


def _model(context: ServerContext, model: ModelVariant, tenant: Tenant) -> Model:
    base, adapter, template = model.base, model.adapter, model.base.chat_template
    root = model.name if adapter is None or not tenant.is_admin else adapter.path  # paths are for admins
    return Model(
        id=model.name,
        created=context.created,
        root=base.name if adapter is None else root,
        parent=None if adapter is None else base.name,
        max_model_len=base.max_model_len,
        default_max_tokens=context.settings.default_max_tokens,
        default_sampling=base.default_sampling.values,
        default_sampling_sources=base.default_sampling.sources,
        tool_format=None if template is None else template.tool_format_name,
        reasoning_format=None if template is None else template.reasoning_format_name,
    )


def _anthropic_model(context: ServerContext, model: ModelVariant) -> AnthropicModel:
    created_at = datetime.fromtimestamp(context.created, UTC).isoformat().replace("+00:00", "Z")
    return AnthropicModel(
        id=model.name, display_name=model.name, created_at=created_at, max_input_tokens=model.base.max_model_len
    )
