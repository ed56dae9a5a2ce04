"""Clocks of the supervisor that tests turn, and a supervisor in its own process with such a clock."""

import json
import os
import socket
import sys
from collections.abc import Sequence
from selectors import EVENT_READ, BaseSelector, SelectorKey

from server.processes.child_process import Clock


class TurnedClock(Clock):
    """A clock that stands still until `time` is set."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time


class RemoteClock(TurnedClock):
    """A clock that another process turns, by sending seconds. This process ends with the other one.

    The answer is for how many seconds this process goes on waiting then (None: until something happens), and how often
    it has begun to wait.
    """

    def __init__(self, remote: socket.socket) -> None:
        super().__init__()
        self._remote = remote
        self._num_waits = 0

    def select(self, selector: BaseSelector, seconds: float | None) -> Sequence[SelectorKey]:
        if self._remote not in selector.get_map():
            selector.register(self._remote, EVENT_READ)
        self._num_waits += 1
        due = None if seconds is None else self.time + seconds
        while True:
            is_due = due is not None and due <= self.time
            ready = super().select(selector, 0.0 if is_due else None)
            events = [key for key in ready if key.fileobj is not self._remote]
            if events or is_due:
                return events
            self._turn(due)

    def _turn(self, due: float | None) -> None:
        turned = self._remote.recv(100)
        if not turned:
            os._exit(1)
        self.time = round(self.time + float(turned), 6)
        left = None if due is None else round(due - self.time, 3)
        self._remote.send(json.dumps([left, self._num_waits]).encode())


def main(settings: str, engine: str, api: str, remote_fd: str) -> int:
    """Run a supervisor. Fail if it has imported a heavy module."""
    from server import supervisor
    from server.settings.table import Settings

    commands = supervisor.Commands(engine=json.loads(engine), api=json.loads(api))
    clock = RemoteClock(socket.socket(fileno=int(remote_fd)))
    status = supervisor.supervise(Settings(**json.loads(settings)), commands, clock)
    heavy = [name for name in ("torch", "numpy", "fastapi", "pydantic", "httpx", "zmq", "rich") if name in sys.modules]
    assert not heavy, heavy
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
