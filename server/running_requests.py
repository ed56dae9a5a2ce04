"""The requests that this process is answering, by id, so that they can be cancelled."""

from collections.abc import Callable
from typing import Protocol


class Cancellable(Protocol):
    """The part of a generation that the registry uses."""

    def abort(self) -> bool:
        """End the choices that still run. Return whether there were any."""

    def close(self) -> None: ...


class RunningRequests:
    """Generations by the ids a client may use: the response id and the x-request-id, which need not be unique."""

    def __init__(self) -> None:
        self._by_id: dict[str, list[Cancellable]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def add(self, generation: Cancellable, *ids: str, on_close: Callable[[], None] | None = None) -> "RunningRequest":
        """Register a generation under `ids`. The caller must close the returned request.

        Each `close` of the returned request calls `on_close`.
        """
        for request_id in ids:
            self._by_id.setdefault(request_id, []).append(generation)
        return RunningRequest(self, generation, ids, on_close)

    def remove(self, generation: Cancellable, ids: tuple[str, ...]) -> None:
        for request_id in ids:
            generations = self._by_id[request_id]
            generations.remove(generation)
            if not generations:
                del self._by_id[request_id]

    def cancel(self, request_id: str) -> bool:
        """End the generations with this id; their finish reason is `abort`. Return whether any was running."""
        return any([generation.abort() for generation in self._by_id.get(request_id, ())])


class RunningRequest:
    """A generation and its entries in `RunningRequests`, which `close` removes."""

    def __init__(
        self,
        requests: RunningRequests,
        generation: Cancellable,
        ids: tuple[str, ...],
        on_close: Callable[[], None] | None,
    ) -> None:
        self._requests = requests
        self._on_close = on_close
        self._generation = generation
        self._ids = ids

    def close(self) -> None:
        """End the generation if it still runs, and remove its entries. May be called again."""
        self._generation.close()
        if self._on_close is not None:
            self._on_close()
        self._requests.remove(self._generation, self._ids)
        self._ids = ()
