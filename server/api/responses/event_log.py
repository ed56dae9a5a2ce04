"""The events of a stream, kept while they come, so that others can read them too: from any one on, and later again."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, Sequence

from server.http.errors import ResponseGoneError

BLOCK_EVENTS = 64
OBJECT_BYTES = 41  # that Python takes for an event's bytes, and for its place in a list


class EventLog:
    """One task writes, and others read, each at its own pace: none waits for another.

    An event's place is its `sequence_number`. Events are very much alike, so all but the latest are kept compressed.
    """

    def __init__(self, response_id: str) -> None:
        self.num_events = 0
        self.num_bytes = 0  # that it takes
        self.is_dropped = False
        self._response_id = response_id
        self._blocks: list[bytes] = []  # of BLOCK_EVENTS events each, but for the last one of a log that is closed
        self._tail: list[bytes] = []
        self._is_closed = False
        self._first = 0  # those before are not read any more
        self._changed = asyncio.Event()

    def append(self, events: Sequence[bytes]) -> None:
        """`events` are framed: each ends with an empty line, and has no other."""
        for event in events:
            self._tail.append(event)
            self.num_events += 1
            self.num_bytes += len(event) + OBJECT_BYTES
            if len(self._tail) == BLOCK_EVENTS:
                self._compress()
        self._wake()

    def close(self) -> None:
        """There are no more events. May be called again."""
        if self._tail:
            self._compress()
        self._is_closed = True
        self._wake()

    def drop(self) -> None:
        """Nobody can ask for it any more. Who has read all events so far reads on to the end; others do not.

        May be called in another thread.
        """
        self._first = self.num_events
        self.is_dropped = True

    async def read(self, start: int) -> AsyncGenerator[bytes, None]:
        """The events from number `start` on up to the last one, some at a time. Raises ResponseGoneError."""
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
        """Those of the block that `start` is in, and the number of what comes after it."""
        index, num_before = divmod(start, BLOCK_EVENTS)
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
        self._changed.set()
        self._changed = asyncio.Event()
