"""Links between several API processes, which the supervisor makes."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from msgspec.structs import replace

from server.settings.process_configs import ApiProcessConfig, WorkerLink


@contextmanager
def linked_configs(config: ApiProcessConfig, folder: Path) -> Iterator[list[ApiProcessConfig]]:
    """Yield the configurations of the coordinator and of its workers, linked by addresses in `folder` and socket pairs.

    The sockets are open until the end, for the processes to inherit.
    """
    with ExitStack() as stack:
        links, workers = [], []
        for number in range(1, config.settings.api_server_count):
            address = f"ipc://{folder}/api-{number}.sock"
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            of_coordinator, of_worker = (stack.enter_context(end).fileno() for end in ends)
            links.append(WorkerLink(address, of_coordinator))
            workers.append(replace(config, coordinator=WorkerLink(address, of_worker)))
        yield [replace(config, workers=tuple(links)), *workers]
