"""The OpenAPI document: FastAPI's description of routes and requests, completed with examples and answers.

Requests are pydantic models, which FastAPI describes; answers are msgspec structs, which are described here.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server.api.admin.schemas import (
    CancelResponse,
    DetokenizeResponse,
    Model,
    ModelList,
    Replay,
    ServerVersion,
    TokenizeResponse,
    TokenizerInfo,
    UsageList,
)
from server.api.chat.schemas import ChatCompletion, ChatCompletionChunk
from server.api.completions.schemas import Completion
from server.api.embeddings.schemas import EmbeddingList
from server.api.inspection.schemas import (
    BlockMap,
    EngineView,
    Inspection,
    QueueList,
    RequestDetails,
    RequestList,
    StepList,
    Trace,
)
from server.api.messages.schemas import (
    AnthropicMessage,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    CountTokensResponse,
    MessageDelta,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputTextBlock,
)
from server.api.ollama.schemas import (
    OllamaChatAnswer,
    OllamaEmbedAnswer,
    OllamaEmbeddingsAnswer,
    OllamaGenerateAnswer,
    OllamaModelInfo,
    OllamaModelList,
    OllamaVersion,
)
from server.api.rerank.schemas import RerankAnswer, ScoreList
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
from server.generation.endpoint import AnswerMetadata
from server.http.error_schemas import AnthropicErrorResponse, ErrorResponse, OllamaErrorResponse
from server.http.sse import NDJSON, SERVER_SENT_EVENTS, StreamFormat
from server.schemas.rendered_prompt import RenderedPrompt

PREFIX = "answer."  # of component names, which would collide with those of requests
DESCRIPTION = "Language models over HTTP, compatible with clients of the APIs of OpenAI, Anthropic and Ollama."


@dataclass(frozen=True)
class Operation:
    """The parts of an operation's description that FastAPI cannot derive."""

    answer: Any  # a type that msgspec encodes; None: the answer is always a stream
    example: Mapping[str, Any] | None = None  # a body that works with any model; its `model` is added
    events: Any = None  # type of the data of a stream's events
    answer_example: Any = None
    has_model: bool = True  # the body has a `model`
    stream_format: StreamFormat = SERVER_SENT_EVENTS

    @property
    def types(self) -> list[Any]:
        return [each for each in (self.answer, self.events) if each is not None]

    @property
    def reports_generation(self) -> bool:
        """True if the answer has headers about generation: the operation submits to the engine, or renders a submit."""
        generates = self.events is not None and self.example is not None
        return generates or self.answer in SAMPLE_FREE


# Answers of requests that reach the engine, or would, without sampling.
EMBEDDINGS = (EmbeddingList, OllamaEmbedAnswer, OllamaEmbeddingsAnswer)
SAMPLE_FREE = (RenderedPrompt, list[RenderedPrompt], *EMBEDDINGS, RerankAnswer, ScoreList)
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"messages": MESSAGES, "max_completion_tokens": 20}
OLLAMA = {"stream": False, "options": {"num_predict": 20}}
COMPLETION = {"prompt": "Once upon a time", "max_tokens": 20}
ADAPTER = {"lora_name": "sql"}
ADAPTER_DONE = "Success: LoRA adapter 'sql' {} successfully."
RESPONSE_EVENTS = (
    *(
        events.Created,
        events.InProgress,
        events.ItemAdded,
        events.PartAdded,
        events.OutputTextDelta,
        events.OutputTextDone,
    ),
    *(events.ReasoningDelta, events.ReasoningDone, events.ArgumentsDelta, events.ArgumentsDone, events.PartDone),
    *(events.CustomInputDelta, events.CustomInputDone),
    *(events.ItemDone, events.Completed, events.Incomplete, events.Failed, events.ErrorEvent),
)


NAME, ID = "smollm2-135m", "0f" * 16
EXAMPLE_MESSAGE = AnthropicMessage(
    id=f"msg_{ID}",
    model=NAME,
    content=[OutputTextBlock("Paris.")],
    stop_reason="end_turn",
    stop_sequence=None,
    usage=MessageUsage(input_tokens=37, cache_read_input_tokens=0, output_tokens=4),
)
EXAMPLE_PROMPT = RenderedPrompt(
    request_id=f"cmpl-{ID}-0",
    model=NAME,
    prompt="Once upon a time",
    token_ids=[6403, 2980, 253, 655],
    max_tokens=20,
    sampling_params={"max_tokens": 20, "temperature": 1.0, "seed": None},
)


def _example_response() -> ResponseObject:
    request = ResponsesRequest.model_validate({"model": NAME, "input": "What is the capital of France?"})
    response = new_response(request, AnswerMetadata(f"resp_{ID}", 1_764_000_000, NAME, ""), {})
    response.status = "completed"
    response.output.append(MessageItem(id=f"msg_{ID}", status="completed", content=[OutputText("Paris.")]))
    response.usage = ResponseUsage(37, InputTokensDetails(0), 4, OutputTokensDetails(0), 41)
    return response


