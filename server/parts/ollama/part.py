"""Ollama's API, as far as its clients need it to use a model that is already loaded."""

import importlib.metadata
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.chat.conversion import ChatEndpoint, reads_effort
from server.api.completions.routes import CompletionEndpoint
from server.api.model_route import ModelRoute
from server.context import get_context
from server.dialect import BEGINNING, MESSAGES, Dialect, Operation
from server.generation.pipeline import respond
from server.generation.preamble import begin, find_model
from server.http.errors import APIError
from server.http.json_route import StrictJSONRoute
from server.http.responses import NDJSON, StructResponse
from server.part import Part
from server.parts.conversions.requests import renamed_errors
from server.parts.embeddings.pipeline import respond as respond_with_embeddings
from server.parts.ollama.conversion import (
    EMBED_NAMES,
    EMBEDDINGS_NAMES,
    OllamaEndpoint,
    embed_request,
    embeddings_request,
    error_names,
    generate_to_chat,
    generate_to_completion,
    ignored_names,
    keep_alive_seconds,
    served_name,
    to_chat,
)
from server.parts.ollama.models import find_slot, list_loaded, list_models, show_model
from server.parts.ollama.schemas import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaRequest,
    OllamaShowRequest,
)
from server.parts.ollama.writer import (
    OLLAMA_ERRORS,
    MakeAnswer,
    OllamaChatAnswer,
    OllamaEmbedAnswer,
    OllamaEmbeddingsAnswer,
    OllamaGenerateAnswer,
    OllamaModelInfo,
    OllamaModelList,
    OllamaVersion,
    chat_answer,
    generate_answer,
    loaded_answer,
    write_embedding,
    write_embeddings,
)
from server.tenants import get_tenant

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
        return served_name(request, name)

    async def respond(self, request: Request, fields: dict[str, Any]) -> Response:
        slot = get_context(request).source.find_slot(self, request, fields)
        limit = keep_alive_seconds(fields.get("keep_alive")) if get_tenant(request).is_admin else None
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
async def chat(request: Request, body: OllamaChatRequest) -> Response:
    """Generate the next message of a conversation."""
    if not body.messages:
        return _loaded(request, body, chat_answer)
    context = get_context(request)
    with renamed_errors(error_names(body)):
        model = find_model(request, served_name(request, body.model))
        to_request = partial(to_chat, reads_effort=reads_effort(model.base.chat_template))
        converted = await context.convert(request, to_request, body, model.name)
        endpoint = OllamaEndpoint(ChatEndpoint(), body, chat_answer)
        return await respond(request, converted, endpoint, stream_format=NDJSON)


@router.post("/api/generate")
async def generate(request: Request, body: OllamaGenerateRequest) -> Response:
    """Generate an answer to a prompt."""
    if not body.prompt:
        return _loaded(request, body, generate_answer)
    model = find_model(request, served_name(request, body.model))
    with renamed_errors(error_names(body)):
        if body.raw or body.suffix:
            completion = generate_to_completion(body, model.name)
            raw = OllamaEndpoint(CompletionEndpoint(), body, generate_answer)
            return await respond(request, completion, raw, stream_format=NDJSON)
        converted = generate_to_chat(body, model.name, reads_effort=reads_effort(model.base.chat_template))
        endpoint = OllamaEndpoint(ChatEndpoint(), body, generate_answer, body.context or ())
        return await respond(request, converted, endpoint, stream_format=NDJSON)


def _loaded(request: Request, body: OllamaRequest, make_answer: MakeAnswer) -> Response:
    """Answer a request without a prompt, by which clients load a model or unload it."""
    if getattr(request.state, "unloads", False):
        return _without_input(request, body, loaded_answer(make_answer, body.model, reason="unload"))
    find_model(request, served_name(request, body.model)).base.client.ready_info()
    reason = "unload" if keep_alive_seconds(body.keep_alive) == 0 else "load"
    return _without_input(request, body, loaded_answer(make_answer, body.model, reason=reason))


def _without_input(request: Request, body: OllamaRequest, answer: msgspec.Struct) -> Response:
    """Send an answer that needs no engine, if the request is valid."""
    find_slot(get_context(request).models, served_name(request, body.model), get_tenant(request))
    headers = begin(request, body, ignored=ignored_names(body)).accept()
    return StructResponse(answer, headers=headers)


@router.post("/api/embed")
async def embed_texts(request: Request, body: OllamaEmbedRequest) -> Response:
    """Return the embeddings of one or more texts."""
    if not body.input:
        return _without_input(request, body, OllamaEmbedAnswer(model=body.model, embeddings=[]))
    with renamed_errors(EMBED_NAMES):
        converted = embed_request(body, served_name(request, body.model))
        return await respond_with_embeddings(request, converted, partial(write_embeddings, body))


@router.post("/api/embeddings")
async def embed_text(request: Request, body: OllamaEmbeddingsRequest) -> Response:
    """Return the embedding of one text; the older form of /api/embed."""
    if not body.prompt:
        return _without_input(request, body, OllamaEmbeddingsAnswer([]))
    with renamed_errors(EMBEDDINGS_NAMES):
        converted = embeddings_request(body, served_name(request, body.model))
        return await respond_with_embeddings(request, converted, write_embedding)


file_router = APIRouter(route_class=LenientRoute)  # for what needs no loaded model


@file_router.post("/api/show")
async def show(request: Request, body: OllamaShowRequest) -> Response:
    """Return the properties of a model."""
    context = get_context(request)
    name, tenant = served_name(request, body.model or body.name or ""), get_tenant(request)
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
    limits = {slot.name: context.source.idle_limit(slot) for slot in context.models.slots}
    models = await context.run_text_work(request, list_loaded, context.models, tenant, context.created, limits)
    return StructResponse(models)


@router.head("/api/version", include_in_schema=False)
@router.get("/api/version")
async def version() -> Response:
    """Return the version of Ollama whose API this is, and that of the server."""
    return StructResponse(OllamaVersion(OLLAMA_VERSION, importlib.metadata.version("lightwell")))


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
        ("/api/chat", "post"): Operation(OllamaChatAnswer, CHAT, OllamaChatAnswer, stream_format=NDJSON),
        ("/api/generate", "post"): Operation(
            OllamaGenerateAnswer, GENERATE, OllamaGenerateAnswer, stream_format=NDJSON
        ),
        ("/api/embed", "post"): Operation(OllamaEmbedAnswer, {"input": BEGINNING}, reaches_engine=True),
        ("/api/embeddings", "post"): Operation(OllamaEmbeddingsAnswer, {"prompt": BEGINNING}, reaches_engine=True),
        ("/api/tags", "get"): Operation(OllamaModelList),
        ("/api/ps", "get"): Operation(OllamaModelList),
        ("/api/version", "get"): Operation(OllamaVersion),
    },
    errors=OLLAMA_ERRORS,
    in_workers=True,
)
OLLAMA_FILES = Dialect(
    tag="Ollama",
    routers=[file_router, file_operations],
    operations={("/api/show", "post"): Operation(OllamaModelInfo, {})},
    errors=OLLAMA_ERRORS,
    in_workers=False,
)

PART = Part(dialects=[OLLAMA, OLLAMA_FILES])
