"""A client of several engines with the same model: which of them gets a request. They compute while one of them can."""

from collections.abc import Sequence

import msgspec

from engine.shared.block_hashes import prefix_names, prefix_salt
from engine.shared.messages import EngineInfo, FinishReason, LoraAdapter, Submit, TokenEvent
from server.engine_client.client import EngineClient
from server.engine_client.connected_engine import ConnectedEngine
from server.engine_client.liveness import EngineLiveness, same_properties
from server.engine_client.reservation import Reservation
from server.engine_client.streams import EventInbox, OpenStreams, RequestStream
from server.metrics import ChoiceStats


class CountedStreams(OpenStreams):
    """The open streams of an engine, and the tokens that their requests are expected to take."""

    load = 0.0  # more or less

    def adopt(self, stream: RequestStream, message: Submit) -> None:
        super().adopt(stream, message)
        for stats in stream.choices:
            self.set_load(stats, stats.num_expected_tokens)

    def take_waiting(self) -> list[tuple[RequestStream, Submit]]:
        """Remove and return the streams that no engine has begun with, and their requests: another engine adopts them.

        A request that the lost engine had begun with may have killed it, so it waits for the restart.
        """
        waiting = [
            (stream, stream.waiting)
            for stream in self._streams.values()
            if stream.waiting is not None and not stream.reservation.num_lost_starts
        ]
        for stream, message in waiting:
            del self._streams[message.request_id]
            for stats in stream.choices:
                self.set_load(stats, 0.0)
        return waiting

    def set_load(self, stats: ChoiceStats, num_tokens: float) -> None:
        """Set the tokens that a choice is expected to take."""
        self.load += num_tokens - stats.load
        stats.load = num_tokens

    def on_choice_start(self, stream: RequestStream, stats: ChoiceStats, event: TokenEvent) -> None:
        expected = min(stats.max_tokens, self._admission.estimate.mean_output)
        self.set_load(stats, min(stats.load, expected))  # without the prompt
        super().on_choice_start(stream, stats, event)

    def on_choice_end(self, stream: RequestStream, stats: ChoiceStats, reason: FinishReason, now: float) -> None:
        self.set_load(stats, 0.0)
        super().on_choice_end(stream, stats, reason, now)


class GroupClient(EngineClient):
    """A client that chooses an engine for each request. What waits for one that is lost goes to another."""

    streams_type = CountedStreams

    def update(self) -> None:
        super().update()
        self._move_waiting()

    def accepts(self, info: EngineInfo) -> bool:
        # Free memory, by which a context may be shortened, differs.
        own = msgspec.structs.replace(info, max_model_len=0)
        infos = [engine.liveness.info for engine in self.alive if engine.liveness.info is not None]
        return all(same_properties(own, msgspec.structs.replace(other, max_model_len=0)) for other in infos)

    @property
    def adapters(self) -> dict[str, LoraAdapter]:
        """The LoRA adapters that all engines have which have been ready, by name.

        While one is replaced, engines may have different ones of that name: it is then that of the first engine.
        """
        first, *others = [engine.adapters.by_name for engine in self._known or self.engines]
        return {name: adapter for name, adapter in first.items() if all(name in each for each in others)}

    @property
    def _known(self) -> list[ConnectedEngine]:
        """The engines that are left, and have been ready."""
        return [engine for engine in self.alive if engine.liveness.info is not None]

    @property
    def states(self) -> dict[str, object]:
        return {"engines": [{"number": engine.number, "status": status(engine.liveness)} for engine in self.engines]}

    def open(self, message: Submit, reservation: Reservation, inbox: EventInbox | None) -> RequestStream:
        engine, num_cached_tokens = self.choose(message)
        stream = engine.streams.open(message, reservation, inbox)
        _count_cached(engine, stream, num_cached_tokens)
        return stream

    def choose(self, message: Submit) -> tuple[ConnectedEngine, int]:
        """Return the engine for a request, and how many tokens of its prompt that has cached.

        It is the one that would be through with its other requests and this one first: a cached prefix saves as many
        tokens as it is long, and each request in the engine costs those that it is still expected to take. Ties go to
        the engine that has cached least. Only if none is ready, the request waits for one that is being restarted.

        Raises EngineUnavailableError like `ready_info`.
        """
        info = self.ready_info()
        salt = prefix_salt(message.lora_fingerprint, message.cache_salt)
        has_cached = any(engine.cached for engine in self.engines)
        prefixes = prefix_names(message.prompt_token_ids, info.block_size, salt) if has_cached else []
        candidates = [engine for engine in self._known if engine.liveness.is_ready] or self._known
        if message.lora_fingerprint:
            having = [engine for engine in candidates if _has_adapter(engine, message.lora_fingerprint)]
            candidates = having or candidates
        cached = {engine: _num_cached_tokens(engine, prefixes, info.block_size) for engine in candidates}
        best = min(
            cached, key=lambda engine: (streams_of(engine).load - cached[engine], len(engine.cached), engine.number)
        )
        return best, cached[best]

    def _move_waiting(self) -> None:
        for engine in self.engines:
            is_dead = engine.liveness.dead_reason is not None
            if (self.is_ready and not engine.liveness.is_ready) or (is_dead and self.restarting_since):
                for stream, message in streams_of(engine).take_waiting():
                    other, num_cached_tokens = self.choose(message)
                    other.streams.adopt(stream, message)
                    _count_cached(other, stream, num_cached_tokens)


def status(liveness: EngineLiveness) -> str:
    """Return the state of an engine in a word."""
    if liveness.dead_reason is not None:
        return "dead"
    if liveness.info is None:
        return "loading"
    if liveness.is_restarting:
        return "restarting"
    return "ok" if liveness.is_healthy else "silent"


def streams_of(engine: ConnectedEngine) -> CountedStreams:
    assert isinstance(engine.streams, CountedStreams)
    return engine.streams


def _count_cached(engine: ConnectedEngine, stream: RequestStream, num_tokens: int) -> None:
    """Note that an engine is expected to find so many tokens of a request's prompt in its cache."""
    first = stream.choices[0]
    streams_of(engine).set_load(first, first.load - num_tokens)


def _has_adapter(engine: ConnectedEngine, fingerprint: str) -> bool:
    return any(adapter.fingerprint == fingerprint for adapter in engine.adapters.by_name.values())


def _num_cached_tokens(engine: ConnectedEngine, prefixes: Sequence[bytes], block_size: int) -> int:
    """Return how long the longest cached prefix is, by the names of those that end with a block, in order.

    With a sliding window, the blocks before the last one need not be cached any more.
    """
    num_blocks = next((number for number in range(len(prefixes), 0, -1) if prefixes[number - 1] in engine.cached), 0)
    return num_blocks * block_size
