"""Adapters that come and go while steps run, one after the other, in the order in which they were asked for.

A file is read in a thread, for that may take long; its matrices are written to the model between the steps, some at a
time. So a change is a generator, which goes on a little in each pass of the engine's loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from engine.config import ModelConfig
from engine.lora.reader import LoraCheckpoint
from engine.lora.slots import AdapterError, LoraAdapters, read_adapter
from engine.scheduling.scheduler import Scheduler
from engine.shared.messages import AdapterDone, LoadAdapter, UnloadAdapter

logger = logging.getLogger("lightwell.engine")

MAX_CHANGES = 16  # that wait
READ_SECONDS = 120.0
PLACE_SECONDS = 60.0
WRITE_SECONDS = 0.005  # of one pass of the loop

Message = LoadAdapter | UnloadAdapter


class AdapterChanges:
    """What clients want changed of an engine's adapters."""

    def __init__(self, adapters: LoraAdapters, config: ModelConfig, scheduler: Scheduler) -> None:
        self.adapters = adapters
        self.config = config
        self.scheduler = scheduler
        self._waiting: deque[tuple[bytes, Message]] = deque()
        self._change: Iterator[None] | None = None  # of the first that waits, once it has begun

    def __bool__(self) -> bool:
        """Whether there is something to go on with."""
        return bool(self._waiting)

    def add(self, client: bytes, message: Message) -> AdapterDone | None:
        """Queue a change. Returns the answer where there are too many already."""
        if len(self._waiting) >= MAX_CHANGES:
            problem = f"{MAX_CHANGES} changes of LoRA adapters are waiting already"
            return AdapterDone(request_id=message.request_id, error=problem, is_temporary=True)
        self._waiting.append((client, message))
        return None

    def advance(self) -> list[tuple[bytes, AdapterDone]]:
        """Go on for a moment. Returns the answers of those that have come to an end, and who asked for them."""
        answers: list[tuple[bytes, AdapterDone]] = []
        while self._waiting:
            client, message = self._waiting[0]
            answer = self._advance(message)
            if answer is None:
                break
            self._waiting.popleft()
            self._change = None
            answers.append((client, answer))
        return answers

    def _advance(self, message: Message) -> AdapterDone | None:
        try:
            self._change = self._change or self._begin(message)
            next(self._change)
        except StopIteration:
            return AdapterDone(request_id=message.request_id)
        except AdapterError as error:
            return AdapterDone(
                request_id=message.request_id, error=str(error), field=error.field, is_temporary=error.is_temporary
            )
        except Exception as error:  # of what reads files or of torch: it ends this change alone
            logger.exception("a LoRA adapter cannot be loaded")
            problem = f"LoRA adapter {message.name}: cannot be loaded ({type(error).__name__})"
            return AdapterDone(request_id=message.request_id, error=problem)
        return None

    def _begin(self, message: Message) -> Iterator[None]:
        return self._load(message) if isinstance(message, LoadAdapter) else self._unload(message)

    def _unload(self, message: UnloadAdapter) -> Iterator[None]:
        self.adapters.unload(message.name)
        yield from ()

    def _load(self, message: LoadAdapter) -> Iterator[None]:
        adapters, name = self.adapters, message.name
        adapters.check(name, replaces=message.replaces)
        read = in_thread(lambda: read_adapter(name, message.path, self.config, adapters.max_rank))
        started = time.monotonic()
        while not read.done():
            if time.monotonic() - started > READ_SECONDS:
                problem = f"LoRA adapter {name}: reading it has taken more than {READ_SECONDS:.0f} seconds"
                raise AdapterError(problem, is_temporary=True)
            yield
        checkpoint = read.result()
        started = time.monotonic()
        while (place := adapters.reserve(self._places_in_use())) is None:
            if time.monotonic() - started > PLACE_SECONDS:
                problem = f"LoRA adapter {name}: requests that run use all places of those that were loaded before"
                raise AdapterError(problem, is_temporary=True)
            yield
        started = time.monotonic()
        for _ in adapters.write(place, checkpoint):
            if time.monotonic() - started > WRITE_SECONDS:
                yield
                started = time.monotonic()
        adapters.publish(name, message.path, place, checkpoint)

    def _places_in_use(self) -> set[int]:
        return {request.lora_place for request in self.scheduler.requests()}


def in_thread(function: Callable[[], LoraCheckpoint]) -> Future[LoraCheckpoint]:
    """Call it in a thread of its own, for which the end of the process does not wait."""
    future: Future[LoraCheckpoint] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # which whoever reads the result gets
            future.set_exception(error)

    threading.Thread(target=run, name="adapter", daemon=True).start()
    return future
