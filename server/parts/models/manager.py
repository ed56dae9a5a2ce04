"""Loads models when they are needed, and unloads them when they are idle or another one needs their memory."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import anyio.to_thread
from msgspec.structs import replace
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from engine.config import ModelConfig, load_model_config
from engine.shared.machine import available_memory
from engine.shared.messages import EngineInfo
from server.engine_client.admission import SHUTTING_DOWN
from server.engine_client.client import EngineClient
from server.format import format_bytes
from server.http.errors import EngineUnavailableError
from server.http.responses import StructResponse
from server.metrics import Metrics
from server.models.registry import DRAINING, NO_PROGRESS, ModelRegistry, ModelSlot
from server.models.served_model import ServedModel, load_served_model
from server.parts.hub.memory import GPU_RESERVE, MIB, GPUMemory, ModelShape, gpu_memory, model_shape
from server.parts.hub.weight_files import WeightFiles
from server.parts.models import waiting
from server.parts.models.slots import JoinedRegistry, LoadableSlot, ModelState
from server.parts.models.waiting import RETRY_SECONDS, LoadTimeoutError, ModelLoadError
from server.processes.supervisor_channel import Channel, StartEngine, StopEngine
from server.settings.process_configs import ApiProcessConfig
from server.settings.table import Settings
from server.tenants import Tenant

logger = logging.getLogger("lightwell.api")

T = TypeVar("T")

HOST_RESERVE = 384 * MIB  # a process of the engine with its libraries, and the activations of a step on a CPU
MIN_TOKENS = 4096  # of context, that a KV cache of default size must hold
BYTES_PER_PARAMETER = {"int8": 1.125, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
LOAD_TIMEOUT = 1800.0  # seconds after which a load hangs, such as on a file system that does not answer
POLL_SECONDS = 0.1  # between looks for an idle model that can make room
IDLE_POLL_SECONDS = 0.5


def least_memory(settings: Settings, files: WeightFiles, config: ModelConfig) -> int:
    """Return the bytes with which a model can just be served."""
    reserve = settings.tensor_parallel_size * (HOST_RESERVE if is_on_host(settings) else GPU_RESERVE)
    return weight_bytes(files, settings) + kv_cache_bytes(model_shape(config), settings) + reserve


def weight_bytes(files: WeightFiles, settings: Settings) -> int:
    """Return what weights take in memory, in which they may have another format than in their files."""
    if settings.quantization == "auto":
        return files.num_bytes
    number = settings.quantization if settings.quantization == "int8" else settings.dtype
    return int(files.num_parameters * BYTES_PER_PARAMETER.get(number, 2.0))


def kv_cache_bytes(shape: ModelShape, settings: Settings) -> int:
    """Return the bytes of the KV cache that the settings ask for, or that it needs at least."""
    if settings.kv_cache_memory is not None:
        return settings.kv_cache_memory
    return shape.kv_cache_bytes(settings.max_model_len or min(shape.context, MIN_TOKENS))


def is_on_host(settings: Settings) -> bool:
    """Return whether the model runs on a CPU."""
    return settings.device == "cpu" or not _has_gpu(_gpu_number(settings))


@cache
def _has_gpu(number: int) -> bool:
    return gpu_memory(number) is not None


def _gpu_number(settings: Settings) -> int:
    return int(settings.device.partition(":")[2] or 0)


def memory_taken(info: EngineInfo) -> int:
    """Return the bytes of host memory that an engine holds, or will hold when its KV cache has been used."""
    return info.weight_bytes + info.kv_cache_bytes + info.activation_bytes + info.num_ranks * HOST_RESERVE


class Room(NamedTuple):
    """The memory that is there for a model: all that the server may use, and what others leave of it."""

    num_bytes: int
    free: int


class HostBudget:
    """The host memory that models share. What KV caches have reserved counts, though they take it only when used."""

    def __init__(self) -> None:
        self.num_bytes = available_memory()  # to be measured before a model is loaded

    def room(self, settings: Settings, taken: int) -> Room:
        """Return the memory for a model with these settings, while others have `taken` host memory.

        On GPUs, one for each rank, each takes the same part of the model.
        """
        if is_on_host(settings):
            return Room(self.num_bytes, min(self.num_bytes - taken, available_memory()))
        number, num_ranks = _gpu_number(settings), settings.tensor_parallel_size
        gpus = [gpu_memory(number + rank) or GPUMemory(0, 0) for rank in range(num_ranks)]
        allowed = int(min(gpu.total for gpu in gpus) * settings.gpu_memory_utilization)
        return Room(num_ranks * allowed, num_ranks * min(allowed, *(gpu.free for gpu in gpus)))


class NoRoomError(Exception):
    """A model does not fit in memory. The message is the reason."""


class AbandonedError(Exception):
    """No request waits for a model any longer, which has not begun to load."""


class EngineGoneError(Exception):
    """The engine of a model that is being loaded has ended, or hangs. The message is the reason."""


class ModelManager(ModelRegistry):
    """Loads and unloads the models of a server. All methods are called on its event loop.

    Models are loaded one after the other, since each takes a part of the memory that is free.

    One that is loaded, or that the next request loads, is enough for health; while none is, `/healthz` still answers
    200, since a request can load one again. `/readyz` waits for those that are loaded at the start.
    """

    unloads = True

    def __init__(self, config: ApiProcessConfig, new_metrics: Callable[[str], Metrics], channel: Channel) -> None:
        """`channel` leads to the supervisor, which starts and stops engines."""
        super().__init__(config, new_metrics, channel)
        self.slots = slots = [LoadableSlot(slot.config, slot.metrics) for slot in self.slots]
        self.when_loaded = partial(waiting.respond, self.wait_loaded)
        self._never = asyncio.Event()
        self._slots = {slot.number: slot for slot in slots}
        self._order = channel.send
        self._idle_unload = config.settings.idle_unload
        self._budget = HostBudget()
        self._lock = asyncio.Lock()  # of the model that is being loaded
        self._started: dict[int, asyncio.Future[int]] = {}  # number of an engine -> its process, once it runs
        self._gone: dict[int, asyncio.Event] = {}  # number of an engine that has been started -> set when it has ended
        self._starting = {slot for slot in slots if slot.config.settings.load == "at-start"}
        self.has_started = asyncio.Event()  # set: the models that are loaded at the start are loaded, or have failed
        self.is_draining = False
        self._watcher: asyncio.Task[None] | None = None

    def load(self, client: EngineClient | None) -> None:
        """Load nothing before the event loop runs."""

    @property
    def metrics(self) -> CollectorRegistry:
        return super().metrics if len(self.slots) == 1 else JoinedRegistry([slot.metrics for slot in self.slots])

    @property
    def died(self) -> asyncio.Event:
        """Never set: a model can be loaded again."""
        return self._never

    async def start(self) -> None:
        """Begin to load the models that are loaded at the start, and to look for idle and dead ones."""
        for slot in self._slots.values():
            slot.now = asyncio.get_running_loop().time
            if slot in self._starting:
                self._begin_load(slot)
        if not self._starting:
            self.has_started.set()
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop what is being loaded and unloaded, and close the models that are loaded."""
        tasks = [task for task in (self._watcher, *(slot.task for slot in self._slots.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await super().close()

    async def _watch(self) -> None:
        """Unload models that are idle, and those whose client has given up an engine that may still run."""
        while True:
            await asyncio.sleep(IDLE_POLL_SECONDS)
            for slot in self._slots.values():
                served = slot.served
                if served is not None and (reason := served.client.dead_reason) is not None:
                    self._give_up(slot, served, reason)
                elif not slot.is_idle:
                    slot.last_used = slot.now()
                elif (limit := self.idle_limit(slot)) is not None and slot.now() - slot.last_used >= limit:
                    self._begin_unload(slot)

    async def wait_started(self) -> str:
        await self.has_started.wait()
        return ", ".join(f"{slot.name} ({slot.state})" for slot in self._slots.values())

    async def wait_changed(self) -> None:
        """Wait for ever: the next heartbeat says it."""
        await asyncio.Event().wait()

    def keep_loaded(self, request: Request, slot: ModelSlot | None) -> AbstractAsyncContextManager[None]:
        return waiting.loaded(self.wait_loaded, request, slot, waiting.patience(request) or 0.0)

    def idle_limit(self, slot: LoadableSlot) -> float | None:
        """Return the seconds without a request after which a model is unloaded. None: it stays loaded."""
        return self._idle_unload if slot.idle_limit is None else slot.idle_limit

    def seconds_left(self) -> dict[str, float | None]:
        """Return for each model, by name, after how many seconds it is unloaded if no request comes. None: it stays."""
        left = {slot.name: self.idle_limit(slot) for slot in self._slots.values()}
        for slot in self._slots.values():
            if (limit := left[slot.name]) is not None and slot.is_idle:
                left[slot.name] = max(0.0, slot.last_used + limit - slot.now())
        return left

    def drain(self) -> None:
        """Admit no new work and load no more models: the server shuts down."""
        self.is_draining = True
        for slot in self._slots.values():
            if slot.task is not None and slot.load_requested is not None:
                slot.task.cancel()
        super().drain()

    def is_usable(self, slot: LoadableSlot) -> bool:
        """Return whether requests use a model, or load it: they do not soon after it has failed."""
        return slot.state is not ModelState.FAILED or slot.now() >= slot.failed_at + RETRY_SECONDS

    async def wait_loaded(self, slot: LoadableSlot, seconds: float, tenant: Tenant) -> None:
        """Wait until a model is loaded, which begins now if need be. Only an admin learns why it cannot be.

        Raises ModelLoadError if it cannot be loaded, LoadTimeoutError if that takes more than `seconds`, and
        EngineUnavailableError if the server shuts down.
        """
        deadline = slot.now() + seconds
        while slot.served is None:
            if self.is_draining:
                raise EngineUnavailableError(SHUTTING_DOWN, close=True)
            if slot.task is None and not self.is_usable(slot):
                raise ModelLoadError(slot.name, slot.failure if tenant.is_admin else "")
            task = slot.task or self._begin_load(slot)
            await asyncio.wait([task], timeout=max(0.0, deadline - slot.now()))
            if not task.done():
                raise LoadTimeoutError(slot.name, seconds)

    # The answers of the probes.

    def health(self, *, is_stuck: bool) -> Response:
        return self._answer(NO_PROGRESS if is_stuck else self._no_model())

    def alive(self) -> Response:
        return self._answer(None)

    def ready(self, *, is_stuck: bool) -> Response:
        problem = self._no_model() if self.has_started.is_set() else "The models are still being loaded."
        return self._answer(DRAINING if self.is_draining else problem)

    def _no_model(self) -> str | None:
        """Return the problem that no model can be used at this time, or None."""
        return None if any(map(self.is_usable, self._slots.values())) else "No model can be loaded."

    def _answer(self, problem: str | None) -> Response:
        """Return 200 with the number of models in each state, unless there is a problem."""
        if problem is not None:
            return EngineUnavailableError(problem).response()
        states = Counter(slot.state for slot in self._slots.values())
        restarts = sum(model.client.num_restarts for model in self.loaded)
        return StructResponse({"status": "ok", "restarts": restarts, "models": states})

    # Messages from the supervisor.

    def engine_started(self, number: int, pid: int) -> None:
        """A process of an engine runs: the first one, or one in place of another that has ended."""
        if (started := self._pending(number)) is not None:
            started.set_result(pid)
        elif (served := self._slots[number].served) is not None:
            served.client.engines[0].engine_started(pid)

    def engine_gone(self, number: int, reason: str) -> None:
        """An engine has ended, and is not started again until its model is needed."""
        if number in self._gone:
            self._gone[number].set()
        if (started := self._pending(number)) is not None:
            started.set_exception(EngineGoneError(reason))
        slot = self._slots[number]
        if slot.served is not None:
            slot.served.client.engines[0].liveness.mark_dead(reason)
            self._give_up(slot, slot.served, reason)

    def _pending(self, number: int) -> asyncio.Future[int] | None:
        """Return what waits for the process of an engine, unless the load has been cancelled."""
        started = self._started.pop(number, None)
        return None if started is None or started.done() else started

    def _give_up(self, slot: LoadableSlot, served: ServedModel, reason: str) -> None:
        """Unload a model that is dead, so that it can be loaded again."""
        self._note_failure(slot, reason)
        slot.served = None
        slot.task = asyncio.create_task(self._close(slot, served))

    # Loading.

    def _begin_load(self, slot: LoadableSlot) -> asyncio.Task[None]:
        slot.load_requested, slot.failure = slot.now(), ""
        slot.task = asyncio.create_task(self._load(slot))
        return slot.task

    async def _load(self, slot: LoadableSlot) -> None:
        try:
            async with self._lock:
                memory_limit = await self._make_room(slot)
                slot.served = await _within_limit(self._start(slot, memory_limit))
        except AbandonedError:
            logger.info("%s is not loaded: no request waits for it any longer", slot.name)
        except (EngineGoneError, NoRoomError, OSError, ValueError) as error:
            self._note_failure(slot, str(error))
            await self._stop(slot)
        except Exception:
            logger.exception("%s cannot be loaded", slot.name)
            self._note_failure(slot, "an internal error")
            await self._stop(slot)
        finally:
            slot.load_requested = slot.load_began = slot.task = None
            self._end_start(slot)

    def _end_start(self, slot: LoadableSlot) -> None:
        self._starting.discard(slot)
        if not self._starting:
            self.has_started.set()

    def _note_failure(self, slot: LoadableSlot, reason: str) -> None:
        logger.error("%s cannot be used: %s", slot.name, reason)
        slot.failure, slot.failed_at = reason.rstrip("."), slot.now()

    async def _make_room(self, slot: LoadableSlot) -> int:
        """Unload idle models until this one fits, the least recently used first. Return the bytes that it may use.

        While all others are in use, it waits. Raises NoRoomError if the model can never fit, AbandonedError if nobody
        waits for it any longer, and OSError or ValueError if its files are invalid, or EngineGoneError if they hang.
        """
        read = anyio.to_thread.run_sync(
            lambda: least_memory(slot.config.settings, slot.weight_files, load_model_config(Path(slot.config.path)))
        )
        needed = await _within_limit(read)
        while True:
            others = [other for other in self._slots.values() if other is not slot]
            taken = sum(other.memory for other in others)
            room = await anyio.to_thread.run_sync(self._budget.room, slot.config.settings, taken)
            if needed <= room.free:
                return room.free
            if needed > room.num_bytes:
                limit = format_bytes(room.num_bytes)
                raise NoRoomError(f"it needs about {format_bytes(needed)} of memory, and the server may use {limit}")
            if not any(self._runs(other) for other in others):
                free = format_bytes(room.free)
                raise NoRoomError(f"it needs about {format_bytes(needed)} of memory, and {free} are free")
            if slot.num_users == 0 and slot not in self._starting:
                raise AbandonedError
            idle = [other for other in others if other.is_idle]
            if idle:
                await self._begin_unload(min(idle, key=lambda other: other.last_used))
            else:
                await asyncio.sleep(POLL_SECONDS)

    def _runs(self, slot: LoadableSlot) -> bool:
        """Return whether a model has an engine, which holds memory."""
        gone = self._gone.get(slot.number)
        return gone is not None and not gone.is_set()

    async def _start(self, slot: LoadableSlot, memory_limit: int) -> ServedModel:
        """Start the engine of a model, and return the model when it is ready.

        Raises EngineGoneError if the engine ends, and OSError or ValueError if the model's files are invalid.
        """
        slot.load_began = slot.now()
        gone = self._gone[slot.number] = asyncio.Event()
        started = self._started[slot.number] = asyncio.get_running_loop().create_future()
        self._order(StartEngine(slot.number, memory_limit))
        (engine,) = slot.config.engines
        config = replace(slot.config, engines=(replace(engine, pid=await started),))
        load = partial(load_served_model, config, slot.metrics, can_restart=True)
        served = await anyio.to_thread.run_sync(load)
        try:
            await served.client.start()
            await _wait_ready(served.client, gone)
        except BaseException:
            await served.close()
            raise
        info = served.client.ready_info()
        slot.memory = memory_taken(info) if is_on_host(slot.config.settings) else 0  # that of a GPU is measured
        slot.load_seconds = slot.now() - slot.load_began
        slot.last_used = slot.now()
        logger.info("%s is loaded after %.1f s", slot.name, slot.load_seconds)
        return served

    # Unloading.

    def _begin_unload(self, slot: LoadableSlot) -> asyncio.Task[None]:
        """Unload an idle model."""
        served, slot.served = slot.served, None
        assert served is not None
        slot.task = asyncio.create_task(self._close(slot, served))
        return slot.task

    async def _close(self, slot: LoadableSlot, served: ServedModel) -> None:
        try:
            served.client.drain()
            await served.close()
        except Exception:
            logger.exception("%s cannot be closed", slot.name)
        try:
            await self._stop(slot)
            logger.info("%s is unloaded", slot.name)
        finally:
            slot.task = None

    async def _stop(self, slot: LoadableSlot) -> None:
        """End the engine of a model, if it runs."""
        slot.metrics.engines.clear()
        if self._runs(slot):
            self._order(StopEngine(slot.number))
            await self._gone[slot.number].wait()
        slot.memory, slot.idle_limit = 0, None


async def _within_limit(loading: Awaitable[T]) -> T:
    """Return the result of a step of a load. Raises EngineGoneError if it hangs."""
    limit = asyncio.timeout(LOAD_TIMEOUT)
    try:
        async with limit:
            return await loading
    except TimeoutError:
        if limit.expired():
            raise EngineGoneError(f"it was not ready within {LOAD_TIMEOUT:g} seconds") from None
        raise


async def _wait_ready(client: EngineClient, gone: asyncio.Event) -> None:
    """Wait until an engine is ready. Raises EngineGoneError if it dies before, or ends."""
    waits = [asyncio.create_task(event.wait()) for event in (client.became_ready, client.died, gone)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    if client.dead_reason is not None or gone.is_set():
        raise EngineGoneError(client.dead_reason or "its process has ended")
