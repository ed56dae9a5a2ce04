"""The parts of the server: which there are.

The core never imports a part. It loads those whose folders are there, by their names in the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from engine.shared.parts import ENGINE_PARTS, MissingPartError, has_part

FOLDER = "server.parts"


@dataclass(frozen=True, kw_only=True)
class PartEntry:
    """A part, as errors describe it where it is missing, and what then cannot be asked for."""

    title: str
    needs: Sequence[str] = ()  # other parts
    engine_part: str | None = None  # that it asks
    paths: Sequence[str] = ()  # or their beginnings
    settings: Sequence[str] = ()  # that must keep their defaults
    has_commands: bool = False


# By the name of the folder.
PARTS: Mapping[str, PartEntry] = {
    "responses": PartEntry(title="OpenAI's Responses API", paths=["/v1/responses"]),
    "embeddings": PartEntry(title="embeddings", paths=["/v1/embeddings"]),
    "rerank": PartEntry(
        title="reranking and scores",
        needs=["embeddings"],
        paths=["/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score"],
    ),
    "messages": PartEntry(title="Anthropic's Messages API", paths=["/v1/messages"]),
    "ollama": PartEntry(title="Ollama's API", needs=["embeddings"], paths=["/api/"]),
    "inspection": PartEntry(title="the inspection of the engine", engine_part="inspection", paths=["/lightwell/v1/"]),
    "recordings": PartEntry(title="recordings and replay"),
    "lora": PartEntry(
        title="LoRA adapters",
        engine_part="lora",
        paths=["/v1/load_lora_adapter", "/v1/unload_lora_adapter"],
        settings=["lora_modules", "allow_runtime_lora_updating"],
    ),
    "page": PartEntry(title="the pages for browsers", paths=["/docs", "/assets/"]),
    "limits": PartEntry(title="limits of tenants", paths=["/v1/usage"], settings=["api_keys_file"]),
    "tokenizers": PartEntry(title="a tokenizer without tokenizer.json", engine_part="tokenizers"),
    "run": PartEntry(title="the command run", has_commands=True),
    "bench": PartEntry(title="the command bench", has_commands=True),
    "hub": PartEntry(title="downloads from Hugging Face's hub", has_commands=True),
    "models": PartEntry(title="several models", needs=["hub"], settings=["models", "load", "idle_unload"]),
    "workers": PartEntry(title="several API processes", needs=["recordings"], settings=["api_server_count"]),
    "otel": PartEntry(title="OpenTelemetry", settings=["otlp_endpoint"]),
}


@cache
def is_installed(name: str) -> bool:
    """Return whether a part is there, with all that it needs."""
    entry = PARTS[name]
    return (
        has_part(FOLDER, name)
        and (entry.engine_part is None or has_part(ENGINE_PARTS, entry.engine_part))
        and all(map(is_installed, entry.needs))
    )


def missing_part(path: str) -> str | None:
    """Return what the requests to a path need that is not installed, or None."""
    names = [name for name, entry in PARTS.items() if path.startswith(tuple(entry.paths)) and not is_installed(name)]
    return str(MissingPartError(names[0], PARTS[names[0]].title)) if names else None


def load_module(part: str, module: str) -> Any:
    """Return a module of a part. Raises MissingPartError."""
    if not is_installed(part):
        raise MissingPartError(part, PARTS[part].title)
    return import_module(f"{FOLDER}.{part}.{module}")
