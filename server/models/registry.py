"""The model that is served, by its names: what loads it, and how it is. A part serves several."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import chain
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from server.engine_client.client import EngineClient
from server.http.errors import EngineUnavailableError, MissingParameterError, ModelNotFoundError
from server.http.responses import StructResponse
from server.metrics import Metrics
from server.models.served_model import ModelVariant, ServedModel, load_served_model
from server.processes.supervisor_channel import Channel
from server.settings.process_configs import ApiProcessConfig, ServedModelConfig
from server.tenants import Tenant

DRAINING = "The server is shutting down."
NO_PROGRESS = "The work on texts makes no progress."


class ModelSlot:
    """A model that can be served. In the core, it is loaded before there are requests."""

    def __init__(self, config: ServedModelConfig, metrics: Metrics) -> None:
        self.config = config
        self.names = config.names
        self.name = config.names[0]
        self.metrics = metrics
        self.served: ServedModel | None = None  # None: it is not loaded

    def loaded(self) -> ServedModel:
        """Return what is served. Raises EngineUnavailableError if it is not loaded."""
        assert self.served is not None
        return self.served

    def unloaded_fields(self, tenant: Tenant) -> dict[str, Any] | None:
        """Return the fields of `GET /v1/models` of a model that is not loaded, or None if it is."""
        return None

    def all_names(self, tenant: Tenant) -> list[str]:
        """Return its names, and those of its adapters: those that are loaded, or will be together with it."""
        client = None if self.served is None else self.served.client
        adapters = self.config.settings.lora_names if client is None or client.info is None else client.adapters
        return [*self.names, *(name for name in adapters if tenant.may_use(name))]


class ModelRegistry:
    """The models by their names. In the core it is one, which is loaded together with the server, and stays.

    If there is only one, it answers requests that name none, where that is allowed.
    """

    # Answers a request once its model is loaded, with its route and its fields; None: none needs to wait.
    when_loaded: Callable[..., Awaitable[Response]] | None = None
    unloads = False  # each load starts another engine

    def __init__(
        self, config: ApiProcessConfig, new_metrics: Callable[[str], Metrics], channel: Channel | None = None
    ) -> None:
        """`new_metrics` makes those of a model with this name. `channel` leads to the supervisor, if there is one."""
        self.slots: Sequence[ModelSlot] = [ModelSlot(each, new_metrics(each.names[0])) for each in config.models]
        self._can_restart = channel is not None

    def load(self, client: EngineClient | None) -> None:
        """Load the model, whose engine has this client; None: make one. It starts a process. Raises ValueError."""
        slot = self.slots[0]
        slot.served = load_served_model(slot.config, slot.metrics, can_restart=self._can_restart, client=client)

    async def start(self) -> None:
        """Connect to the engines of the models that are loaded together with the server."""
        for model in self.loaded:
            await model.client.start()

    async def close(self) -> None:
        """Close the models that are loaded."""
        for model in self.loaded:
            await model.close()

    @property
    def loaded(self) -> list[ServedModel]:
        """The models that are in memory, or are being loaded together with the server."""
        return [slot.served for slot in self.slots if slot.served is not None]

    @property
    def default(self) -> ServedModel:
        """The first model. Raises EngineUnavailableError if it is not loaded."""
        return self.slots[0].loaded()

    @property
    def name(self) -> str:
        """The name of the first model."""
        return self.slots[0].name

    @property
    def metrics(self) -> CollectorRegistry:
        """The metrics of all models."""
        return self.slots[0].metrics.registry

    def names(self, tenant: Tenant) -> list[str]:
        """Return the names that the tenant can use: those of each model, then those of its adapters."""
        return list(chain.from_iterable(slot.all_names(tenant) for slot in self.slots))

    def find_slot(self, name: str | None, tenant: Tenant) -> ModelSlot | None:
        """Return the slot of the model or adapter with this name, or None. A name of None is that of the first."""
        if name is None:
            return self.slots[0]
        return next((slot for slot in self.slots if name in slot.all_names(tenant)), None)

    def find(self, name: str | None, tenant: Tenant) -> ModelVariant:
        """Return the model or adapter with this name, or the only model if it is None.

        Raises:
            MissingParameterError: The name is empty, or None although there are several models.
            ModelNotFoundError: There is no such model or adapter for the tenant.
            EngineUnavailableError: The model is not loaded, or the adapter is loaded together with it.
        """
        if name is None and len(self.slots) == 1:
            name = self.name
        if not name:
            raise MissingParameterError("model")
        for each in self.slots:
            if each.served is not None and name in each.served.variants:
                return each.served.variants[name]
        slot = self.find_slot(name, tenant)
        if slot is None:
            raise ModelNotFoundError(name, self.names(tenant))
        client = slot.loaded().client
        if name not in client.adapters:
            client.ready_info()
            raise ModelNotFoundError(name, self.names(tenant))
        return ModelVariant(name, slot.loaded(), client.adapters[name])

    def is_ambiguous(self, tenant: Tenant) -> bool:
        """Return whether a request of the tenant must name its model, since there are several, or adapters."""
        return len(self.slots) > 1 or len(self.names(tenant)) > len(self.slots[0].names)

    def keep_loaded(self, request: Request, slot: ModelSlot | None) -> AbstractAsyncContextManager[None]:
        """Wait until a model is loaded, and keep it loaded in the context. Raises APIError."""
        return nullcontext()

    # How the engines are.

    @property
    def _client(self) -> EngineClient:
        return self.default.client

    @property
    def died(self) -> asyncio.Event:
        """Set when the server has to end, as it cannot answer any longer."""
        return self._client.died

    async def wait_started(self) -> str:
        """Wait until the models that are loaded at the start are loaded. Return the state of all, in words."""
        await self._client.became_ready.wait()
        return f"{self.name} is ready"

    async def wait_changed(self) -> None:
        """Wait until the state of an engine changes."""
        changed = self._client.changed
        changed.clear()
        await changed.wait()

    def engine_started(self, number: int, pid: int) -> None:
        """Note that a process of an engine runs."""
        self._client.engines[number].engine_started(pid)

    def engine_gone(self, number: int, reason: str) -> None:
        """Note that an engine has ended, and is not started again at once."""
        self._client.engines[number].liveness.mark_dead(reason)

    def drain(self) -> None:
        """Admit no new work: the server shuts down."""
        for model in self.loaded:
            model.client.drain()

    # The answers of the probes, from memory, in any state. `is_stuck`: the work on texts makes no progress.

    def health(self, *, is_stuck: bool) -> Response:
        return _answer(self._client, is_ok=self._client.is_healthy and not is_stuck)

    def alive(self) -> Response:
        return _answer(self._client, is_ok=self._client.is_alive)

    def ready(self, *, is_stuck: bool) -> Response:
        client = self._client
        return _answer(client, is_ok=client.is_healthy and not is_stuck and not client.drain_requested.is_set())


def _answer(client: EngineClient, *, is_ok: bool) -> Response:
    if is_ok:
        return StructResponse({"status": "ok", "restarts": client.num_restarts} | client.states)
    if (since := client.restarting_since) is not None:  # Unix time
        error = EngineUnavailableError("The engine died and is being restarted.")
        state = {"status": "restarting", "since": int(since), "restarts": client.num_restarts} | client.states
        return StructResponse(state | msgspec.json.decode(error.body()), error.status, error.headers)
    if client.dead_reason is not None:
        return EngineUnavailableError("The engine has stopped.").response()
    if not client.is_ready:
        return EngineUnavailableError("The model is still being loaded.").response()
    if client.drain_requested.is_set():
        return EngineUnavailableError(DRAINING).response()
    if client.is_healthy:
        return EngineUnavailableError(NO_PROGRESS).response()
    return EngineUnavailableError("The engine does not respond.").response()
