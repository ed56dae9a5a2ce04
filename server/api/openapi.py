"""The OpenAPI document: FastAPI's, of routes and requests, with examples that work and what comes back.

Requests are pydantic models, which FastAPI describes; answers are msgspec structs, which are described here.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server.api.admin.model_schemas import Model, ModelList
from server.api.admin.request_schemas import CancelResponse, Replay
from server.api.admin.tokenize_schemas import DetokenizeResponse, TokenizeResponse
from server.api.chat.schemas import ChatCompletion, ChatCompletionChunk
from server.api.completions.schemas import Completion
from server.api.embeddings.schemas import EmbeddingList
from server.api.messages.schemas import (
    BlockDelta,
    BlockStart,
    BlockStop,
    CountTokensResponse,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    MessageUsage,
    Text,
)
from server.api.responses import event_schemas as events
from server.api.responses.conversion import new_response
from server.api.responses.schemas import (
    DeletedResponse,
    InputTokens,
    InputTokensDetails,
    ItemList,
    MessageItem,
    OutputText,
    OutputTokensDetails,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
)
from server.generation.endpoint import Head
from server.http.error_schemas import AnthropicErrorResponse, ErrorResponse
from server.schemas.render import RenderedPrompt

PREFIX = "answer."  # of names, for requests may have the same ones
DESCRIPTION = "Language models over HTTP, in the forms that the clients of OpenAI and Anthropic speak."


@dataclass(frozen=True)
class Operation:
    """What FastAPI cannot know of one. `example` is a body that any model answers, if that is named first."""

    answer: Any  # a type that msgspec encodes
    example: Mapping[str, Any] | None = None
    events: Any = None  # the data of a stream's events
    shown: Any = None  # an answer, as an example
    has_model: bool = True  # whether a request names one

    @property
    def types(self) -> list[Any]:
        return [self.answer] if self.events is None else [self.answer, self.events]

    @property
    def is_of_engine(self) -> bool:
        """Whether it asks the engine for something, or says what it would ask."""
        generates = self.events is not None and self.example is not None
        return generates or self.answer in (RenderedPrompt, list[RenderedPrompt], EmbeddingList)


MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"messages": MESSAGES, "max_completion_tokens": 20}
COMPLETION = {"prompt": "Once upon a time", "max_tokens": 20}
ADAPTER = {"lora_name": "sql"}
ADAPTER_DONE = "Success: LoRA adapter 'sql' {} successfully."
RESPONSE_EVENTS = (
    *(events.Created, events.InProgress, events.ItemAdded, events.PartAdded, events.TextDelta, events.TextDone),
    *(events.ReasoningDelta, events.ReasoningDone, events.ArgumentsDelta, events.ArgumentsDone, events.PartDone),
    *(events.ItemDone, events.Completed, events.Incomplete, events.Failed, events.ErrorEvent),
)


NAME, ID = "smollm2-135m", "0f" * 16
SHOWN_MESSAGE = Message(
    id=f"msg_{ID}",
    model=NAME,
    content=[Text("Paris.")],
    stop_reason="end_turn",
    stop_sequence=None,
    usage=MessageUsage(input_tokens=37, cache_read_input_tokens=0, output_tokens=4),
)
SHOWN_PROMPT = RenderedPrompt(
    request_id=f"cmpl-{ID}-0",
    model=NAME,
    prompt="Once upon a time",
    token_ids=[6403, 2980, 253, 655],
    max_tokens=20,
    sampling_params={"max_tokens": 20, "temperature": 1.0, "seed": None},
)


def _shown_response() -> ResponseObject:
    request = ResponsesRequest.model_validate({"model": NAME, "input": "What is the capital of France?"})
    response = new_response(request, Head(f"resp_{ID}", 1_764_000_000, NAME, ""), {})
    response.status = "completed"
    response.output.append(MessageItem(id=f"msg_{ID}", status="completed", content=[OutputText("Paris.")]))
    response.usage = ResponseUsage(37, InputTokensDetails(0), 4, OutputTokensDetails(0), 41)
    return response


SHOWN_RESPONSE = _shown_response()
SHOWN_ITEM = {
    "id": f"msg_{ID}",
    "type": "message",
    "status": "completed",
    "role": "user",
    "content": [{"type": "input_text", "text": "What is the capital of France?"}],
}
SHOWN_ITEMS = ItemList(data=[SHOWN_ITEM], first_id=f"msg_{ID}", last_id=f"msg_{ID}", has_more=False)


def _any_of(types: tuple[Any, ...]) -> Any:
    union = types[0]
    for each in types[1:]:
        union |= each
    return union


OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("/v1/chat/completions", "post"): Operation(ChatCompletion, CHAT, ChatCompletionChunk),
    ("/v1/chat/completions/render", "post"): Operation(RenderedPrompt, CHAT, shown=SHOWN_PROMPT),
    ("/v1/completions", "post"): Operation(Completion, COMPLETION, Completion),
    ("/v1/completions/render", "post"): Operation(list[RenderedPrompt], COMPLETION, shown=[SHOWN_PROMPT]),
    ("/v1/embeddings", "post"): Operation(EmbeddingList, {"input": "Once upon a time"}),
    ("/v1/messages", "post"): Operation(
        Message,
        {"messages": MESSAGES, "max_tokens": 20},
        _any_of((MessageStart, BlockStart, BlockDelta, BlockStop, MessageDelta, MessageStop)),
        SHOWN_MESSAGE,
    ),
    ("/v1/messages/count_tokens", "post"): Operation(
        CountTokensResponse, {"messages": MESSAGES}, shown=CountTokensResponse(37)
    ),
    ("/v1/responses", "post"): Operation(
        ResponseObject,
        {"input": "What is the capital of France?", "max_output_tokens": 20},
        _any_of(RESPONSE_EVENTS),
        SHOWN_RESPONSE,
    ),
    ("/v1/responses/{response_id}", "get"): Operation(
        ResponseObject, events=_any_of(RESPONSE_EVENTS), shown=SHOWN_RESPONSE
    ),
    ("/v1/responses/{response_id}", "delete"): Operation(DeletedResponse, shown=DeletedResponse(f"resp_{ID}")),
    ("/v1/responses/{response_id}/input_items", "get"): Operation(ItemList, shown=SHOWN_ITEMS),
    ("/v1/responses/{response_id}/cancel", "post"): Operation(ResponseObject, shown=SHOWN_RESPONSE),
    ("/v1/responses/input_tokens", "post"): Operation(
        InputTokens, {"input": "What is the capital of France?"}, shown=InputTokens(37)
    ),
    ("/v1/requests/{request_id}/cancel", "post"): Operation(CancelResponse, shown=CancelResponse(f"chatcmpl-{ID}")),
    ("/v1/requests/{request_id}/replay", "post"): Operation(Replay),
    ("/v1/load_lora_adapter", "post"): Operation(
        str, ADAPTER | {"lora_path": "./adapters/sql"}, shown=ADAPTER_DONE.format("added"), has_model=False
    ),
    ("/v1/unload_lora_adapter", "post"): Operation(str, ADAPTER, shown=ADAPTER_DONE.format("removed"), has_model=False),
    ("/v1/models", "get"): Operation(ModelList),
    ("/v1/models/{model_id}", "get"): Operation(Model),
    ("/version", "get"): Operation(dict[str, str]),
    ("/tokenize", "post"): Operation(TokenizeResponse, {"prompt": "Once upon a time"}),
    ("/detokenize", "post"): Operation(DetokenizeResponse, {"tokens": [10, 11, 12]}),
    ("/health", "get"): Operation(dict[str, str]),
    ("/healthz", "get"): Operation(dict[str, str]),
    ("/readyz", "get"): Operation(dict[str, str]),
    ("/metrics", "get"): Operation(str),
}


def install_document(app: FastAPI, model: str, *, needs_key: bool) -> None:
    """Makes FastAPI's routes for the document answer with this one, made once. `model` is what its examples name."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = make_document(app, model, needs_key=needs_key)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def make_document(app: FastAPI, model: str, *, needs_key: bool) -> dict[str, Any]:
    version = importlib.metadata.version("lightwell")
    document = get_openapi(title="Lightwell", version=version, description=DESCRIPTION, routes=app.routes)
    types = [type for operation in OPERATIONS.values() for type in operation.types]
    template = "#/components/schemas/" + PREFIX + "{name}"
    schemas, components = msgspec.json.schema_components(
        [*types, ErrorResponse, AnthropicErrorResponse], ref_template=template
    )
    described = {repr(type): schema for type, schema in zip(types, schemas, strict=False)}
    openai_error, anthropic_error = schemas[-2:]
    for path, methods in document["paths"].items():
        error = anthropic_error if path.startswith("/v1/messages") else openai_error
        for method, described_operation in methods.items():
            operation = OPERATIONS[path, method]
            described_operation["responses"] = _responses(operation, described, error)
            if operation.example is not None:
                content = described_operation["requestBody"]["content"]["application/json"]
                content["example"] = {**({"model": model} if operation.has_model else {}), **operation.example}
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's, which no answer is
        del document["components"]["schemas"][name]
    document["components"]["schemas"] |= {PREFIX + name: schema for name, schema in components.items()}
    if needs_key:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"x-api-key": []}]
    return document


