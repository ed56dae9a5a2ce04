"""An admitted request: the capacity that it holds, from its admission to the end of its last choice."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from server.engine_client.answer_budget import AnswerShare
from server.http.errors import APIError
from server.tenants import Tenant


class FailingStream(Protocol):
    """The part of a `RequestStream` that its reservation uses."""

    def fail(self, error: APIError) -> None:
        """Abort the request in the engine, and raise `error` to the reader."""


class Reservation:
    """The capacity of a tenant's request. Leaving its context returns what no stream uses.

    Streams return the capacity of their choices themselves, one by one as they end.
    """

    def __init__(self, tenant: Tenant, on_change: Callable[[Reservation, int], None]) -> None:
        """Begin without capacity. `on_change` is called with each change of `num_choices`."""
        self.tenant = tenant
        self.count = 0  # reserved choices that no stream uses yet
        self.num_choices = 0  # these and those in streams
        self.started: float | None = None  # when the engine has reported that it has begun with it
        self.has_output = False  # there are events of it
        self.num_lost_starts = 0  # how often it had started, without output, in an engine that was lost
        self.is_answered = False  # the client has its HTTP status
        self.num_waiting_tokens = 0.0  # that the engine is expected to compute for choices that it has not begun with
        self.queue_timeout = math.inf  # seconds
        self.start_by = self.end_by = math.inf  # times of the event loop
        self.answer: AnswerShare | None = None  # counts its events; None: they are few
        self.on_start: Callable[[], None] | None = None  # called when the engine begins with it
        self.on_failure: Callable[[APIError], None] | None = None  # called when an error ends it
        self._on_change = on_change
        self._streams: set[FailingStream] = set()
        self.error: APIError | None = None  # that ended the request
        self._is_settled = asyncio.Event()  # it has started, failed or ended

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    @property
    def is_waiting(self) -> bool:
        """True if nothing is lost by ending the request, because the engine has not begun with it."""
        return self.started is None and self.error is None

    def add(self, count: int) -> None:
        """Reserve the capacity of `count` more choices, which the caller has found free."""
        self.count += count
        self._change_choices(count)

    def release(self) -> None:
        """Return the capacity that no stream uses."""
        count, self.count = self.count, 0
        if count:
            self._change_choices(-count)

    def hand_over(self, count: int, stream: FailingStream) -> None:
        """Pass the capacity of `count` choices to a stream, which calls `end_choice` for each."""
        assert count <= self.count
        self.count -= count
        self._streams.add(stream)

    def end_choice(self) -> None:
        """Return the capacity of a choice that ended in a stream."""
        self._change_choices(-1)

    def end_stream(self, stream: FailingStream) -> None:
        """Forget a stream whose choices have ended."""
        self._streams.discard(stream)

    def start(self) -> None:
        """Note that the engine has begun with the request."""
        if self.started is None:
            self.started = time.monotonic()
            self._is_settled.set()
            if self.on_start is not None:
                self.on_start()

    def lose_start(self) -> None:
        """Note that the engine is lost. A request without output waits for the next one, in its place in the queue.

        The time in which the engine computed it does not count as waiting.
        """
        if self.started is not None and not self.has_output:
            self.start_by += time.monotonic() - self.started
            self.started = None
            self.num_lost_starts += 1

    def check(self) -> None:
        """Raise the error that ended the request, if one did."""
        if self.error is not None:
            raise self.error

    def fail(self, error: APIError) -> None:
        """End the request: its streams raise `error`, and `check` does from now on."""
        if self.error is not None:
            return
        self.error = error
        if self.on_failure is not None:
            self.on_failure(error)
        Reservation.release(self)  # whoever holds it releases it, too
        for stream in list(self._streams):
            stream.fail(error)
        self._is_settled.set()

    async def wait_for_start(self, seconds: float) -> None:
        """Wait until the request has started, but at most `seconds`; the client gets the status 200 then.

        Raises the error that ended the request meanwhile.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_settled.wait()
        self.check()
        self.is_answered = True

    def _change_choices(self, count: int) -> None:
        self.num_choices += count
        assert self.num_choices >= self.count >= 0
        self._on_change(self, count)
        if not self.num_choices:
            self._is_settled.set()
