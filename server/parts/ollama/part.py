"""Ollama's API, as far as its clients need it to use a model that is already loaded.

Models are described without file names and paths.
"""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from engine.config import ModelConfig, load_model_config
from server.api.chat.routes import ChatEndpoint
from server.api.completions.routes import CompletionEndpoint
from server.context import get_context
from server.dialect import BEGINNING, MESSAGES, Dialect, ModelRoute, Operation
from server.generation.pipeline import respond
from server.generation.preamble import begin, find_model
from server.http.errors import APIError, EngineUnavailableError, ModelNotFoundError
from server.http.responses import NDJSON, StructResponse
from server.http.strict_json import StrictJSONRoute
from server.models.registry import ModelRegistry, ModelSlot
from server.models.served_model import ServedModel
from server.part import Part
from server.part_table import load_module
from server.parts.conversions.chat_requests import renamed_errors
from server.parts.embeddings.part import respond as respond_with_embeddings
from server.parts.hub.weight_files import WeightFiles, describe_weights
from server.parts.ollama import conversion, schemas
from server.parts.ollama.conversion import MAX_DURATION, OPTIONS, tagged_name
from server.parts.ollama.schemas import OllamaModel, OllamaModelDetails, OllamaModelInfo, OllamaModelList, time_text
from server.tenants import Tenant, get_tenant

NEVER = "2318-01-01T00:00:00Z"  # when the model is unloaded
PARAMETERS = {**OPTIONS, "repeat_penalty": "repetition_penalty"}  # Ollama's name -> name in the default sampling
UNITS = ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0))  # size of a unit, its name, digits after the point


def list_models(models: ModelRegistry, tenant: Tenant, created: int) -> OllamaModelList:
    """Return all models for /api/tags. Raises EngineUnavailableError while the only model is being loaded."""
    return OllamaModelList([_model(models, name, tenant, created) for name in models.names(tenant)])


def list_loaded(
    models: ModelRegistry, tenant: Tenant, created: int, seconds_left: Mapping[str, float | None]
) -> OllamaModelList:
    """Return the models in memory, for /api/ps. `seconds_left`: until a model is unloaded, by its name."""
    loaded = []
    for slot in models.slots:
        if (served := slot.served) is None or served.client.dead_reason is not None:
            continue
        for name in slot.all_names(tenant):
            entry = _model(models, name, tenant, created)
            entry.expires_at = _expiry(seconds_left.get(slot.name))
            entry.context_length = served.max_model_len
            entry.size_vram = 0 if served.client.ready_info().device == "cpu" else entry.size
            loaded.append(entry)
    return OllamaModelList(loaded)


def _expiry(seconds_left: float | None) -> str:
    """Return when a model is unloaded if no other request comes."""
    if seconds_left is None or seconds_left > MAX_DURATION:
        return NEVER
    return time_text(datetime.fromtimestamp(time.time() + seconds_left, UTC))


@cache
def _weights(path: str) -> WeightFiles:
    return describe_weights(Path(path))


@cache
def _config(path: str) -> ModelConfig:
    return load_model_config(Path(path))


def show_model(models: ModelRegistry, name: str, tenant: Tenant, created: int) -> OllamaModelInfo:
    """Return the properties of a model for /api/show: those in its files, and if it is loaded, all.

    Raises EngineUnavailableError if its files cannot be read.
    """
    entry = _model(models, name, tenant, created)
    slot = find_slot(models, name, tenant)
    if not entry.details.format:
        raise EngineUnavailableError(f"The files of the model `{name}` cannot be read.")
    info = OllamaModelInfo(
        modelfile=f"FROM {tagged_name(name)}\n",
        parameters="",
        template="",
        details=entry.details,
        model_info=_model_info(slot),
        capabilities=_capabilities(slot.served),
        modified_at=_time(created),
    )
    if slot.served is not None:
        defaults, template = slot.served.default_sampling.values, slot.served.chat_template
        named = {name: defaults[field] for name, field in PARAMETERS.items() if field in defaults}
        info.parameters = "\n".join(f"{name:30} {json.dumps(value)}" for name, value in named.items())
        info.template = "" if template is None else template.source
    return info


