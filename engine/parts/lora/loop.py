"""Loading and unloading of LoRA adapters while steps run, one after the other, in the order of the requests.

Reading a file may take long, so a thread does it. The matrices are written to the model between steps, some at a time.
So an update is a generator that advances a little in each pass of the engine's loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from engine.config import ModelConfig
from engine.parts.lora.checkpoint import LoraCheckpoint
from engine.parts.lora.slots import AdapterError, LoraAdapters, read_adapter
from engine.scheduling.scheduler import Scheduler
from engine.shared.messages import AdapterDone, Adapters, LoadAdapter, UnloadAdapter

if TYPE_CHECKING:
    from engine.api_connections import Damaged
    from engine.process import EngineLoop


logger = logging.getLogger("lightwell.engine")

MAX_PENDING = 16  # updates
READ_TIMEOUT = 120.0  # seconds
SLOT_TIMEOUT = 60.0
WRITE_SECONDS = 0.005  # in one pass of the loop

UpdateRequest = LoadAdapter | UnloadAdapter


class AdapterUpdates:
    """The queue of loads and unloads that API processes have requested. The first is in progress."""

    def __init__(
        self,
        adapters: LoraAdapters,
        config: ModelConfig,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.adapters = adapters
        self.config = config
        self.scheduler = scheduler
        self.clock = clock
        self.queue: deque[tuple[bytes, UpdateRequest]] = deque()  # API process, and its request
        self._current: Iterator[None] | None = None  # the update of the first request, once it has begun

    def add(self, client: bytes, request: UpdateRequest) -> AdapterDone | None:
        """Queue an update. Return a refusal if too many are pending."""
        if len(self.queue) >= MAX_PENDING:
            problem = f"{MAX_PENDING} changes of LoRA adapters are pending already"
            return AdapterDone(request_id=request.request_id, error=problem, is_temporary=True)
        self.queue.append((client, request))
        return None

    def advance(self) -> list[tuple[bytes, AdapterDone]]:
        """Work on the pending updates for some milliseconds. Return (API process, reply) for each that has finished."""
        replies: list[tuple[bytes, AdapterDone]] = []
        while self.queue:
            client, request = self.queue[0]
            reply = self._advance(request)
            if reply is None:
                break
            self.queue.popleft()
            self._current = None
            replies.append((client, reply))
        return replies

    def _advance(self, request: UpdateRequest) -> AdapterDone | None:
        """Begin or continue the first update. Return the reply once it has finished."""
        try:
            self._current = self._current or self._update(request)
            next(self._current)
        except StopIteration:
            return AdapterDone(request_id=request.request_id)
        except AdapterError as error:
            return AdapterDone(
                request_id=request.request_id, error=str(error), field=error.field, is_temporary=error.is_temporary
            )
        except Exception as error:  # from reading files or from torch; only this update fails
            logger.exception("a LoRA adapter cannot be loaded")
            problem = f"LoRA adapter {request.name}: cannot be loaded ({type(error).__name__})"
            return AdapterDone(request_id=request.request_id, error=problem)
        return None

    def _update(self, request: UpdateRequest) -> Iterator[None]:
        adapters, name = self.adapters, request.name
        if isinstance(request, UnloadAdapter):
            adapters.unload(name)
            return
        adapters.check_name(name, replaces=request.replaces)
        reading = run_in_thread(lambda: read_adapter(name, request.path, self.config, adapters.max_rank))
        started = self.clock()
        while not reading.done():
            if self.clock() - started > READ_TIMEOUT:
                problem = f"LoRA adapter {name}: reading it has taken more than {READ_TIMEOUT:.0f} seconds"
                raise AdapterError(problem, is_temporary=True)
            yield
        checkpoint = reading.result()
        started = self.clock()
        while (slot := adapters.reserve(self._slots_in_use())) is None:
            if self.clock() - started > SLOT_TIMEOUT:
                problem = f"LoRA adapter {name}: all slots are in use by running requests"
                raise AdapterError(problem, is_temporary=True)
            yield
        started = self.clock()
        for _ in adapters.write(slot, checkpoint):
            if self.clock() - started > WRITE_SECONDS:
                yield
                started = self.clock()
        adapters.publish(name, request.path, slot, checkpoint)

    def _slots_in_use(self) -> set[int]:
        return {request.lora_slot for request in self.scheduler.requests()}


def run_in_thread(function: Callable[[], LoraCheckpoint]) -> Future[LoraCheckpoint]:
    """Call `function` in a new thread, which does not keep the process alive, and return its future result."""
    future: Future[LoraCheckpoint] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised again by `result`
            future.set_exception(error)

    threading.Thread(target=run, name="adapter", daemon=True).start()
    return future


class UpdateQueue:
    """The part of the loop that updates adapters."""

    def __init__(self, loop: EngineLoop) -> None:
        engine = loop.engine
        self.loop = loop
        adapters = engine.adapters if isinstance(engine.adapters, LoraAdapters) else LoraAdapters([], 0, 0)
        self.updates = AdapterUpdates(adapters, engine.model_config, engine.scheduler, clock=engine.clock)

    def add(self, identity: bytes, request: LoadAdapter | UnloadAdapter) -> None:
        """Queue an update for an API process."""
        if (refusal := self.updates.add(identity, request)) is not None:
            self.loop.connections.send(identity, refusal)
        elif self.advance not in self.loop.polled:
            self.loop.polled.append(self.advance)

    def advance(self) -> None:
        """Work on the updates. Send the loaded adapters to all API processes, then the result to the one that asked."""
        connections = self.loop.connections
        for identity, done in self.updates.advance():
            for process in list(connections.identities):  # one that has gone is removed
                connections.send(process, Adapters(self.loop.engine.adapters.loaded()))
            connections.send(identity, done)
        if not self.updates.queue:
            self.loop.polled.remove(self.advance)

    def refuse(self, identity: bytes, damaged: Damaged) -> None:
        """Answer an unreadable request."""
        done = AdapterDone(request_id=damaged.request_id, error="the request cannot be read", is_temporary=True)
        self.loop.connections.send(identity, done)


def attach(loop: EngineLoop) -> None:
    """Handle the messages about adapters."""
    queue = UpdateQueue(loop)
    for kind in (LoadAdapter, UnloadAdapter):
        loop.handlers[kind] = queue.add
        loop.unreadable[kind.__name__] = queue.refuse
