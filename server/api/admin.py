"""Models, running requests, health and metrics: the routes, and their description.

LoRA adapters are listed as models, after their base model; parts have formats of other APIs. Health endpoints answer
from memory, in any state, without an API key: `/health` and `/readyz` report whether to send requests to this server,
`/healthz` whether to keep the process alive.
"""

import importlib.metadata
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from server.context import get_context
from server.dialect import ID, Dialect, Operation
from server.http.access_control import require_admin
from server.http.errors import APIError, InvalidURLError, ModelNotFoundError, clip
from server.http.responses import StructResponse
from server.schemas.sampling import DefaultSampling
from server.tenants import get_owner, get_tenant

router = APIRouter()

# `GET /v1/models`: OpenAI's fields with vLLM's `root`, `parent` and `max_model_len`.


class LoadProgress(msgspec.Struct, frozen=True):
    """How far the load of a model is."""

    seconds: float  # since it was requested
    fraction: float | None  # of the time that the last load took; None: it has not been loaded before


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int  # seconds since the epoch
    owned_by: str = "lightwell"
    root: str  # for a LoRA adapter: its path
    parent: str | None = None  # for a LoRA adapter: the id of its base model
    state: Literal["unloaded", "loading", "loaded", "failed"] = "loaded"
    reason: str | UnsetType = UNSET  # why it has failed
    loading: LoadProgress | UnsetType = UNSET
    max_model_len: int | None = None  # tokens. None: not known before the model is loaded, like what follows
    default_max_tokens: int | None = None  # --default-max-tokens; None: the rest of the context
    default_sampling: Mapping[str, Any] = {}  # for fields that requests leave out; others have OpenAI's defaults
    default_sampling_sources: Mapping[str, str] = {}  # where each of these comes from
    # How the model writes tool calls: the format's name; `generic` where the chat template has no form of its own, and
    # `unrecognized` where it has one that the server does not know. None: the model has no chat template.
    tool_format: str | None = None
    reasoning_format: str | None = None  # tag that begins reasoning, or `unrecognized`. None: the model does not reason


class ServerVersion(msgspec.Struct, frozen=True):
    version: str
    default_sampling: Mapping[str, Any]
    default_sampling_sources: Mapping[str, str]


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


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


class ModelFormat:
    """How an API describes models: this is OpenAI's."""

    def of_model(self, model: Model) -> msgspec.Struct:
        return model

    def of_list(self, models: list[Model]) -> msgspec.Struct:
        return ModelList(data=models)


def _format(request: Request) -> ModelFormat:
    """Return the format of the API whose header the client sends."""
    formats = get_context(request).model_formats
    found: ModelFormat = next((formats[name] for name, _ in request.headers.raw if name in formats), ModelFormat())
    return found


def _model(request: Request, name: str) -> Model:
    """Return the model or adapter with this name. Raises ModelNotFoundError."""
    context, tenant = get_context(request), get_tenant(request)
    slot = context.models.find_slot(name, tenant)
    if slot is None:
        raise ModelNotFoundError(name, context.models.names(tenant))
    if (fields := slot.unloaded_fields(tenant)) is not None:
        root, parent = (slot.name, None) if name in slot.names else (name, slot.name)
        return Model(id=name, created=context.created, root=root, parent=parent, **fields)
    model = context.models.find(name, tenant)
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


class CancelResponse(msgspec.Struct, frozen=True):
    id: str
    cancelled: Literal[True] = True


@router.post("/v1/requests/{request_id}/cancel")
async def cancel_request(request: Request, request_id: str) -> Response:
    """Cancel a request by its answer's id or its x-request-id. The answer ends with the finish reason `abort`."""
    if not await get_context(request).cancel(request_id, get_owner(request)):
        message = f"No request with the id '{clip(request_id)}' is running."
        raise APIError(404, message, code="request_not_found")
    return StructResponse(CancelResponse(request_id))


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """Return 200 while the engine's step loop and the work on texts make progress. The path is vLLM's."""
    context = get_context(request)
    return context.models.health(is_stuck=context.text_threads.is_stuck)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def alive(request: Request) -> Response:
    """Return 200 while the model loads, or the engine runs or is being restarted; 503 once it is dead or hangs."""
    return get_context(request).models.alive()


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def ready(request: Request) -> Response:
    """Return 200 while new requests are admitted."""
    context = get_context(request)
    return context.models.ready(is_stuck=context.text_threads.is_stuck)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus. With several API keys, an admin key is required."""
    if not get_context(request).settings.public_metrics:
        require_admin(request)
    # As text: the library's OpenMetrics format would replace the colon in a prefix such as `vllm:` with an underscore.
    page = generate_latest(get_context(request).models.metrics)
    return Response(page, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


ADMIN = Dialect(
    tag="Lightwell",
    routers=[router],
    operations={
        ("/v1/models", "get"): Operation(ModelList),
        ("/v1/models/{model_id}", "get"): Operation(Model),
        ("/version", "get"): Operation(ServerVersion),
        ("/v1/requests/{request_id}/cancel", "post"): Operation(
            CancelResponse, answer_example=CancelResponse(f"chatcmpl-{ID}")
        ),
        ("/health", "get"): Operation(dict[str, str | int]),
        ("/healthz", "get"): Operation(dict[str, str | int]),
        ("/readyz", "get"): Operation(dict[str, str | int]),
        ("/metrics", "get"): Operation(str),
    },
    in_workers=False,
)