def find_slot(models: ModelRegistry, name: str, tenant: Tenant) -> ModelSlot:
    """Return the slot of a model. Raises ModelNotFoundError, or MissingParameterError for an empty name."""
    if (slot := models.find_slot(name, tenant)) is None:
        models.find(name, tenant)
        raise ModelNotFoundError(name)
    return slot


def _model(models: ModelRegistry, name: str, tenant: Tenant, created: int) -> OllamaModel:
    slot, tag = find_slot(models, name, tenant), tagged_name(name)
    served = slot.served
    try:
        size, details = _weights(slot.config.path).num_bytes, _details(slot, name)
    except (OSError, ValueError):  # a file that cannot be read must not hide the other models
        size, details = 0, OllamaModelDetails()
    identity = slot.config.path
    if served is not None:
        identity = models.find(name, tenant).system_fingerprint(served.client.ready_info())
    return OllamaModel(
        name=tag,
        model=tag,
        modified_at=_time(created),
        size=size,
        digest=hashlib.sha256(identity.encode()).hexdigest(),
        details=details,
        capabilities=_capabilities(served),
    )


def _details(slot: ModelSlot, name: str) -> OllamaModelDetails:
    files, config = _weights(slot.config.path), _config(slot.config.path)
    return OllamaModelDetails(
        parent_model="" if name in slot.names else tagged_name(slot.name),
        format=files.format,
        family=config.architecture,
        families=[config.architecture],
        parameter_size=short_number(files.num_parameters),
        quantization_level=files.number_format,
        context_length=_context_length(slot),
        embedding_length=config.hidden_size,
    )


def _context_length(slot: ModelSlot) -> int:
    """Return the maximum length of the context; before the model is loaded, that of the settings or of its files."""
    if slot.served is not None:
        return slot.served.max_model_len
    return slot.config.settings.max_model_len or _config(slot.config.path).max_position_embeddings


def _model_info(slot: ModelSlot) -> dict[str, Any]:
    """Return the metadata by their names in GGUF files. The context length is that of this server."""
    config = _config(slot.config.path)
    attentions = config.attentions.values()
    all_experts = [layer.experts for layer in config.layers if layer.experts is not None]
    of_architecture = {
        "context_length": _context_length(slot),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": _of_layers(layer.mlp.intermediate_size for layer in config.layers if layer.mlp),
        "expert_feed_forward_length": _of_layers(experts.intermediate_size for experts in all_experts),
        "expert_count": _of_layers(experts.router.num_experts for experts in all_experts),
        "expert_used_count": _of_layers(experts.router.num_experts_per_tok for experts in all_experts),
        "attention.head_count": _of_layers(attention.num_heads for attention in attentions),
        "attention.head_count_kv": _of_layers(attention.num_kv_heads for attention in attentions),
        "attention.key_length": _of_layers(attention.head_dim for attention in attentions),
        "vocab_size": config.vocab_size,
    }
    return {
        "general.architecture": config.architecture,
        "general.parameter_count": _weights(slot.config.path).num_parameters,
        **{f"{config.architecture}.{name}": value for name, value in of_architecture.items() if value is not None},
    }


def _of_layers(numbers: Iterable[int]) -> int | list[int] | None:
    """Return one number if it is that of all layers, as GGUF files do, else one for each; None if there are none."""
    found = list(numbers)
    return found[0] if len(set(found)) == 1 else found or None


def _capabilities(model: ServedModel | None) -> list[str]:
    """Return what clients can ask of the model; before it is loaded, what they can ask of every model.

    Tools are described to models whose template does not know them.
    """
    if model is None:
        return ["completion"]
    template = model.chat_template
    available = {
        "completion": True,
        "tools": template is not None,
        "thinking": template is not None and template.reasoning_tags is not None,
        "insert": model.tokenizer.fim is not None,
    }
    return [name for name, is_available in available.items() if is_available]


def _time(created: int) -> str:
    return time_text(datetime.fromtimestamp(created, UTC))


def short_number(number: int) -> str:
    """Return 134515008 as `134.52M`, as Ollama does."""
    for size, name, num_digits in UNITS:
        if number >= size:
            return f"{number / size:.{0 if number % size == 0 else num_digits}f}{name}"
    return str(number)


OLLAMA_VERSION = "0.32.15"


