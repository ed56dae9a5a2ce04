"""The parts of the server: which there are, and what one adds to the core.

The core never imports a part. It loads those whose folders are there, by their names in the table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.shared.parts import has_part

if TYPE_CHECKING:
    from server.api.dialect import Dialect
    from server.context import ServerContext

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
    "otel": PartEntry(title="OpenTelemetry", settings=["otlp_endpoint"]),
}


def _nothing(context: "ServerContext") -> None:
    """Add nothing to the context."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a part adds to the core: the object `PART` of its module `part`."""

    dialects: Sequence["Dialect"] = ()
    attach: Callable[["ServerContext"], None] = _nothing  # called once, before the application is made


@cache
def load_parts() -> Sequence[Part]:
    """Return the parts that are there, in the order of the table."""
    return [load_module(name, "part").PART for name in PARTS if has_part(FOLDER, name)]


def load_module(part: str, module: str) -> Any:
    """Return a module of a part."""
    return import_module(f"{FOLDER}.{part}.{module}")
