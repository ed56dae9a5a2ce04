"""One limit on the bytes of all request bodies in memory."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from server.http.errors import BuffersExceedMemoryError

FREE_BYTES = 16 << 10  # smaller bodies are not counted, so that small requests pass while large ones fill the budget


class BodyShare:
    """One body, or what has arrived of it, and its share of a `BodyBudget`."""

    def __init__(self, budget: "BodyBudget", deadline: asyncio.Timeout) -> None:
        self._budget = budget
        self._deadline = deadline
        self.chunks: list[bytes] = []  # until it is complete
        self.body = b""  # from then on
        self.num_bytes = 0
        self.num_counted = 0  # bytes, as of the last `BodyBudget.update`
        self.is_refused = False

    def add(self, chunk: bytes) -> None:
        """Keep and count bytes that were received. Raises BuffersExceedMemoryError if this body has been refused."""
        if not self.is_refused:
            self.chunks.append(chunk)
            self.num_bytes += len(chunk)
            if self.num_bytes > FREE_BYTES:
                self._budget.update(self)
        if self.is_refused:
            raise BuffersExceedMemoryError

    def refuse(self) -> None:
        """Make the task that receives the body stop."""
        self.is_refused = True
        self.release()
        if not self._deadline.expired():
            self._deadline.reschedule(0)

    def release(self) -> None:
        """Drop the body, and count it no longer. Has no effect the second time."""
        self.chunks.clear()
        self.body = b""
        self.num_bytes = 0
        if self.num_counted:
            self._budget.update(self)


class BodyBudget:
    """Counts the bytes of request bodies in memory, and refuses bodies when there are too many.

    A body counts from the moment that it is larger than `FREE_BYTES` until it is released. Only bodies that are still
    being received can be refused; those that have been counted longest are refused first.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._receiving: dict[BodyShare, None] = {}  # in the order in which they began to count
        self.num_bytes = 0

    @contextmanager
    def receive(self, deadline: asyncio.Timeout) -> Iterator[BodyShare]:
        """Count the body that is received in this context, which `deadline` must surround.

        After an exception the body is released; otherwise it is complete, and the caller does that.
        """
        share = BodyShare(self, deadline)
        try:
            yield share
            share.body = b"".join(share.chunks)
            share.chunks.clear()
        except BaseException:
            share.release()
            raise
        finally:
            self._receiving.pop(share, None)

    def update(self, share: BodyShare) -> None:
        """Count the current size of a body, and refuse bodies until all of them fit."""
        num_counted = share.num_bytes if share.num_bytes > FREE_BYTES else 0
        if num_counted and not share.num_counted:
            self._receiving[share] = None
        self.num_bytes += num_counted - share.num_counted
        share.num_counted = num_counted
        while self.num_bytes > self._max_bytes and self._receiving:
            longest = next(iter(self._receiving))
            del self._receiving[longest]
            longest.refuse()
