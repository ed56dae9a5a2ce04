"""The requests that this process is answering, by id, so that they can be cancelled."""

from collections.abc import Sequence
from typing import Protocol

from server.tenants import OwnedId


class Cancellable(Protocol):
    """The part of a generation that the registry uses."""

    def abort(self) -> bool:
        """End the choices that still run. Return whether there were any."""


class RunningRequests:
    """Generations by their owner and the ids a client may use: the response id and the x-request-id.

    The latter need not be unique, and is easily guessed: only the owner finds a request by it.
    """

    def __init__(self) -> None:
        self._by_id: dict[OwnedId, list[Cancellable]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, key: OwnedId) -> bool:
        return key in self._by_id

    def add(self, generation: Cancellable, ids: Sequence[str], owner: str) -> tuple[OwnedId, ...]:
        """Register a generation of `owner` under `ids`, and return its keys, with which the caller must remove it."""
        keys = tuple([(owner, request_id) for request_id in ids])
        for key in keys:
            self._by_id.setdefault(key, []).append(generation)
        return keys

    def remove(self, generation: Cancellable, keys: Sequence[OwnedId]) -> None:
        for key in keys:
            generations = self._by_id[key]
            generations.remove(generation)
            if not generations:
                del self._by_id[key]

    def cancel(self, request_id: str, owner: str) -> bool:
        """End the generations of `owner` with this id, with finish reason `abort`. Return whether any was running."""
        return any([generation.abort() for generation in self._by_id.get((owner, request_id), ())])
