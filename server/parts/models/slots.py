"""Models that may be in memory or not: their states, and the metrics of all."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from server.api.admin import LoadProgress
from server.http.errors import EngineUnavailableError
from server.metrics import Metrics
from server.models.registry import ModelSlot
from server.models.served_model import ServedModel
from server.parts.hub.weight_files import WeightFiles, describe_weights
from server.settings.process_configs import ServedModelConfig
from server.tenants import Tenant


class ModelState(StrEnum):
    """Whether a model can answer."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"  # the last attempt to load it, or its engine


class LoadableSlot(ModelSlot):
    """A model that can be served, and what is in memory of it. Times are in seconds, by `now`."""

    def __init__(self, config: ServedModelConfig, metrics: Metrics) -> None:
        super().__init__(config, metrics)
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

    @cached_property
    def weight_files(self) -> WeightFiles:
        """The model's files. The first call reads their headers. Raises OSError or ValueError."""
        return describe_weights(Path(self.config.path))

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

    def loaded(self) -> ServedModel:
        if self.served is None:
            state = "not loaded. A request that runs it loads it."
            if self.state is ModelState.LOADING:
                state = "still being loaded. Please retry later."
            raise EngineUnavailableError(f"The model `{self.name}` is {state}")
        return self.served

    def unloaded_fields(self, tenant: Tenant) -> dict[str, Any] | None:
        if self.state is ModelState.LOADED:
            return None
        fields: dict[str, Any] = {"state": self.state}
        if self.reason and tenant.is_admin:  # it may name files
            fields["reason"] = self.reason
        if (seconds := self.seconds_loading) is not None:
            fields["loading"] = LoadProgress(seconds, self.fraction_loaded)
        return fields

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


class JoinedRegistry(CollectorRegistry):
    """The metrics of several models. Each has the label `model_name`, but what is not about a model."""

    def __init__(self, metrics: Sequence[Metrics]) -> None:
        super().__init__()
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for metrics in self._metrics:
            for family in metrics.registry.collect():
                if family.name.startswith(metrics.prefix):
                    label = {"model_name": metrics.model_name}
                    family.samples = [sample._replace(labels=label | sample.labels) for sample in family.samples]
                    families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    families[family.name].samples += family.samples
                else:  # of the process and its HTTP responses: the same for all models
                    families.setdefault(family.name, family)
        yield from families.values()
