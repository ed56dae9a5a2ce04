"""Prints the functions of `server/` and `engine/` that a short chat and a completion enter: `make way`."""

import argparse
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from server.model_paths import resolve_model
from tests.support.server_process import CHAT, COMPLETIONS, ServerProcess, running_server
from tests.support.serving import wait_until

RECORDER = Path(__file__).parent / "recorder"
IDLE_SECONDS = 1.0  # recorded at a time
BUSY_TIMERS = {"server/engine_client/admission.py:Admission.watch_timeouts"}  # which do more while requests run
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}]},
    COMPLETIONS: {"prompt": "Hello"},
}
FIELDS = {"stream": True, "max_tokens": 8, "temperature": 0}


@dataclass(frozen=True)
class Way:
    """What one process did for a request."""

    process: str
    calls: list[str]  # functions as `path:qualified name`, in the order of the calls
    timers: list[str]  # the same, of groups of calls that an idle server makes as well

    @property
    def functions(self) -> dict[str, int]:
        """The number of calls by function, in the order of the first calls."""
        return Counter(self.calls)

    @property
    def num_functions(self) -> int:
        return len(set(self.calls))

    @property
    def num_files(self) -> int:
        return len({name.partition(":")[0] for name in self.calls})

    def __str__(self) -> str:
        return (
            f"{self.num_functions} functions in {self.num_files} files, {len(self.calls)} calls; "
            f"timers: {len(set(self.timers))} functions, {len(self.timers)} calls"
        )


@contextmanager
def recorded(folder: Path, pid: int) -> Iterator[list[list[str]]]:
    """Record a process in the context. The list holds the groups of calls at its end."""
    groups: list[list[str]] = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / str(pid)))
        connection.sendall(b".")
        connection.recv(1)
        yield groups
        connection.sendall(b".")
        groups += json.loads(b"".join(iter(lambda: connection.recv(1 << 16), b"")))


def record(server: ServerProcess, folder: Path, work: Callable[[], None]) -> dict[str, list[list[str]]]:
    """Return the groups of calls that each process of a server makes during some work."""
    with ExitStack() as stack:
        processes = {"API process": server.api.pid, "engine": server.engine.pid}
        groups = {name: stack.enter_context(recorded(folder, pid)) for name, pid in processes.items()}
        work()
    return groups


def ask(server: ServerProcess, path: str) -> None:
    """Send a request, and wait until the server has logged its end."""
    response = server.ask(path, BODIES[path] | FIELDS)
    assert response.text.endswith("data: [DONE]\n\n"), response.text
    wait_until(lambda: response.headers["x-request-id"] in server.log)


def ways(model: Path) -> dict[str, list[Way]]:
    """Start a server, and return the ways of the second chat and of the second completion, by their path."""
    found: dict[str, list[Way]] = {}
    with TemporaryDirectory(prefix="lw-") as folder:
        environment = {"PYTHONPATH": os.pathsep.join([str(RECORDER), *sys.path]), "WAY_FOLDER": folder}
        with running_server(model, "--max-model-len=1024", "--kv-cache-memory=64MiB", **environment) as server:
            for path in BODIES:
                ask(server, path)
            known = timers(server, Path(folder))
            for path in BODIES:
                groups = record(server, Path(folder), partial(ask, server, path))
                found[path] = [make_way(process, its, known[process]) for process, its in groups.items()]
    return found


def timers(server: ServerProcess, folder: Path) -> dict[str, set[str]]:
    """Return the functions that the processes of an idle server call: wait until no new ones come."""
    known: dict[str, set[str]] = {}
    while True:
        idle = record(server, folder, lambda: time.sleep(IDLE_SECONDS))
        seen = {process: {name for group in groups for name in group} for process, groups in idle.items()}
        if all(names and names <= known.get(process, set()) for process, names in seen.items()):
            return known
        known = {process: names | known.get(process, set()) for process, names in seen.items()}


def make_way(process: str, groups: Sequence[Sequence[str]], idle: set[str]) -> Way:
    """Tell the calls of a request from those of timers: groups all of whose functions an idle server calls, too."""
    own: list[str] = []
    timers: list[str] = []
    for group in groups:
        (timers if group[0] in BUSY_TIMERS or idle.issuperset(group) else own).extend(group)
    return Way(process, own, timers)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make way", description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="name or path (default: %(default)s)")
    for path, processes in ways(resolve_model(parser.parse_args().model).path).items():
        for way in processes:
            print(f"\n{path}, {way.process}: {way}")
            for title, functions in (("", way.functions), ("by timers:", Counter(way.timers))):
                print(*[title] * bool(functions), *(f"{num:5} {name}" for name, num in functions.items()), sep="\n")


if __name__ == "__main__":
    main()
