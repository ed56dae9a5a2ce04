"""Whether the engine is loading, ready or dead."""

import asyncio
import logging
import os
import time
from collections.abc import Callable

from engine.shared.messages import HEARTBEAT_SECONDS, EngineInfo
from server.http.errors import EngineUnavailableError

logger = logging.getLogger(__name__)

MISSED_HEARTBEATS = 3  # tolerated on top of the longest step


class EngineLiveness:
    """The state of the engine: loading, ready or dead. A dead engine never becomes ready again.

    The engine is dead when its process ends (noticed by a pidfd), when it has been silent for longer than the longest
    step plus `MISSED_HEARTBEATS` heartbeats, or when `mark_dead` is called.
    """

    def __init__(self, *, step_timeout: float, engine_pid: int | None, on_death: Callable[[], None]) -> None:
        """Start in the loading state. `step_timeout` and `engine_pid` are as in `EngineClient`.

        `on_death` is called once, when the engine dies.
        """
        self.info: EngineInfo | None = None  # None while the engine loads its model
        self.dead_reason: str | None = None
        self.became_ready = asyncio.Event()
        self.died = asyncio.Event()
        self._engine_pid = engine_pid
        self._on_death = on_death
        self._silence_limit = step_timeout + MISSED_HEARTBEATS * HEARTBEAT_SECONDS
        self._last_message = 0.0
        self._pidfd: int | None = None

    def start(self) -> None:
        """Watch the engine's process, if its id is already known."""
        if self._engine_pid is not None:
            self._watch_process(self._engine_pid)

    def close(self) -> None:
        """Stop watching the process."""
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    @property
    def is_ready(self) -> bool:
        """True if the model is loaded and the engine is not dead."""
        return self.info is not None and self.dead_reason is None

    @property
    def is_alive(self) -> bool:
        """True if the engine is loading, or its step loop is responsive."""
        return self.dead_reason is None and (self.info is None or not self._is_silent())

    @property
    def is_healthy(self) -> bool:
        """True if the engine is ready and its step loop is responsive."""
        return self.is_ready and not self._is_silent()

    def ready_info(self) -> EngineInfo:
        """Return the engine's properties. Raises EngineUnavailableError unless the engine is ready."""
        if self.dead_reason is not None:
            raise EngineUnavailableError("The engine has stopped. Please retry later.", close=True)
        if self.info is None:
            raise EngineUnavailableError("The model is still being loaded. Please retry later.")
        return self.info

    def on_message(self, now: float) -> None:
        """Note that a message of any kind arrived."""
        self._last_message = now

    def set_ready(self, info: EngineInfo) -> None:
        self.info = info
        self.became_ready.set()
        if self._pidfd is None:
            self._watch_process(info.pid)

    def mark_dead(self, reason: str) -> None:
        """Declare the engine dead. `reason` is for the log."""
        self.close()
        if self.dead_reason is not None:
            return
        logger.error("the engine died: %s", reason)
        self.dead_reason = reason
        self._on_death()
        self.died.set()

    async def watch_heartbeat(self) -> None:
        """Mark the engine dead once it has been silent for too long.

        Two checks in a row must find it silent: if this process was suspended, the messages that arrived meanwhile are
        read between them.
        """
        num_silent = 0
        while num_silent < 2:
            await asyncio.sleep(HEARTBEAT_SECONDS / 2)
            num_silent = num_silent + 1 if self.is_ready and self._is_silent() else 0
        self.mark_dead(f"no step for more than {self._silence_limit:g} seconds")

    def _is_silent(self) -> bool:
        return time.monotonic() - self._last_message > self._silence_limit

    def _watch_process(self, pid: int) -> None:
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self.mark_dead("its process has ended")
        except OSError as exc:
            logger.warning("cannot watch the engine's process (%s); relying on its heartbeat", exc)
        else:
            asyncio.get_running_loop().add_reader(self._pidfd, self.mark_dead, "its process has ended")
