"""Models, running requests, tokens, health and metrics: the routes, and their description.

LoRA adapters are listed as models, after their base model; parts have formats of other APIs. Health endpoints answer
from memory, in any state, without an API key: `/health` and `/readyz` report whether to send requests to this server,
`/healthz` whether to keep the process alive. Texts are processed in threads so as not to block the event loop.
"""

import importlib.metadata
import time

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from server.api.admin.schemas import (
    MAX_TEXT_BYTES,
    CancelResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    LoadProgress,
    Model,
    ModelList,
    ServerVersion,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from server.api.chat.conversion import encode_request, unknown_in_messages
from server.api.model_route import ModelRoute
from server.context import ServerContext, get_context
from server.dialect import BEGINNING, ID, Dialect, Operation
from server.generation.preamble import begin, find_model
from server.generation.prompts import vocab_size
from server.http.access_control import require_admin
from server.http.errors import InvalidURLError, InvalidValueError, ModelNotFoundError, RequestNotFoundError
from server.http.json_route import end_with_client
from server.http.responses import StructResponse
from server.metrics import exposition
from server.models.registry import ModelSlot, ModelState
from server.models.served_model import ServedModel
from server.schemas.sampling import DefaultSampling
from server.tenants import Tenant, get_owner, get_tenant

models_router = APIRouter()
router = APIRouter()
json_router = APIRouter(route_class=ModelRoute)


@models_router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """List the models and their LoRA adapters, with their state."""
    tenant = get_tenant(request)
    models = [_model(request, name) for name in get_context(request).models.names(tenant)]
    return StructResponse(_format(request).of_list(models))


@models_router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> Response:
    """Return one model or LoRA adapter, with its state."""
    if not model_id:
        raise InvalidURLError(request.method, request.scope["path"], "/v1/models")
    return StructResponse(_format(request).of_model(_model(request, model_id)))


@models_router.get("/version")
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


@router.post("/v1/requests/{request_id}/cancel")
async def cancel_request(request: Request, request_id: str) -> Response:
    """Cancel a request by its answer's id or its x-request-id. The answer ends with the finish reason `abort`."""
    if not await get_context(request).cancel(request_id, get_owner(request)):
        raise RequestNotFoundError(request_id)
    return StructResponse(CancelResponse(request_id))


@json_router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Encode a prompt, or messages rendered by the chat template, as token ids."""
    context = get_context(request)
    model = find_model(request, body.model)
    headers = begin(request, body, ignored=unknown_in_messages(body.messages or ())).accept()
    body.check()
    max_model_len = model.base.max_model_len
    start = time.monotonic()
    answer = await context.run_text_work(request, _tokenize, model.base, body, max_model_len)
    model.base.metrics.observe_tokenizer(time.monotonic() - start)
    return context.long_answer(request, answer, headers)


@json_router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Decode token ids to text."""
    context = get_context(request)
    model = find_model(request, body.model)
    headers = begin(request, body).accept()
    _check_token_ids(body.tokens, vocab_size(model.base))
    answer = await context.run_text_work(request, _detokenize, model.base, body)
    return context.long_answer(request, answer, headers)


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """Return the special tokens and the chat template, for clients that render and count by themselves."""
    end_with_client(request.scope)
    context, name = get_context(request), request.query_params.get("model")
    models = context.models
    slot = None if name is None and len(models.slots) > 1 else models.find_slot(name, get_tenant(request))
    async with context.source.loaded(request, slot):
        return StructResponse(_tokenizer_info(find_model(request, name).base))


def _tokenizer_info(model: ServedModel) -> TokenizerInfo:
    tokenizer, template = model.tokenizer, model.chat_template
    return TokenizerInfo(
        model_max_length=model.max_model_len,
        vocab_size=tokenizer.vocab_size,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        add_bos_token=tokenizer.add_bos,
        chat_template=None if template is None else template.source,
    )


def _detokenize(model: ServedModel, body: DetokenizeRequest) -> bytes:
    text = model.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return msgspec.json.encode(DetokenizeResponse(text))


def _tokenize(model: ServedModel, body: TokenizeRequest, max_model_len: int) -> bytes:
    token_ids = _encode_prompt(model, body) if body.messages is None else encode_request(model, body.chat()).token_ids
    token_strs = None
    if body.return_token_strs:
        token_strs = [model.tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids]
    return msgspec.json.encode(TokenizeResponse(len(token_ids), max_model_len, token_ids, token_strs))


def _encode_prompt(model: ServedModel, body: TokenizeRequest) -> list[int]:
    prompt = body.prompt or ""
    _check_size(prompt, "prompt")
    return model.tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens is not False)


def _check_size(text: str, param: str) -> None:
    if (num_bytes := len(text.encode())) > MAX_TEXT_BYTES:
        message = f"Invalid '{param}': text too long. Expected at most {MAX_TEXT_BYTES} bytes, but got {num_bytes}."
        raise InvalidValueError(message, param=param, code="string_above_max_length")


def _check_token_ids(token_ids: list[int], size: int) -> None:
    if token_ids and (largest := max(token_ids)) >= size:
        message = f"Invalid 'tokens': expected token ids from 0 to {size - 1}, but got {largest} instead."
        raise InvalidValueError(message, param="tokens")


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """Return 200 while the engine's step loop and the work on texts make progress. The path is vLLM's."""
    context = get_context(request)
    return context.source.health(is_stuck=context.text_threads.is_stuck)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def alive(request: Request) -> Response:
    """Return 200 while the model loads, or the engine runs or is being restarted; 503 once it is dead or hangs."""
    return get_context(request).source.alive()


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def ready(request: Request) -> Response:
    """Return 200 while new requests are admitted."""
    context = get_context(request)
    return context.source.ready(is_stuck=context.text_threads.is_stuck)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus. With several API keys, an admin key is required."""
    if not get_context(request).settings.public_metrics:
        require_admin(request)
    page, content_type = exposition([slot.metrics for slot in get_context(request).models.slots])
    return Response(page, headers={"content-type": content_type})


MODELS = Dialect(
    tag="OpenAI",
    routers=[models_router],
    operations={
        ("/v1/models", "get"): Operation(ModelList),
        ("/v1/models/{model_id}", "get"): Operation(Model),
        ("/version", "get"): Operation(ServerVersion),
    },
    in_workers=False,
)
TOKENS = Dialect(
    tag="Lightwell",
    routers=[json_router],
    operations={
        ("/tokenize", "post"): Operation(TokenizeResponse, {"prompt": BEGINNING}),
        ("/detokenize", "post"): Operation(DetokenizeResponse, {"tokens": [10, 11, 12]}),
    },
    in_workers=True,
)
ADMIN = Dialect(
    tag="Lightwell",
    routers=[router],
    operations={
        ("/v1/requests/{request_id}/cancel", "post"): Operation(
            CancelResponse, answer_example=CancelResponse(f"chatcmpl-{ID}")
        ),
        ("/tokenizer_info", "get"): Operation(TokenizerInfo),
        ("/health", "get"): Operation(dict[str, str | int]),
        ("/healthz", "get"): Operation(dict[str, str | int]),
        ("/readyz", "get"): Operation(dict[str, str | int]),
        ("/metrics", "get"): Operation(str),
    },
    in_workers=False,
)
