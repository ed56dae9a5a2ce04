"""The parts of the server: which there are.

The core never imports a part. It loads those whose folders are there, by their names in the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from engine.shared.parts import MissingPartError, has_part, missing_engine_part

FOLDER = "server.parts"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PartEntry:
    """A part, as errors describe it where it is missing, and what then cannot be asked for."""

    title: str
    needs: Sequence[str] = ()  # other parts
    engine_part: str | None = None  # that it asks
    paths: Sequence[str] = ()  # in which * stands for any text
    settings: Sequence[str] = ()  # that its module `settings` declares
    commands: Sequence[str] = ()  # added by its module `commands`


# By the name of the folder.
PARTS: Mapping[str, PartEntry] = {
    "conversions": PartEntry(title="conversions of other APIs' requests"),
    "responses": PartEntry(
        title="OpenAI's Responses API",
        needs=["conversions"],
        paths=["/v1/responses", "/v1/responses/*"],
        settings=["max_stored_responses", "stored_responses_memory"],
    ),
    "tokenization": PartEntry(
        title="tokenizing and rendering of prompts",
        paths=[
            *("/tokenize", "/detokenize", "/tokenizer_info"),
            *("/v1/completions/render", "/v1/chat/completions/render"),
        ],
    ),
    "embeddings": PartEntry(title="embeddings", paths=["/v1/embeddings"], settings=["pooling"]),
    "rerank": PartEntry(
        title="reranking and scores",
        needs=["embeddings"],
        paths=["/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score"],
        settings=["score_tokens"],
    ),
    "messages": PartEntry(
        title="Anthropic's Messages API", needs=["conversions"], paths=["/v1/messages", "/v1/messages/*"]
    ),
    "ollama": PartEntry(title="Ollama's API", needs=["conversions", "embeddings", "hub"], paths=["/api/*"]),
    "inspection": PartEntry(
        title="the inspection of the engine",
        engine_part="inspection",
        paths=["/lightwell/v1/*"],
        settings=["inspect", "inspect_public"],
    ),
    "recordings": PartEntry(
        title="recordings and replay", paths=["/v1/requests/*/replay"], settings=["record_requests"]
    ),
    "lora": PartEntry(
        title="LoRA adapters",
        engine_part="lora",
        paths=["/v1/load_lora_adapter", "/v1/unload_lora_adapter"],
        settings=["lora_modules", "max_loras", "max_lora_rank", "allow_runtime_lora_updating"],
    ),
    "page": PartEntry(title="the pages for browsers", paths=["/", "/docs", "/openapi.json", "/assets/*"]),
    "limits": PartEntry(title="limits of tenants", paths=["/v1/usage"], settings=["api_keys_file"]),
    "tool_formats": PartEntry(title="tool calls that are no JSON objects"),
    "structural_tags": PartEntry(title="structural tags"),
    "hardening": PartEntry(title="a server for the open net", settings=["ssl_certfile", "ssl_keyfile"]),
    "tokenizers": PartEntry(title="a tokenizer without tokenizer.json", engine_part="tokenizers"),
    "run": PartEntry(title="the command run", commands=["run"]),
    "bench": PartEntry(title="the command bench", commands=["bench"]),
    "hub": PartEntry(title="downloads of models", commands=["pull", "list", "rm"]),
    "build_kernels": PartEntry(
        title="the command build-kernels", engine_part="build_kernels", commands=["build-kernels"]
    ),
    "models": PartEntry(title="several models", needs=["hub"], settings=["load", "idle_unload"]),
    "data_parallel": PartEntry(title="several engines with the same model", settings=["data_parallel_size"]),
    "workers": PartEntry(
        title="several API processes", needs=["recordings", "hardening"], settings=["api_server_count"]
    ),
    "ray": PartEntry(title="Ray Serve", needs=["run"]),
    "otel": PartEntry(title="OpenTelemetry", settings=["otlp_endpoint"]),
}


@cache
def why_missing(name: str) -> MissingPartError | None:
    """Return what a part lacks: itself, or one that it needs; None if it can be used."""
    entry = PARTS[name]
    if not has_part(FOLDER, name):
        return MissingPartError(name, entry.title)
    asked = None if entry.engine_part is None else missing_engine_part(entry.engine_part)
    return asked or next(filter(None, map(why_missing, entry.needs)), None)


def is_installed(name: str) -> bool:
    """Return whether a part is there, with all that it needs."""
    return why_missing(name) is None


def missing_part(url_path: str) -> str | None:
    """Return the sentence that names what requests to a path of the API need and is not installed, or None."""
    names = [name for name, entry in PARTS.items() if any(fnmatchcase(url_path, pattern) for pattern in entry.paths)]
    return next((as_sentence(error) for error in map(why_missing, names) if error is not None), None)


def as_sentence(error: MissingPartError) -> str:
    """Return what is missing as the message of an error."""
    problem = str(error)
    return f"{problem[0].upper()}{problem[1:]}."


def missing_command(command: str) -> MissingPartError | None:
    """Return what a command lacks, or None if it is there, or no part has one of that name."""
    return next((why_missing(name) for name, entry in PARTS.items() if command in entry.commands), None)


def hardened(module: str, name: str, default: T) -> T:
    """Return what the part hardening has in place of something of the core, or that if it is not installed."""
    found: T = getattr(load_module("hardening", module), name) if is_installed("hardening") else default
    return found


def load_module(part: str, module: str) -> Any:
    """Return a module of a part. Raises MissingPartError."""
    if (error := why_missing(part)) is not None:
        raise error
    return import_module(f"{FOLDER}.{part}.{module}")
