"""Whether the engine is loading, ready, being restarted or dead."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from engine.shared.messages import HEARTBEAT_SECONDS, EngineInfo
from server.http.errors import EngineUnavailableError
from server.processes.supervisor_channel import MAX_WAIT_FACTOR, Silence

logger = logging.getLogger(__name__)

MISSED_HEARTBEATS = 3  # tolerated on top of the longest step
CHECK_SECONDS = 0.5


class EngineLiveness:
    """The state of the engine: loading, ready, being restarted, or dead for good.

    An engine is lost when its process ends (noticed by a pidfd), when it has been silent for longer than the longest
    step plus `MISSED_HEARTBEATS` heartbeats, or when `lose` is called. If it had been ready and can be restarted, the
    state is then "restarting" until another engine is ready; otherwise it is dead.
    """

    def __init__(
        self,
        *,
        step_timeout: float,
        engine_pid: int | None,
        can_restart: bool,
        on_loss: Callable[[], None],
        on_death: Callable[[], None],
        name: str = "the engine",
    ) -> None:
        """Start in the loading state.

        Args:
            step_timeout: Seconds that the longest step may take. An engine that is silent for longer is dead.
            engine_pid: Process id of the engine. None: its death is noticed only after it has become ready.
            can_restart: Whether an engine that dies after it has been ready is replaced, see `engine_started`.
            on_loss: Called each time a restart begins.
            on_death: Called once, when the engine dies for good.
            name: Names it in the log.
        """
        self.info: EngineInfo | None = None  # of the latest ready engine; None until the first one is ready
        self.was_heard = False  # a message of any kind has arrived since the last check; whoever gets it says so
        self.is_ready = False  # the model is loaded, and the engine is neither being restarted nor dead
        self.dead_reason: str | None = None
        self.restarting_since: float | None = None  # Unix time of the loss
        self.num_restarts = 0  # including one that is in progress
        self._name = name
        self._engine_pid = engine_pid
        self._can_restart = can_restart
        self._on_loss = on_loss
        self._on_death = on_death
        self._silence_limit = step_timeout + MISSED_HEARTBEATS * HEARTBEAT_SECONDS
        self._silence: Silence  # of the engine, from `start` on
        self._lost_at = 0.0
        self._pidfd: int | None = None

    def start(self) -> None:
        """Watch the engine's process, if its id is already known."""
        self._silence = Silence(CHECK_SECONDS, asyncio.get_running_loop().time)
        if self._engine_pid is not None:
            self._watch_process(self._engine_pid)

    def close(self) -> None:
        """Stop watching the process."""
        self._engine_pid = None  # it may become that of another process
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    @property
    def is_restarting(self) -> bool:
        """True from the loss of a ready engine until another one is ready."""
        return self.restarting_since is not None

    @property
    def is_alive(self) -> bool:
        """True if the engine is loading or being restarted, or its step loop is responsive."""
        return self.dead_reason is None and (not self.is_ready or not self._is_silent())

    @property
    def is_healthy(self) -> bool:
        """True if the engine is ready and its step loop is responsive."""
        return self.is_ready and not self._is_silent()

    def ready_info(self) -> EngineInfo:
        """Return the engine's properties, which a restart does not change.

        Raises EngineUnavailableError before the engine was ready for the first time, and once it is dead.
        """
        return usable_info(self.info, self.dead_reason)

    def check_ready(self) -> None:
        """Raise EngineUnavailableError unless the engine is ready."""
        self.ready_info()
        if self.is_restarting:
            raise EngineUnavailableError("The engine is being restarted. Please retry later.")

    def set_ready(self, info: EngineInfo) -> None:
        """The engine can compute. If it was restarted with other properties, it is dead: requests rely on them."""
        if self.info is not None and not same_properties(info, self.info):
            self.mark_dead("it was restarted with other properties; has its model been changed?")
            return
        if self.is_restarting:
            seconds = time.monotonic() - self._lost_at
            logger.info("%s is ready again after %.1f s (restart %d)", self._name, seconds, self.num_restarts)
        self.info = info
        self.restarting_since = None
        self.is_ready = self.dead_reason is None
        self._silence.reset()
        if self._pidfd is None:
            self._watch_process(info.pid)

    def engine_started(self, pid: int) -> None:
        """Watch the process of another engine, which has been started in place of a lost one."""
        if not self.is_restarting:  # this process has not noticed yet
            self._engine_pid = None  # it may have become that of another process, which must not be killed
            self.lose("its process has ended")
        if self.is_restarting:
            self._watch_process(pid)

    def lose(self, reason: str) -> None:
        """End this engine: it is restarted if that is possible, otherwise dead. `reason` is for the log."""
        self._kill()
        self.close()
        if self.dead_reason is not None or self.is_restarting:  # the new engine may end while it loads
            return
        if self.info is None or not self._can_restart:
            self.mark_dead(reason)
            return
        logger.error("%s died: %s; it is being restarted", self._name, reason)
        self.num_restarts += 1
        self.is_ready = False
        self.restarting_since = time.time()
        self._lost_at = time.monotonic()
        self._on_loss()

    def mark_dead(self, reason: str) -> None:
        """Declare the engine dead for good. `reason` is for the log."""
        self.close()
        if self.dead_reason is not None:
            return
        logger.error("%s died: %s", self._name, reason)
        self.dead_reason = reason
        self.is_ready = False
        self.restarting_since = None
        self._on_death()

    async def watch_heartbeat(self) -> None:
        """End the engine whenever it has been silent for too long.

        Only time counts in which it could have sent a message that this process would have read, see `Silence`. A check
        that fails is logged, and the next one is made: nothing else notices an engine that hangs.
        """
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                self._check_silence()
            except Exception:
                logger.exception("the engine's heartbeat cannot be checked")

    def _check_silence(self) -> None:
        if not self.is_ready:
            return
        if self.was_heard:
            self._silence.reset()
            self.was_heard = False
        self._silence.count(self._engine_pid if self._silence.total >= HEARTBEAT_SECONDS else None)
        if self._is_silent():
            self.lose(f"no step for more than {self._silence_limit:g} seconds")

    def _is_silent(self) -> bool:
        silence, limit = self._silence, self._silence_limit
        is_long = silence.seconds > limit or silence.total > MAX_WAIT_FACTOR * limit
        return is_long and not self.was_heard

    def _kill(self) -> None:
        """Kill the engine's process, if it still runs but must be replaced. Its parent then notices its end."""
        if self._engine_pid is None or not self._can_restart:
            return
        with suppress(OSError):
            if self._pidfd is None:
                os.kill(self._engine_pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _watch_process(self, pid: int) -> None:
        self.close()
        self._engine_pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self.lose("its process has ended")
        except OSError as exc:
            logger.warning("cannot watch the engine's process (%s); relying on its heartbeat", exc)
        else:
            asyncio.get_running_loop().add_reader(self._pidfd, self.lose, "its process has ended")


def usable_info(info: EngineInfo | None, dead_reason: str | None) -> EngineInfo:
    """Return `info`. Raises EngineUnavailableError if it is None, or if the engine is dead."""
    if dead_reason is not None:
        raise EngineUnavailableError("The engine has stopped. Please retry later.", close=True)
    if info is None:
        raise EngineUnavailableError("The model is still being loaded. Please retry later.")
    return info


def same_properties(info: EngineInfo, other: EngineInfo) -> bool:
    """Return whether two engines are the same for their requests: the size of the KV cache and the GPU may differ."""
    return _properties(info) == _properties(other)


def _properties(info: EngineInfo) -> EngineInfo:
    device = info.device.partition(":")[0]
    sizes = dict.fromkeys(("num_blocks", "kv_cache_bytes", "num_states", "activation_bytes"), 0)
    return msgspec.structs.replace(info, pid=0, device=device, **sizes)
