"""Ollama's API."""

from server.dialect import BEGINNING, MESSAGES, Dialect, Operation
from server.http.sse import NDJSON
from server.part import Part
from server.parts.ollama.errors import OLLAMA_ERRORS
from server.parts.ollama.routes import file_operations, file_router, router
from server.parts.ollama.schemas import (
    OllamaChatAnswer,
    OllamaEmbedAnswer,
    OllamaEmbeddingsAnswer,
    OllamaGenerateAnswer,
    OllamaModelInfo,
    OllamaModelList,
    OllamaVersion,
)

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
