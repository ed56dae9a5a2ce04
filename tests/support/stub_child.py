"""A child process for tests of the supervisor that behaves as its arguments say.

`stub_child.py FOLDER NAME BEHAVIOUR [ARGUMENT]` writes its configuration to FOLDER/NAME.json and its process id to
FOLDER/NAME.pid, then follows BEHAVIOUR. For an API process that is a worker, NAME becomes api-1, api-2 ..., and for
further engines engine-1, engine-2 ... When it is asked to end, it writes FOLDER/NAME-end.pid. A test gets the channel
of an API process through an abstract socket whose name is its process id.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from server.processes.supervisor_channel import DUMP_SIGNAL


def main(folder: Path, name: str, behaviour: str, argument: str = "0") -> None:
    data = sys.stdin.buffer.read()
    config = msgspec.json.decode(data)
    name = name_of(config) or name
    (folder / f"{name}.json").write_bytes(data)
    if behaviour == "exit" or (behaviour == "run-once" and (folder / f"{name}.pid").exists()):
        os._exit(int(argument))
    if behaviour == "fork":
        write(folder / "helper.pid", subprocess.Popen(["sleep", "60"]).pid)

    def end(*_: object) -> None:
        write(folder / f"{name}-end.pid", os.getpid())
        while behaviour == "drain" and not (folder / "drained").exists():
            time.sleep(0.01)
        if behaviour != "ignore":
            os._exit(int(argument) if behaviour == "fail" else 0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(DUMP_SIGNAL, lambda *_: write(folder / "dumped.pid", os.getpid()))
    signal.signal(signal.SIGHUP, lambda *_: write(folder / f"{name}-reload.pid", os.getpid()))  # blocked until here
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])
    tests = socket.socket(socket.AF_UNIX)
    tests.bind(f"\0{os.getpid()}")
    tests.listen()
    write(folder / f"{name}.pid", os.getpid())
    if behaviour == "outlive-engine":  # like the API process when its engine dies
        select.select([os.pidfd_open(config["models"][0]["engines"][0]["pid"])], [], [])
        os._exit(1)
    while True:
        with tests.accept()[0] as test:  # an API process leaves its channel to a test
            socket.send_fds(test, [b"."], [config["supervisor_fd"]])


def name_of(config: dict[str, Any]) -> str | None:
    """Return the name of an API process that is a worker, or of an engine that is not the first; else None."""
    if (link := config.get("coordinator")) is not None:
        return Path(link["address"]).stem
    name = Path(config.get("address", "")).stem
    return None if name in ("", "engine-0") else name


def write(path: Path, text: object) -> None:
    """Write a file that is there either whole or not at all, whoever else writes it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(str(text))
    unfinished.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
