"""A child process for tests of the supervisor that ends as its arguments say.

`stub_child.py FOLDER NAME BEHAVIOUR [ARGUMENT]` writes its configuration to FOLDER/NAME.json and its process id to
FOLDER/NAME.pid, then follows BEHAVIOUR. For an API process that is a worker, NAME becomes api-1, api-2 ..., and for
further engines engine-1, engine-2 ...
"""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from server.processes.supervisor_channel import (
    DUMP_SIGNAL,
    HEARTBEAT_SECONDS,
    Channel,
    EngineGone,
    EngineStarted,
    Heartbeat,
)


def main(folder: Path, name: str, behaviour: str, argument: str = "0") -> None:
    config = sys.stdin.buffer.read()
    name = name_of(msgspec.json.decode(config)) or name
    (folder / f"{name}.json").write_bytes(config)
    if behaviour == "exit":
        leave(folder, name, float(argument), 7)
    if behaviour == "run-once" and (folder / f"{name}.pid").exists():
        leave(folder, name, 0, 7)
    if behaviour == "exit-well":
        leave(folder, name, float(argument), 0)
    if behaviour == "fork":
        helper = subprocess.Popen(["sleep", "60"])
        announce(folder, "helper", helper.pid)
    if behaviour == "reload":  # SIGHUP is blocked until here
        signal.signal(signal.SIGHUP, lambda *_: announce(folder, f"{name}-reload", os.getpid()))
        time.sleep(float(argument))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])
    if behaviour == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif behaviour == "drain":
        signal.signal(signal.SIGTERM, lambda *_: leave(folder, f"{name}-end", float(argument), 0))
    elif behaviour == "fail":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(argument)))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(DUMP_SIGNAL, lambda *_: announce(folder, "dumped", os.getpid()))
    announce(folder, name, os.getpid())
    if behaviour in TALKS:
        TALKS[behaviour](folder, msgspec.json.decode(config), int(argument))
    if behaviour == "outlive-engine":  # like the API process when its engine dies
        wait_for_end_of(msgspec.json.decode(config)["models"][0]["engines"][0]["pid"])
        leave(folder, f"{name}-end", float(argument), 1)
    while True:
        time.sleep(60)


def name_of(config: dict[str, Any]) -> str | None:
    """Return the name of an API process that is a worker, or of an engine that is not the first; else None."""
    if (link := config.get("coordinator")) is not None:
        return Path(link["address"]).stem
    name = Path(config.get("address", "")).stem
    return None if name in ("", "engine-0") else name


def announce(folder: Path, name: str, pid: int) -> None:
    """Write the process id atomically."""
    (folder / f"{name}.tmp").write_text(str(pid))
    (folder / f"{name}.tmp").rename(folder / f"{name}.pid")


def report(folder: Path, config: dict[str, Any], num_ready: int) -> None:
    """Report the first `num_ready` engines as ready, send heartbeats, and exit when there is no other engine.

    Write the process ids of the engines to FOLDER/engines, and what the supervisor says last to FOLDER/gone.
    """
    channel = Channel.from_fd(config["supervisor_fd"])
    engines = [config["models"][0]["engines"][0]["pid"]]
    while True:
        (folder / "engines.tmp").write_text(" ".join(map(str, engines)))
        (folder / "engines.tmp").rename(folder / "engines")
        channel.send(Heartbeat((engines[-1],) if len(engines) <= num_ready else ()))
        select.select([channel], [], [], HEARTBEAT_SECONDS)
        for message in channel.receive():
            if isinstance(message, EngineStarted):
                engines.append(message.pid)
            elif isinstance(message, EngineGone):
                (folder / "gone").write_text(message.reason)
                leave(folder, "api-end", 0, 1)


def fall_silent(folder: Path, config: dict[str, Any], argument: int) -> None:
    """Send one heartbeat."""
    Channel.from_fd(config["supervisor_fd"]).send(Heartbeat((config["models"][0]["engines"][0]["pid"],)))


def beat(folder: Path, config: dict[str, Any], argument: int) -> None:
    """Send heartbeats."""
    channel = Channel.from_fd(config["supervisor_fd"])
    while True:
        channel.send(Heartbeat())
        time.sleep(HEARTBEAT_SECONDS)


TALKS = {"beat": beat, "report": report, "fall-silent": fall_silent}


def leave(folder: Path, name: str, seconds: float, code: int) -> None:
    announce(folder, name, os.getpid())
    time.sleep(seconds)
    os._exit(code)


def wait_for_end_of(pid: int) -> None:
    select.select([os.pidfd_open(pid)], [], [])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
