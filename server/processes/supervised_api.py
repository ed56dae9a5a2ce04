"""One of the API processes that the supervisor runs: its process, its channel, and when it hangs."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from msgspec.structs import replace

from server.processes.child_process import Child
from server.processes.clock import Clock
from server.processes.run_queue import MAX_WAIT_FACTOR, Silence
from server.processes.supervisor_channel import HEARTBEAT_SECONDS, Channel, Message
from server.settings.process_configs import ApiProcessConfig, WorkerLink

MISSED_HEARTBEATS = 3  # tolerated on top of --step-timeout


class SupervisedApi:
    """An API process, which sends heartbeats. `hangs` is to be called at `hangs_at`."""

    def __init__(self, process: Child, channel: Channel, step_timeout: float, clock: Clock) -> None:
        self.process = process
        self.channel = channel
        self.silence_limit = step_timeout + MISSED_HEARTBEATS * HEARTBEAT_SECONDS  # seconds without a heartbeat
        self.hangs_at: float | None = None  # unless a heartbeat comes; None before the first one
        self._clock = clock
        self._overdue = Silence(2 * HEARTBEAT_SECONDS, clock.now)  # from then on

    def receive(self) -> Sequence[Message]:
        """Return the messages that wait. Each says that the process does not hang."""
        messages = self.channel.receive()
        if messages:
            self.hangs_at = self._clock.now() + self.silence_limit
            self._overdue.reset()
        return messages

    def hangs(self) -> bool:
        """Return whether the process hangs: it is overdue, and has since had time in which it could run.

        If all processes were suspended, its heartbeat comes soon after this process wakes up.
        """
        now = self._clock.now()
        if self.hangs_at is None or now < self.hangs_at:
            return False
        self.hangs_at = now + 2 * HEARTBEAT_SECONDS
        self._overdue.count(self.process.pid)
        return (
            self._overdue.seconds > MISSED_HEARTBEATS * HEARTBEAT_SECONDS
            or self._overdue.total > MAX_WAIT_FACTOR * self.silence_limit
        )


@contextmanager
def linked_configs(config: ApiProcessConfig, addresses: Sequence[str]) -> Iterator[list[ApiProcessConfig]]:
    """Yield the configurations of the coordinator and of a worker for each address, linked by pairs of sockets.

    The sockets are open until the end, for the processes to inherit.
    """
    with ExitStack() as stack:
        links, workers = [], []
        for address in addresses:
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            of_coordinator, of_worker = (stack.enter_context(end).fileno() for end in ends)
            links.append(WorkerLink(address, of_coordinator))
            workers.append(replace(config, coordinator=WorkerLink(address, of_worker)))
        yield [replace(config, workers=tuple(links)), *workers]
