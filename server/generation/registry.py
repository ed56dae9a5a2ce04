"""The requests that this process is answering, so that they can be ended by their ids."""

from collections.abc import Callable

from server.generation.generation import Generation


class RunningRequests:
    """Generations by the ids that a client knows: that of the answer, and the x-request-id, which may stand twice."""

    def __init__(self) -> None:
        self._by_id: dict[str, list[Generation]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def add(self, generation: Generation, *ids: str, on_close: Callable[[], None] | None = None) -> "RunningRequest":
        """To be closed, as the generation itself; `on_close` is called then, perhaps more than once."""
        for request_id in ids:
            self._by_id.setdefault(request_id, []).append(generation)
        return RunningRequest(self, generation, ids, on_close)

    def cancel(self, request_id: str) -> bool:
        """Whether there was something to end. Its answer ends as it stands, with the finish reason `abort`."""
        return any([generation.abort() for generation in self._by_id.get(request_id, ())])

    def _remove(self, generation: Generation, ids: tuple[str, ...]) -> None:
        for request_id in ids:
            generations = self._by_id[request_id]
            generations.remove(generation)
            if not generations:
                del self._by_id[request_id]


class RunningRequest:
    def __init__(
        self,
        requests: RunningRequests,
        generation: Generation,
        ids: tuple[str, ...],
        on_close: Callable[[], None] | None,
    ) -> None:
        self._requests = requests
        self._on_close = on_close
        self._generation = generation
        self._ids = ids

    def close(self) -> None:
        """Ends what still runs, unheard. May be called again."""
        self._generation.close()
        if self._on_close is not None:
            self._on_close()
        self._requests._remove(self._generation, self._ids)
        self._ids = ()
