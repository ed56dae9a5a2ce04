"""Health of a server with one model, which answers from memory, in any state."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from server.engine_client.client import EngineClient
from server.http.errors import EngineUnavailableError
from server.http.json_response import StructResponse
from server.models.registry import ModelRegistry

SHUTTING_DOWN = "The server is shutting down."
NO_PROGRESS = "The work on texts makes no progress."


class OneModelHealth:
    """The answers of the probes."""

    def __init__(self, models: ModelRegistry) -> None:
        self._models = models

    def health(self, *, is_stuck: bool) -> Response:
        client = self._models.default.client
        return _answer(client, is_ok=client.is_healthy and not is_stuck)

    def alive(self) -> Response:
        client = self._models.default.client
        return _answer(client, is_ok=client.is_alive)

    def ready(self, *, is_stuck: bool) -> Response:
        client = self._models.default.client
        return _answer(client, is_ok=client.is_healthy and not is_stuck and not client.drain_requested.is_set())


def _answer(client: EngineClient, *, is_ok: bool) -> Response:
    if is_ok:
        return StructResponse({"status": "ok", "restarts": client.num_restarts} | _engines(client))
    if client.restarting_since is not None:
        return _restarting(client, client.restarting_since)
    if client.dead_reason is not None:
        return EngineUnavailableError("The engine has stopped.").response()
    if not client.is_ready:
        return EngineUnavailableError("The model is still being loaded.").response()
    if client.drain_requested.is_set():
        return EngineUnavailableError(SHUTTING_DOWN).response()
    if client.is_healthy:
        return EngineUnavailableError(NO_PROGRESS).response()
    return EngineUnavailableError("The engine does not respond.").response()


def _restarting(client: EngineClient, since: float) -> Response:
    """Return an error that also says since when (Unix time) the engine is being restarted, and how often it was."""
    error = EngineUnavailableError("The engine died and is being restarted.")
    state = {"status": "restarting", "since": int(since), "restarts": client.num_restarts} | _engines(client)
    return StructResponse(state | msgspec.json.decode(error.body()), error.status, error.headers)


def _engines(client: EngineClient) -> dict[str, object]:
    """Return the state of each engine, if there are several."""
    if len(client.engines) == 1:
        return {}
    return {"engines": [{"number": engine.number, "status": engine.liveness.status} for engine in client.engines]}
