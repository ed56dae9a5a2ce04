"""The parts of the server: which there are.

The core never imports a part. It loads those whose folders are there, by their names in the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from engine.shared.parts import MissingPartError, has_part

FOLDER = "server.parts"


@dataclass(frozen=True, kw_only=True)
class PartEntry:
    """A part, as errors describe it where it is missing, and what then cannot be asked for."""

    title: str
    paths: Sequence[str] = ()  # or their beginnings
    settings: Sequence[str] = ()  # that must keep their defaults


# By the name of the folder.
PARTS: Mapping[str, PartEntry] = {
    "responses": PartEntry(title="OpenAI's Responses API", paths=["/v1/responses"]),
    "embeddings": PartEntry(title="embeddings", paths=["/v1/embeddings"]),
    "rerank": PartEntry(
        title="reranking and scores", paths=["/v1/rerank", "/rerank", "/v2/rerank", "/v1/score", "/score"]
    ),
    "messages": PartEntry(title="Anthropic's Messages API", paths=["/v1/messages"]),
    "ollama": PartEntry(title="Ollama's API", paths=["/api/"]),
    "inspection": PartEntry(title="the inspection of the engine", paths=["/lightwell/"]),
    "recordings": PartEntry(title="recordings and replay", paths=[]),
    "lora": PartEntry(title="LoRA adapters", paths=["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]),
    "page": PartEntry(title="the pages for browsers", paths=["/docs", "/assets/"]),
    "limits": PartEntry(title="limits of tenants", paths=["/v1/usage"], settings=["api_keys_file"]),
    "hub": PartEntry(title="models of Hugging Face's hub"),
    "models": PartEntry(title="several models", settings=["models", "load", "idle_unload"]),
    "workers": PartEntry(title="several API processes", settings=["api_server_count"]),
    "otel": PartEntry(title="OpenTelemetry", settings=["otlp_endpoint"]),
}


COMMAND_PARTS = ("hub",)  # that add commands


def load_module(part: str, module: str) -> Any:
    """Return a module of a part. Raises MissingPartError."""
    if not has_part(FOLDER, part):
        raise MissingPartError(part, PARTS[part].title)
    return import_module(f"{FOLDER}.{part}.{module}")
