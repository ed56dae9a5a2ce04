"""What every handler needs, made once at start and handed to `create_app`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple, Unpack, cast

import anyio.to_thread
from anyio import CapacityLimiter
from starlette.requests import Request

from server.text.words import SequenceBreakers

if TYPE_CHECKING:
    from engine.config import ModelConfig
    from server.client import EngineClient
    from server.generate.running import RunningRequests
    from server.grammar_judge import GrammarJudge
    from server.metrics import Metrics
    from server.recordings import Recordings
    from server.response_store import ResponseStore
    from server.settings import Settings
    from server.text.chat_template import ChatTemplate
    from server.text.tokenizer import Tokenizer

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def _threads(share: int) -> CapacityLimiter:
    """One thread for each `share` cores."""
    return CapacityLimiter(max(1, (os.cpu_count() or 1) // share))


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

    @cached_property
    def sequence_breakers(self) -> SequenceBreakers:
        return SequenceBreakers(self.tokenizer)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together; EngineUnavailableError before the engine is ready."""
        return self.client.ready_info().max_model_len


def get_context(request: Request) -> ServerContext:
    return cast("ServerContext", request.app.state.context)