class LenientRoute(StrictJSONRoute):
    """A route for JSON bodies of any Content-Type: curl as in Ollama's documentation sends none for JSON.

    A web page must say that its body is JSON, so that its browser asks first whether it may send it.
    """

    def check_media_type(self, request: Request, content_type: bytes) -> None:
        if "origin" in request.headers:
            super().check_media_type(request, content_type)


class OllamaRoute(LenientRoute, ModelRoute):
    """A route for requests to a model. While it is loaded, a client gets no lines, as from Ollama."""

    def served_name(self, request: Request, name: str) -> str:
        return conversion.served_name(request, name)

    async def respond(self, request: Request, fields: dict[str, Any]) -> Response:
        if not get_context(request).models.unloads:
            return await super().respond(request, fields)
        slot = load_module("models", "waiting").find_slot(self, request, fields)
        limit = conversion.keep_alive_seconds(fields.get("keep_alive")) if get_tenant(request).is_admin else None
        if slot is None or limit is None:
            return await super().respond(request, fields)
        del fields["keep_alive"]  # which the handler would report as ignored
        request.state.unloads = limit == 0 and not any(fields.get(name) for name in ("prompt", "messages", "input"))
        respond = partial(StrictJSONRoute.respond, self) if request.state.unloads else super().respond
        response = await respond(request, fields)
        if slot.served is not None:
            slot.idle_limit = limit
        return response


router = APIRouter(route_class=OllamaRoute)


@router.post("/api/chat")
async def chat(request: Request, body: schemas.OllamaChatRequest) -> Response:
    """Generate the next message of a conversation."""
    if not body.messages:
        return _loaded(request, body)
    context = get_context(request)
    with renamed_errors(conversion.error_names(body)):
        model = find_model(request, conversion.served_name(request, body.model))
        converted = await context.convert(request, conversion.to_chat, body, model)
        endpoint = conversion.OllamaEndpoint(ChatEndpoint(), body)
        return await respond(request, converted, endpoint, stream_format=NDJSON)


@router.post("/api/generate")
async def generate(request: Request, body: schemas.OllamaGenerateRequest) -> Response:
    """Generate an answer to a prompt."""
    if not body.prompt:
        return _loaded(request, body)
    model = find_model(request, conversion.served_name(request, body.model))
    with renamed_errors(conversion.error_names(body)):
        if body.raw or body.suffix:
            completion = conversion.generate_to_completion(body, model)
            raw = conversion.OllamaEndpoint(CompletionEndpoint(), body)
            return await respond(request, completion, raw, stream_format=NDJSON)
        converted = conversion.generate_to_chat(body, model)
        endpoint = conversion.OllamaEndpoint(ChatEndpoint(), body, body.context or ())
        return await respond(request, converted, endpoint, stream_format=NDJSON)


def _loaded(request: Request, body: schemas.OllamaAnswerRequest) -> Response:
    """Answer a request without a prompt, by which clients load a model or unload it."""
    unloads = getattr(request.state, "unloads", False)
    if not unloads:
        find_model(request, conversion.served_name(request, body.model)).base.client.ready_info()
    answer = schemas.new_answer(body)
    answer.done, answer.done_reason = (
        True,
        "unload" if unloads or conversion.keep_alive_seconds(body.keep_alive) == 0 else "load",
    )
    return _without_input(request, body, answer)


def _without_input(request: Request, body: schemas.OllamaRequest, answer: msgspec.Struct) -> Response:
    """Send an answer that needs no engine, if the request is valid."""
    find_slot(get_context(request).models, conversion.served_name(request, body.model), get_tenant(request))
    headers = begin(request, body, ignored=conversion.ignored_names(body)).accept()
    return StructResponse(answer, headers=headers)


@router.post("/api/embed")
async def embed_texts(request: Request, body: schemas.OllamaEmbedRequest) -> Response:
    """Return the embeddings of one or more texts."""
    if not body.input:
        return _without_input(request, body, schemas.OllamaEmbedAnswer(model=body.model, embeddings=[]))
    with renamed_errors(conversion.EMBED_NAMES):
        converted = conversion.embed_request(body, conversion.served_name(request, body.model))
        return await respond_with_embeddings(request, converted, partial(schemas.write_embeddings, body))