EXAMPLE_RESPONSE = _example_response()
EXAMPLE_ITEM = {
    "id": f"msg_{ID}",
    "type": "message",
    "status": "completed",
    "role": "user",
    "content": [{"type": "input_text", "text": "What is the capital of France?"}],
}
EXAMPLE_ITEMS = ItemList(data=[EXAMPLE_ITEM], first_id=f"msg_{ID}", last_id=f"msg_{ID}", has_more=False)


def _any_of(types: tuple[Any, ...]) -> Any:
    union = types[0]
    for each in types[1:]:
        union |= each
    return union


OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("/v1/chat/completions", "post"): Operation(ChatCompletion, CHAT, ChatCompletionChunk),
    ("/v1/chat/completions/render", "post"): Operation(RenderedPrompt, CHAT, answer_example=EXAMPLE_PROMPT),
    ("/v1/completions", "post"): Operation(Completion, COMPLETION, Completion),
    ("/v1/completions/render", "post"): Operation(list[RenderedPrompt], COMPLETION, answer_example=[EXAMPLE_PROMPT]),
    ("/v1/embeddings", "post"): Operation(EmbeddingList, {"input": "Once upon a time"}),
    ("/v1/rerank", "post"): Operation(RerankAnswer, {"query": "capital of France", "documents": ["Paris", "Rome"]}),
    ("/v1/score", "post"): Operation(ScoreList, {"text_1": "capital of France", "text_2": ["Paris", "Rome"]}),
    ("/v1/messages", "post"): Operation(
        AnthropicMessage,
        {"messages": MESSAGES, "max_tokens": 20},
        _any_of((MessageStart, ContentBlockStart, ContentBlockDelta, ContentBlockStop, MessageDelta, MessageStop)),
        EXAMPLE_MESSAGE,
    ),
    ("/v1/messages/count_tokens", "post"): Operation(
        CountTokensResponse, {"messages": MESSAGES}, answer_example=CountTokensResponse(37)
    ),
    ("/api/chat", "post"): Operation(
        OllamaChatAnswer, {"messages": MESSAGES, **OLLAMA}, OllamaChatAnswer, stream_format=NDJSON
    ),
    ("/api/generate", "post"): Operation(
        OllamaGenerateAnswer, {"prompt": "Why is the sky blue?", **OLLAMA}, OllamaGenerateAnswer, stream_format=NDJSON
    ),
    ("/api/embed", "post"): Operation(OllamaEmbedAnswer, {"input": "Once upon a time"}),
    ("/api/embeddings", "post"): Operation(OllamaEmbeddingsAnswer, {"prompt": "Once upon a time"}),
    ("/api/show", "post"): Operation(OllamaModelInfo, {}),
    ("/api/tags", "get"): Operation(OllamaModelList),
    ("/api/ps", "get"): Operation(OllamaModelList),
    ("/api/version", "get"): Operation(OllamaVersion),
    ("/v1/responses", "post"): Operation(
        ResponseObject,
        {"input": "What is the capital of France?", "max_output_tokens": 20},
        _any_of(RESPONSE_EVENTS),
        EXAMPLE_RESPONSE,
    ),
    ("/v1/responses/{response_id}", "get"): Operation(
        ResponseObject, events=_any_of(RESPONSE_EVENTS), answer_example=EXAMPLE_RESPONSE
    ),
    ("/v1/responses/{response_id}", "delete"): Operation(DeletedResponse, answer_example=DeletedResponse(f"resp_{ID}")),
    ("/v1/responses/{response_id}/input_items", "get"): Operation(ItemList, answer_example=EXAMPLE_ITEMS),
    ("/v1/responses/{response_id}/cancel", "post"): Operation(ResponseObject, answer_example=EXAMPLE_RESPONSE),
    ("/v1/responses/input_tokens", "post"): Operation(
        InputTokens, {"input": "What is the capital of France?"}, answer_example=InputTokens(37)
    ),
    ("/v1/requests/{request_id}/cancel", "post"): Operation(
        CancelResponse, answer_example=CancelResponse(f"chatcmpl-{ID}")
    ),
    ("/v1/requests/{request_id}/replay", "post"): Operation(Replay),
    ("/lightwell/v1/engine", "get"): Operation(EngineView),
    ("/lightwell/v1/steps", "get"): Operation(StepList),
    ("/lightwell/v1/events", "get"): Operation(None, events=StepList),
    ("/lightwell/v1/queue", "get"): Operation(QueueList),
    ("/lightwell/v1/blocks", "get"): Operation(BlockMap),
    ("/lightwell/v1/requests", "get"): Operation(RequestList),
    ("/lightwell/v1/requests/{request_id}", "get"): Operation(RequestDetails),
    ("/lightwell/v1/requests/{request_id}/trace", "get"): Operation(Trace),
    ("/lightwell/v1/trace", "get"): Operation(Trace),
    ("/lightwell/v1/inspect", "post"): Operation(Inspection, {"prompt": "Once upon a time"}, has_model=False),
    ("/v1/load_lora_adapter", "post"): Operation(
        str, ADAPTER | {"lora_path": "./adapters/sql"}, answer_example=ADAPTER_DONE.format("added"), has_model=False
    ),
    ("/v1/unload_lora_adapter", "post"): Operation(
        str, ADAPTER, answer_example=ADAPTER_DONE.format("removed"), has_model=False
    ),
    ("/v1/models", "get"): Operation(ModelList),
    ("/v1/models/{model_id}", "get"): Operation(Model),
    ("/v1/usage", "get"): Operation(UsageList),
    ("/version", "get"): Operation(ServerVersion),
    ("/tokenize", "post"): Operation(TokenizeResponse, {"prompt": "Once upon a time"}),
    ("/detokenize", "post"): Operation(DetokenizeResponse, {"tokens": [10, 11, 12]}),
    ("/tokenizer_info", "get"): Operation(TokenizerInfo),
    ("/health", "get"): Operation(dict[str, str | int]),
    ("/healthz", "get"): Operation(dict[str, str | int]),
    ("/readyz", "get"): Operation(dict[str, str | int]),
    ("/metrics", "get"): Operation(str),
}


