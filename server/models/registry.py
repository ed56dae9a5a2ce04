"""The models that can be served, whether they are in memory or not, by their names."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import cached_property
from itertools import chain
from pathlib import Path

from engine.config import ModelConfig, load_model_config
from server.http.errors import EngineUnavailableError, MissingParameterError, ModelNotFoundError
from server.metrics import Metrics
from server.models.served_model import ModelVariant, ServedModel
from server.settings.process_configs import ServedModelConfig
from server.tenants import Tenant
from server.weight_files import WeightFiles, describe_weights


class ModelState(StrEnum):
    """Whether a model can answer."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"  # the last attempt to load it, or its engine


class ModelSlot:
    """A model that can be served, and what is in memory of it. Times are in seconds, by `now`."""

    def __init__(self, config: ServedModelConfig, metrics: Metrics, served: ServedModel | None = None) -> None:
        self.config = config
        self.metrics = metrics
        self.served = served  # None: it is not loaded
        self.task: asyncio.Task[None] | None = None  # that loads or unloads it
        self.failure = ""  # why it could not be loaded, or its engine has ended
        self.failed_at = 0.0
        self.memory = 0  # bytes of host memory that it holds, or has reserved
        self.num_users = 0  # requests that need it, beside those in its engine
        self.now: Callable[[], float] = time.monotonic  # the time of the event loop, once it runs
        self.last_used = 0.0
        self.idle_limit: float | None = None  # after which it is unloaded, if a client has said so
        self.load_requested: float | None = None  # None: it is not being loaded
        self.load_began: float | None = None  # None: it is not being loaded, or waits for memory
        self.load_seconds: float | None = None  # that the last load took

    @property
    def names(self) -> tuple[str, ...]:
        return self.config.names

    @property
    def name(self) -> str:
        return self.config.names[0]

    @cached_property
    def weight_files(self) -> WeightFiles:
        """The model's files. The first call reads their headers. Raises OSError or ValueError."""
        return describe_weights(Path(self.config.path))

    @cached_property
    def model_config(self) -> ModelConfig:
        """The model's configuration. The first call reads it. Raises OSError or ValueError."""
        return load_model_config(Path(self.config.path))

    @property
    def number(self) -> int:
        """The number of its engine."""
        return self.config.engines[0].number

    @property
    def state(self) -> ModelState:
        if self.served is not None and self.served.client.dead_reason is None:
            return ModelState.LOADING if self.served.client.info is None else ModelState.LOADED
        if self.load_requested is not None:
            return ModelState.LOADING
        return ModelState.FAILED if self.reason else ModelState.UNLOADED

    @property
    def reason(self) -> str:
        """Why it cannot be used; empty if nothing has failed."""
        return self.failure or (self.served and self.served.client.dead_reason) or ""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the model loaded, or the load going."""
        self.num_users += 1
        try:
            yield
        finally:
            self.num_users -= 1
            self.last_used = self.now()

    @property
    def is_idle(self) -> bool:
        """True if it is loaded, and no request needs it."""
        return (
            self.task is None
            and self.served is not None
            and self.num_users == 0
            and self.served.client.num_in_flight == 0
        )

    @property
    def seconds_loading(self) -> float | None:
        """Seconds since its load was requested, or None if it is not being loaded."""
        return None if self.load_requested is None else self.now() - self.load_requested

    @property
    def fraction_loaded(self) -> float | None:
        """The part of a load that is done, by the time that the last one took. None: it is not known."""
        if self.load_began is None or self.load_seconds is None:
            return None
        return min(0.99, (self.now() - self.load_began) / self.load_seconds)


class ModelRegistry:
    """All models. If there is only one, it answers requests that name none, where that is allowed."""

    def __init__(self, slots: Sequence[ModelSlot]) -> None:
        self.slots = slots

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
        return _served(self.slots[0])

    @property
    def name(self) -> str:
        """The name of the first model."""
        return self.slots[0].name

    def names(self, tenant: Tenant) -> list[str]:
        """Return the names that the tenant can use: those of each model, then those of its adapters."""
        return list(chain.from_iterable(_names(slot, tenant) for slot in self.slots))

    def variants(self, tenant: Tenant) -> list[ModelVariant]:
        """Return each loaded model under each of its names, then its loaded adapters that the tenant may use."""
        return list(chain.from_iterable(_variants(model, tenant) for model in self.loaded))

    def find_slot(self, name: str | None, tenant: Tenant) -> ModelSlot | None:
        """Return the slot of the model or adapter with this name, or None. A name of None is that of the first."""
        if name is None:
            return self.slots[0]
        return next((slot for slot in self.slots if name in _names(slot, tenant)), None)

    def find(self, name: str | None, tenant: Tenant) -> ModelVariant:
        """Return the model or adapter with this name, or the only model if it is None.

        Raises:
            MissingParameterError: The name is empty, or None although there are several models.
            ModelNotFoundError: There is no such model or adapter for the tenant.
            EngineUnavailableError: The model is not loaded, or the adapter is loaded together with it.
        """
        if name is None and len(self.slots) == 1:
            name = self.slots[0].config.names[0]
        if not name:
            raise MissingParameterError("model")
        for each in self.slots:
            if each.served is not None and name in each.served.variants:
                return each.served.variants[name]
        slot = self.find_slot(name, tenant)
        if slot is None:
            raise ModelNotFoundError(name, self.names(tenant))
        model = _served(slot)
        if name not in model.client.adapters:
            model.client.ready_info()
            raise ModelNotFoundError(name, self.names(tenant))
        return ModelVariant(name, model, model.client.adapters[name])

    def is_ambiguous(self, tenant: Tenant) -> bool:
        """Return whether a request of the tenant must name its model, since there are several, or adapters."""
        return len(self.slots) > 1 or len(self.names(tenant)) > len(self.slots[0].names)


def _served(slot: ModelSlot) -> ServedModel:
    if slot.served is None:
        is_loading = slot.state is ModelState.LOADING
        state = (
            "still being loaded. Please retry later." if is_loading else "not loaded. A request that runs it loads it."
        )
        raise EngineUnavailableError(f"The model `{slot.name}` is {state}")
    return slot.served


def _names(slot: ModelSlot, tenant: Tenant) -> list[str]:
    """Return the names of a model, and of its adapters: those that are loaded, or will be together with it."""
    client = None if slot.served is None else slot.served.client
    adapters = slot.config.settings.lora_names if client is None or client.info is None else client.adapters
    return [*slot.names, *(name for name in adapters if tenant.may_use(name))]


def _variants(model: ServedModel, tenant: Tenant) -> list[ModelVariant]:
    adapters = [(name, adapter) for name, adapter in model.client.adapters.items() if tenant.may_use(name)]
    return [*model.variants.values(), *(ModelVariant(name, model, adapter) for name, adapter in adapters)]
