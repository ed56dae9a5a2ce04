"""What every handler needs, made once at start and handed to `create_app`."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple, Unpack, cast

import anyio.to_thread
from anyio import CapacityLimiter
from starlette.requests import Request

from server.http.errors import MissingParameterError, ModelNotFoundError
from server.text.words import SequenceBreakers

if TYPE_CHECKING:
    from engine.config import ModelConfig
    from engine.shared.messages import LoraAdapter
    from server.api.responses.store import ResponseStore
    from server.constrained.grammar_checker import GrammarJudge
    from server.engine_client.client import EngineClient
    from server.generation.recordings import Recordings
    from server.generation.registry import RunningRequests
    from server.metrics import Metrics
    from server.settings.table import Settings
    from server.text.chat_template import ChatTemplate
    from server.text.tokenizer import Tokenizer

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def _threads(share: int) -> CapacityLimiter:
    """One thread for each `share` cores."""
    return CapacityLimiter(max(1, (os.cpu_count() or 1) // share))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a name of a model in a request stands for: the model itself, or a LoRA adapter of it."""

    name: str
    adapter: LoraAdapter | None = None

    @property
    def lora_name(self) -> str:
        """What the engine calls the adapter; empty: none."""
        return "" if self.adapter is None else self.adapter.name

    @property
    def lora_fingerprint(self) -> str:
        """Of the adapter's weights, since another one may get its name; empty: no adapter."""
        return "" if self.adapter is None else self.adapter.fingerprint


@dataclass(frozen=True)
class ServerContext:
    settings: Settings
    client: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None  # None: the model has none, and chat is refused
    grammar_judge: GrammarJudge
    model_config: ModelConfig
    model_names: tuple[str, ...]  # what the API calls the model; the first is its id
    created: int  # seconds since the epoch
    metrics: Metrics
    running: RunningRequests
    responses: ResponseStore
    recordings: Recordings
    background_tasks: set[asyncio.Task[None]] = field(default_factory=set)  # held until they end
    # Texts are worked on in threads, no more than there are cores. /tokenize and /detokenize queue apart from
    # generation, which therefore never waits for them.
    text_threads: CapacityLimiter = field(default_factory=lambda: _threads(1))
    tokenize_threads: CapacityLimiter = field(default_factory=lambda: _threads(2))

    async def run_text_work(self, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Calls `function` in a thread, for a request that generates."""
        return await anyio.to_thread.run_sync(function, *args, limiter=self.text_threads)

    @property
    def served_models(self) -> list[ServedModel]:
        """The model under each of its names, then the adapters that are loaded."""
        adapters = self.client.adapters.items()
        return [*map(ServedModel, self.model_names), *(ServedModel(name, adapter) for name, adapter in adapters)]

    def find_model(self, name: str) -> ServedModel:
        """What `model` names. Raises MissingParameterError, or ModelNotFoundError.

        Of an adapter that is still to be loaded with the engine: EngineUnavailableError.
        """
        if not name:
            raise MissingParameterError("model")
        if name in self.model_names:
            return ServedModel(name)
        if name in self.client.adapters:
            return ServedModel(name, self.client.adapters[name])
        if self.client.info is None and name in self.settings.lora_paths:
            self.client.ready_info()
        raise ModelNotFoundError(name)

    def fingerprint(self, model: ServedModel) -> str:
        """Names all that influences the output: the engine, the adapter, a template that is not the model's."""
        parts = [self.client.ready_info().fingerprint]
        if model.adapter is not None:
            parts.append(model.adapter.fingerprint[:12])
        if self.settings.chat_template is not None:
            parts.append(self._template_fingerprint)
        return "-".join(parts)

    @cached_property
    def _template_fingerprint(self) -> str:
        source = "" if self.chat_template is None else self.chat_template.source
        return hashlib.sha256(source.encode()).hexdigest()[:12]

    @cached_property
    def sequence_breakers(self) -> SequenceBreakers:
        return SequenceBreakers(self.tokenizer)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together; EngineUnavailableError before the engine is ready."""
        return self.client.ready_info().max_model_len


def get_context(request: Request) -> ServerContext:
    return cast("ServerContext", request.app.state.context)