def install_document(app: FastAPI, model: str, *, needs_key: bool) -> None:
    """Replace FastAPI's OpenAPI document by this one, which is built once. Its examples use the model `model`."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = make_document(app, model, needs_key=needs_key)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def make_document(app: FastAPI, model: str, *, needs_key: bool) -> dict[str, Any]:
    version = importlib.metadata.version("lightwell")
    document = get_openapi(
        title="Lightwell", version=version, description=DESCRIPTION, routes=app.routes, servers=app.servers
    )
    types = [type for operation in OPERATIONS.values() for type in operation.types]
    template = "#/components/schemas/" + PREFIX + "{name}"
    schemas, components = msgspec.json.schema_components(
        [*types, ErrorResponse, AnthropicErrorResponse, OllamaErrorResponse], ref_template=template
    )
    components = _without_encoded(components)
    described = {repr(type): schema for type, schema in zip(types, schemas, strict=False)}
    errors = dict(zip(("/", "/v1/messages", "/api/"), schemas[-3:], strict=True))  # by the start of the path
    for path, methods in document["paths"].items():
        error = errors[max((start for start in errors if path.startswith(start)), key=len)]
        for method, described_operation in methods.items():
            operation = OPERATIONS[path, method]
            described_operation["responses"] = _responses(operation, described, error)
            if operation.example is not None:
                content = described_operation["requestBody"]["content"]["application/json"]
                content["example"] = {**({"model": model} if operation.has_model else {}), **operation.example}
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's error formats, which are not used
        del document["components"]["schemas"][name]
    document["components"]["schemas"] |= {PREFIX + name: schema for name, schema in components.items()}
    if needs_key:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"x-api-key": []}]
    return document


def _without_encoded(schema: Any) -> Any:
    """Return a schema without the alternatives for parts that are encoded beforehand: those are like the others."""
    if isinstance(schema, list):
        return [_without_encoded(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    fields = {name: _without_encoded(value) for name, value in schema.items()}
    if {} not in fields.get("anyOf", ()):
        return fields
    others = [each for each in fields.pop("anyOf") if each]
    return fields | (others[0] if len(others) == 1 else {"anyOf": others})


def _header(description: str, *, required: bool = False, **schema: Any) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": {"type": "string", **schema}}


REQUEST_ID_HEADER = {"x-request-id": _header("The x-request-id of the request, or a generated one.", required=True)}
GENERATION_HEADERS = {
    "x-lightwell-seed": _header("The seed used for sampling.", pattern="^-?[0-9]+$"),
    "x-lightwell-deterministic": _header(
        "Whether the answer is independent of other requests.", enum=["true", "false"]
    ),
    "x-lightwell-warnings": _header("Ignored parameters: unknown ones, and those without effect."),
}
ERROR_HEADERS = {
    "retry-after": _header("With 429 and 503: seconds to wait before retrying.", pattern="^[0-9]+$"),
    "www-authenticate": _header("With 401: the authentication scheme to use."),
}


def _responses(operation: Operation, described: Mapping[str, Any], error: Mapping[str, Any]) -> dict[str, Any]:
    kind = "text/plain" if operation.answer is str else "application/json"
    content = {} if operation.answer is None else {kind: {"schema": described[repr(operation.answer)]}}
    if operation.answer_example is not None:
        content[kind]["example"] = msgspec.to_builtins(operation.answer_example)
    description = "The answer."
    if operation.events is not None:
        content[operation.stream_format.media_type] = {"schema": described[repr(operation.events)]}
        description = "The answer; with `stream`, events whose data has the given schema."
    if operation.answer is None:
        description = "Events whose data has the given schema."
    headers = REQUEST_ID_HEADER | GENERATION_HEADERS if operation.reports_generation else REQUEST_ID_HEADER
    error_response = {
        "description": "An error.",
        "headers": REQUEST_ID_HEADER | ERROR_HEADERS,
        "content": {"application/json": {"schema": error}},
    }
    response = {"description": description, "headers": headers, "content": content}
    return {"200": response, "4XX": error_response, "5XX": error_response}
