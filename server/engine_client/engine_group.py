"""The engines of a client as one: the state in which they are together, and which of them gets a request."""

import asyncio

import msgspec

from engine.shared.block_hashes import prefix_names, prefix_salt
from engine.shared.messages import EngineInfo, LoraAdapter, Submit
from server.engine_client.connected_engine import ConnectedEngine
from server.engine_client.liveness import EngineLiveness, same_properties


class EngineGroup:
    """Engines with the same model. They can compute as long as one of them can."""

    def __init__(self) -> None:
        self.engines: list[ConnectedEngine] = []
        self.alive: list[ConnectedEngine] = []  # those that load, are ready or are being restarted
        self.info: EngineInfo | None = None  # with the shortest context; None while all load the model the first time
        self.max_num_seqs = 0  # choices that run at a time; 0 before an engine was ready
        self.dead_reason: str | None = None  # why the last engine died for good, for the log; None while one is left
        self.became_ready = asyncio.Event()  # the first one
        self.died = asyncio.Event()  # the last one
        self.changed = asyncio.Event()  # the state of one, since its reader has cleared it

    def add(self, engine: ConnectedEngine) -> None:
        """Add an engine that has not been started yet."""
        self.engines.append(engine)
        self.alive.append(engine)

    def update(self) -> None:
        """Note that the state of an engine has changed. What waits for one that is lost goes to another."""
        self.alive = [engine for engine in self.engines if engine.liveness.dead_reason is None]
        infos = [engine.liveness.info for engine in self.alive or self.engines if engine.liveness.info is not None]
        self.info = min(infos, key=lambda info: info.max_model_len, default=None)
        self.max_num_seqs = sum(info.max_num_seqs for info in infos) if self.alive else 0
        self.dead_reason = None if self.alive else self.engines[-1].liveness.dead_reason
        self.changed.set()
        if self.is_ready:
            self.became_ready.set()
        if self.dead_reason is not None:
            self.died.set()
        self._move_waiting()

    def accepts(self, info: EngineInfo) -> bool:
        """Return whether the answers of an engine that loads are those of the other ones."""
        # Free memory, by which a context may be shortened, differs.
        own = msgspec.structs.replace(info, max_model_len=0)
        infos = [engine.liveness.info for engine in self.alive if engine.liveness.info is not None]
        return all(same_properties(own, msgspec.structs.replace(other, max_model_len=0)) for other in infos)

    @property
    def _livenesses(self) -> list[EngineLiveness]:
        return [engine.liveness for engine in self.alive]

    def ready_info(self) -> EngineInfo:
        """Return `info`. Raises EngineUnavailableError before an engine was ready, and once all are dead."""
        if self.info is None or not self.alive:
            return (self.alive or self.engines)[0].liveness.ready_info()  # which raises
        return self.info

    @property
    def ready_pids(self) -> tuple[int, ...]:
        """Process ids of the engines that are ready."""
        return tuple(liveness.ready_info().pid for liveness in self._livenesses if liveness.is_ready)

    @property
    def is_ready(self) -> bool:
        """True if an engine is ready."""
        return any(liveness.is_ready for liveness in self._livenesses)

    @property
    def is_restarting(self) -> bool:
        """True while no engine is ready, but one that was is being restarted."""
        return self.restarting_since is not None

    @property
    def restarting_since(self) -> float | None:
        """Unix time of the first loss, while no engine is ready and one is being restarted."""
        if self.is_ready:
            return None
        losses = [liveness.restarting_since for liveness in self._livenesses]
        return min((loss for loss in losses if loss is not None), default=None)

    @property
    def num_restarts(self) -> int:
        """Number of restarts of the engines, including those that are in progress."""
        return sum(engine.liveness.num_restarts for engine in self.engines)

    @property
    def is_alive(self) -> bool:
        """True if an engine is loading or being restarted, or its step loop is responsive."""
        return any(liveness.is_alive for liveness in self._livenesses)

    @property
    def is_healthy(self) -> bool:
        """True if an engine is ready and its step loop is responsive."""
        return any(liveness.is_healthy for liveness in self._livenesses)

    @property
    def adapters(self) -> dict[str, LoraAdapter]:
        """The LoRA adapters that all engines have which have been ready, by name.

        While one is replaced, engines may have different ones of that name: it is then that of the first engine.
        """
        engines = [engine for engine in self.alive if engine.liveness.info is not None] or self.engines
        first, *others = [engine.adapters.by_name for engine in engines]
        return {name: adapter for name, adapter in first.items() if all(name in each for each in others)}

    def choose(self, message: Submit) -> tuple[ConnectedEngine, int]:
        """Return the engine for a request, and how many tokens of its prompt that has cached.

        It is the one that would be through with its other requests and this one first: a cached prefix saves as many
        tokens as it is long, and each request in the engine costs those that it is still expected to take. Ties go to
        the engine that has cached least. Only if none is ready, the request waits for one that is being restarted.

        Raises EngineUnavailableError like `ready_info`.
        """
        info = self.ready_info()
        if len(self.engines) == 1:
            return self.engines[0], 0
        salt = prefix_salt(message.lora_fingerprint, message.cache_salt)
        has_cached = any(engine.cached for engine in self.engines)
        prefixes = prefix_names(message.prompt_token_ids, info.block_size, salt) if has_cached else []
        alive = [engine for engine in self.alive if engine.liveness.info is not None]
        candidates = [engine for engine in alive if engine.liveness.is_ready] or alive
        if message.lora_fingerprint:
            candidates = [engine for engine in candidates if engine.has_adapter(message.lora_fingerprint)] or candidates
        cached = {engine: engine.num_cached_tokens(prefixes, info.block_size) for engine in candidates}
        best = min(cached, key=lambda engine: (engine.streams.load - cached[engine], len(engine.cached), engine.number))
        return best, cached[best]

    def _move_waiting(self) -> None:
        for engine in self.engines:
            is_dead = engine.liveness.dead_reason is not None
            if (self.is_ready and not engine.liveness.is_ready) or (is_dead and self.is_restarting):
                for stream, message in engine.streams.take_waiting():
                    other, num_cached_tokens = self.choose(message)
                    other.streams.adopt(stream, message, num_cached_tokens)