def _header(description: str, *, required: bool = False, **schema: Any) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": {"type": "string", **schema}}


REQUEST_ID = {"x-request-id": _header("The request's own, or one that the server has made up.", required=True)}
GENERATION = {
    "x-lightwell-seed": _header("The seed that was used.", pattern="^-?[0-9]+$"),
    "x-lightwell-deterministic": _header("Whether the answer is the same at any load.", enum=["true", "false"]),
    "x-lightwell-warnings": _header("Parameters that were ignored: unknown ones, and those without effect."),
}
OF_ERRORS = {
    "retry-after": _header("With 429 and 503: seconds after which to try again.", pattern="^[0-9]+$"),
    "www-authenticate": _header("With 401: how to send a key."),
}


def _responses(operation: Operation, described: Mapping[str, Any], error: Mapping[str, Any]) -> dict[str, Any]:
    kind = "text/plain" if operation.answer is str else "application/json"
    content = {kind: {"schema": described[repr(operation.answer)]}}
    if operation.shown is not None:
        content[kind]["example"] = msgspec.to_builtins(operation.shown)
    description = "The answer."
    if operation.events is not None:
        content["text/event-stream"] = {"schema": described[repr(operation.events)]}
        description = "The answer; with `stream` server-sent events, each with such data."
    headers = REQUEST_ID | GENERATION if operation.is_of_engine else REQUEST_ID
    wrong = {
        "description": "An error.",
        "headers": REQUEST_ID | OF_ERRORS,
        "content": {"application/json": {"schema": error}},
    }
    right = {"description": description, "headers": headers, "content": content}
    return {"200": right, "4XX": wrong, "5XX": wrong}
