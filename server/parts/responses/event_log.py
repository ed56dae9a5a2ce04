"""The events of one stream, stored as they are written so that several readers can follow it from any event on."""

import asyncio
import threading
import zlib
from collections.abc import AsyncGenerator, Sequence

from server.http.errors import ResponseGoneError

BLOCK_EVENTS = 64
OBJECT_BYTES = 41  # memory of a bytes object and its list entry, beside its content


class EventLog:
    """The log of one stream: one task writes, others read at their own pace without blocking it.

    The readers are in one event loop. The writer may be in a thread, as long events are written there. Events are
    indexed by their `sequence_number`. They are very similar, so all but the latest are kept compressed.
    """

    def __init__(self, response_id: str) -> None:
        self.num_events = 0
        self.num_bytes = 0  # memory used
        self.is_dropped = False
        self._response_id = response_id
        self._blocks: list[bytes] = []  # BLOCK_EVENTS events each; the last block of a closed log may have fewer
        self._tail: list[bytes] = []
        self._is_closed = False
        self._first = 0  # number of the first event that can still be read
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None  # that of the readers, if there were any
        self._changed = asyncio.Event()

    def append(self, events: Sequence[bytes]) -> None:
        """Append encoded events. Each must end with its only empty line."""
        with self._lock:
            for event in events:
                self._tail.append(event)
                self.num_events += 1
                self.num_bytes += len(event) + OBJECT_BYTES
                if len(self._tail) == BLOCK_EVENTS:
                    self._compress()
        self._wake()

    def close(self) -> None:
        """Mark the end of the log. May be called again."""
        with self._lock:
            if self._tail:
                self._compress()
            self._is_closed = True
        self._wake()

    def drop(self) -> None:
        """Discard the events so far. Readers that have read all of them continue to the end; others fail.

        May be called from another thread.
        """
        self._first = self.num_events
        self.is_dropped = True

    async def read(self, start: int) -> AsyncGenerator[bytes, None]:
        """Yield the events from number `start` to the end of the log, several at a time.

        Raises ResponseGoneError if they were dropped.
        """
        self._loop = asyncio.get_running_loop()
        while True:
            changed = self._changed
            if start < self._first:
                raise ResponseGoneError(self._response_id)
            if start < self.num_events:
                events, start = self._from(start)
                yield events
            elif self._is_closed:
                return
            else:
                await changed.wait()

    def _from(self, start: int) -> tuple[bytes, int]:
        """Return the events from `start` to the end of its block, and the number of the event after them."""
        index, num_before = divmod(start, BLOCK_EVENTS)
        with self._lock:
            if index == len(self._blocks):
                return b"".join(self._tail[num_before:]), self.num_events
        block = zlib.decompress(self._blocks[index])
        return block.split(b"\n\n", num_before)[-1], min((index + 1) * BLOCK_EVENTS, self.num_events)

    def _compress(self) -> None:
        block = zlib.compress(b"".join(self._tail), level=1)
        self.num_bytes += len(block) + OBJECT_BYTES - sum(len(event) + OBJECT_BYTES for event in self._tail)
        self._blocks.append(block)
        self._tail = []

    def _wake(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake_readers)

    def _wake_readers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
