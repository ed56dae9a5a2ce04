"""The requests that this process is answering, by id, so that they can be cancelled."""

from collections.abc import Callable
from typing import Protocol

from server.tenants import OwnedId


class Cancellable(Protocol):
    """The part of a generation that the registry uses."""

    def abort(self) -> bool:
        """End the choices that still run. Return whether there were any."""

    def close(self) -> None: ...


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

    def add(
        self, generation: Cancellable, *ids: str, owner: str, on_close: Callable[[], None] | None = None
    ) -> "RunningRequest":
        """Register a generation of `owner` under `ids`. The caller must close the returned request.

        Each `close` of the returned request calls `on_close`.
        """
        keys = tuple((owner, request_id) for request_id in ids)
        for key in keys:
            self._by_id.setdefault(key, []).append(generation)
        return RunningRequest(self, generation, keys, on_close)

    def remove(self, generation: Cancellable, keys: tuple[OwnedId, ...]) -> None:
        for key in keys:
            generations = self._by_id[key]
            generations.remove(generation)
            if not generations:
                del self._by_id[key]

    def cancel(self, request_id: str, owner: str) -> bool:
        """End the generations of `owner` with this id, with finish reason `abort`. Return whether any was running."""
        return any([generation.abort() for generation in self._by_id.get((owner, request_id), ())])


class RunningRequest:
    """A generation and its entries in `RunningRequests`, which `close` removes."""

    def __init__(
        self,
        requests: RunningRequests,
        generation: Cancellable,
        keys: tuple[OwnedId, ...],
        on_close: Callable[[], None] | None,
    ) -> None:
        self._requests = requests
        self._on_close = on_close
        self._generation = generation
        self._keys = keys

    def close(self) -> None:
        """End the generation if it still runs, and remove its entries. May be called again."""
        self._generation.close()
        if self._on_close is not None:
            self._on_close()
        self._requests.remove(self._generation, self._keys)
        self._keys = ()