@router.post("/api/embeddings")
async def embed_text(request: Request, body: schemas.OllamaEmbeddingsRequest) -> Response:
    """Return the embedding of one text; the older form of /api/embed."""
    if not body.prompt:
        return _without_input(request, body, schemas.OllamaEmbeddingsAnswer([]))
    with renamed_errors(conversion.EMBEDDINGS_NAMES):
        converted = conversion.embeddings_request(body, conversion.served_name(request, body.model))
        return await respond_with_embeddings(request, converted, schemas.write_embedding)


file_router = APIRouter(route_class=LenientRoute)  # for what needs no loaded model


@file_router.post("/api/show")
async def show(request: Request, body: schemas.OllamaShowRequest) -> Response:
    """Return the properties of a model."""
    context = get_context(request)
    name, tenant = conversion.served_name(request, body.model or body.name or ""), get_tenant(request)
    find_slot(context.models, name, tenant)
    headers = begin(request, body).accept()
    info = await context.run_text_work(request, show_model, context.models, name, tenant, context.created)
    return StructResponse(info, headers=headers)


@router.head("/api/tags", include_in_schema=False)
@router.get("/api/tags")
async def tags(request: Request) -> Response:
    """List the models and their LoRA adapters."""
    context, tenant = get_context(request), get_tenant(request)
    models = await context.run_text_work(request, list_models, context.models, tenant, context.created)
    return StructResponse(models)


@router.get("/api/ps")
async def running(request: Request) -> Response:
    """List the models in memory."""
    context, tenant = get_context(request), get_tenant(request)
    models: Any = context.models  # one that unloads some has `seconds_left`
    left = models.seconds_left() if models.unloads else {}
    return StructResponse(await context.run_text_work(request, list_loaded, models, tenant, context.created, left))


@router.head("/api/version", include_in_schema=False)
@router.get("/api/version")
async def version() -> Response:
    """Return the version of Ollama whose API this is, and that of the server."""
    return StructResponse(schemas.OllamaVersion(OLLAMA_VERSION, importlib.metadata.version("lightwell")))


file_operations = APIRouter()  # which need no valid body to be refused


@file_operations.post("/api/pull", include_in_schema=False)
@file_operations.post("/api/push", include_in_schema=False)
@file_operations.post("/api/create", include_in_schema=False)
@file_operations.post("/api/copy", include_in_schema=False)
@file_operations.delete("/api/delete", include_in_schema=False)
@file_operations.head("/api/blobs/{digest}", include_in_schema=False)
@file_operations.post("/api/blobs/{digest}", include_in_schema=False)
async def not_implemented(request: Request) -> Response:
    """Refuse an operation on model files."""
    name = request.url.path.removeprefix("/api/").partition("/")[0]
    message = f"'{name}' is not supported: the model and its adapters are chosen when this server is started."
    raise APIError(501, message, code="not_implemented", headers={"x-should-retry": "false"})


REQUEST = {"stream": False, "options": {"num_predict": 20}}
CHAT = {"messages": MESSAGES, **REQUEST}
GENERATE = {"prompt": "Why is the sky blue?", **REQUEST}

OLLAMA = Dialect(
    tag="Ollama",
    routers=[router],
    operations={
        ("/api/chat", "post"): Operation(
            schemas.OllamaChatAnswer, CHAT, schemas.OllamaChatAnswer, stream_format=NDJSON
        ),
        ("/api/generate", "post"): Operation(
            schemas.OllamaGenerateAnswer, GENERATE, schemas.OllamaGenerateAnswer, stream_format=NDJSON
        ),
        ("/api/embed", "post"): Operation(schemas.OllamaEmbedAnswer, {"input": BEGINNING}, reaches_engine=True),
        ("/api/embeddings", "post"): Operation(
            schemas.OllamaEmbeddingsAnswer, {"prompt": BEGINNING}, reaches_engine=True
        ),
        ("/api/tags", "get"): Operation(schemas.OllamaModelList),
        ("/api/ps", "get"): Operation(schemas.OllamaModelList),
        ("/api/version", "get"): Operation(schemas.OllamaVersion),
    },
    errors=schemas.OLLAMA_ERRORS,
    in_workers=True,
)
OLLAMA_FILES = Dialect(
    tag="Ollama",
    routers=[file_router, file_operations],
    operations={("/api/show", "post"): Operation(schemas.OllamaModelInfo, {})},
    errors=schemas.OLLAMA_ERRORS,
    in_workers=False,
)

PART = Part(dialects=[OLLAMA, OLLAMA_FILES])
