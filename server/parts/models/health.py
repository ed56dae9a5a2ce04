"""Health of a server that loads and unloads models.

One that is loaded, or that the next request loads, is enough; while none is, `/healthz` still answers 200, since a
request can load one again. `/readyz` waits for those that are loaded at the start.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from starlette.responses import Response

from server.http.errors import EngineUnavailableError
from server.http.json_response import StructResponse
from server.models.health import NO_PROGRESS, SHUTTING_DOWN
from server.models.slot import ModelSlot


class State(Protocol):
    """The part of a `ModelManager` that probes ask for."""

    has_started: asyncio.Event
    is_draining: bool

    def is_usable(self, slot: ModelSlot) -> bool: ...


class ManagedHealth:
    """The answers of the probes."""

    def __init__(self, manager: State, slots: Sequence[ModelSlot]) -> None:
        self._manager = manager
        self._slots = slots

    def health(self, *, is_stuck: bool) -> Response:
        return self._answer(NO_PROGRESS if is_stuck else self._no_model())

    def alive(self) -> Response:
        return self._answer(None)

    def ready(self, **_state: bool) -> Response:
        manager = self._manager
        problem = self._no_model() if manager.has_started.is_set() else "The models are still being loaded."
        return self._answer(SHUTTING_DOWN if manager.is_draining else problem)

    def _no_model(self) -> str | None:
        """Return the problem that no model can be used at this time, or None."""
        return None if any(map(self._manager.is_usable, self._slots)) else "No model can be loaded."

    def _answer(self, problem: str | None) -> Response:
        """Return 200 with the number of models in each state, unless there is a problem."""
        if problem is not None:
            return EngineUnavailableError(problem).response()
        states = Counter(slot.state for slot in self._slots)
        restarts = sum(slot.served.client.num_restarts for slot in self._slots if slot.served is not None)
        return StructResponse({"status": "ok", "restarts": restarts, "models": states})
