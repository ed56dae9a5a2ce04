"""What befalls the processes of the server: they are killed or stopped, keys change, and nobody reads the log."""

import asyncio
import fcntl
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx
import psutil

from tests.chaos.clients import NO_REUSE
from tests.chaos.report import Report
from tests.support.server_process import ServerProcess

STEP_TIMEOUT = 15.0  # seconds, of the server; a step may take that long where other work has the processors
SILENCE_SECONDS = STEP_TIMEOUT + 3.0  # after which an engine counts as dead
PROBE_SECONDS = 0.25
DEATHS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL, signal.SIGSEGV)  # of the engine, one in each round

# The modules that the processes run.
ENGINE, API = "engine.process", "server.main"
HELPERS = ("server.parts.hardening.template_processes", "server.parts.hardening.grammar_process")


class KeysFile:
    """A file of --api-keys-file with several tenants, one of which has another key after each change."""

    KEYS = ("alice-key", "bob-key-1", "bob-key-2", "carol-key")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number = 0
        self.change()

    @property
    def guest(self) -> str:
        return f"guest-{self._number}"

    def change(self) -> str:
        """Give the guest another key. Return the old one."""
        old, self._number = self.guest, self._number + 1
        alice, bob, other_bob, carol = map(_digest, self.KEYS)
        text = f"""
alice: {{keys: {alice}, weight: 2}}
bob: {{keys: [{bob}, {other_bob}]}}
carol: {{keys: {carol}, requests-per-minute: 60, max-concurrent-requests: 2}}
guest: {{keys: {_digest(self.guest)}, admin: true}}
"""
        self.path.write_text(text)
        return old


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class PipedServer(ServerProcess):
    """A server whose log goes through a small pipe, from which a thread of the test copies it to the file."""

    def open_log(self) -> IO[bytes]:
        self._flows = threading.Event()
        self._flows.set()
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        self._copier = threading.Thread(target=self._copy, args=(os.fdopen(reader, "rb", buffering=0),), daemon=True)
        self._copier.start()
        return os.fdopen(writer, "wb")

    @contextmanager
    def blocked_log(self) -> Iterator[None]:
        """Read nothing of the log meanwhile, so that the pipe is soon full."""
        self._flows.clear()
        try:
            yield
        finally:
            self._flows.set()

    def wait_for_end_of_log(self, seconds: float) -> None:
        """Wait until no process can write to the log. Fail if one still can after `seconds`."""
        self._copier.join(seconds)
        assert not self._copier.is_alive(), "a process has not ended, or has left the log to another one"

    def _copy(self, reader: IO[bytes]) -> None:
        with reader, self._log.open("wb", buffering=0) as file:
            while data := reader.read(4096):
                file.write(data)
                self._flows.wait()


class Disturbances:
    """Disturbs the server at random times, and watches its probes."""

    def __init__(self, server: PipedServer, report: Report, keys: KeysFile) -> None:
        self._server = server
        self._report = report
        self._keys = keys
        self._engine = asyncio.Lock()  # only one thing at a time happens to it
        self._http = httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False, limits=NO_REUSE)

    async def close(self) -> None:
        await self._http.aclose()

    async def run(self, rng: random.Random, until: float) -> None:
        """Do one of the things after which nothing may fail, again and again until the time `until`."""
        often = (self._stop_engine, self._stop_api, self._change_keys, self._block_log)
        helpers = list(HELPERS)  # a request is tried again after one death of theirs
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, rng.uniform(0.5, 5)))
            if helpers and rng.random() < 0.3:
                name = f"kill {helpers[-1]}"
                _kill(processes(self._server, helpers.pop()))
            else:
                kind = rng.choice(often)
                name = kind.__name__.strip("_").replace("_", " ")
                try:
                    await kind(rng)
                except Exception as error:
                    self._report.add_problem(f"{name}: {error!r}")
            self._report.round.disturbances[name] += 1

    async def end_engine(self, rng: random.Random, number: int, seconds: float) -> None:
        """Kill the engine, or stop it until the server does that, after a random part of `seconds`."""
        signum = DEATHS[number % len(DEATHS)]
        await asyncio.sleep(rng.uniform(0, seconds))
        async with self._engine:
            (engine,) = processes(self._server, ENGINE)
            self._report.deaths.begin()
            died = time.monotonic()
            engine.send_signal(signum)
            is_ready = await self._wait_until_ready()
            self._report.deaths.end()
        seconds = time.monotonic() - died - (SILENCE_SECONDS if signum is signal.SIGSTOP else 0.0)
        self._report.round.deaths.append(f"{signum.name} {seconds:.1f}")
        if not is_ready:
            self._report.add_problem(f"the engine was not ready again after {signum.name}")

    async def _wait_until_ready(self) -> bool:
        expected = {"status": "ok", "restarts": self._report.deaths.num}
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (await self._http.get("/readyz")).json() == expected:
                return True
            await asyncio.sleep(0.05)
        return False

    async def watch(self, until: float) -> None:
        """Ask for /health until the time `until`."""
        while time.monotonic() < until:
            started = time.monotonic()
            answer = await self._http.get("/health")
            self._report.round.probes.append(time.monotonic() - started)
            if answer.status_code != 200 and not self._report.deaths.excuse(started):
                self._report.add_problem(f"/health: {answer.status_code} {answer.text}")
            await asyncio.sleep(PROBE_SECONDS)

    # After these, no request may fail.

    async def _stop_engine(self, rng: random.Random) -> None:
        """Stop the engine for less time than counts as a death."""
        async with self._engine:
            (engine,) = processes(self._server, ENGINE)
            await _stop(engine, rng.choice((0.1, 0.5, 0.5, 3)))

    async def _stop_api(self, rng: random.Random) -> None:
        (api,) = processes(self._server, API)
        await _stop(api, rng.uniform(0.1, 1))

    async def _change_keys(self, rng: random.Random) -> None:
        old = self._keys.change()
        self._server.signal(signal.SIGHUP)
        deadline = time.monotonic() + 60
        while await self._status(self._keys.guest) != 200:
            assert time.monotonic() < deadline, "the new key is not valid"
            await asyncio.sleep(0.05)
        assert await self._status(old) == 401, "the old key is still valid"

    async def _status(self, key: str) -> int:
        return (await self._http.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code

    async def _block_log(self, rng: random.Random) -> None:
        with self._server.blocked_log():
            await asyncio.sleep(rng.uniform(2, 6))


def processes(server: ServerProcess, module: str) -> list[psutil.Process]:
    """Return the processes of a server that run a module."""
    found = []
    for each in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [each] if module in each.cmdline() else []
    return found


async def _stop(process: psutil.Process, seconds: float) -> None:
    with suppress(psutil.NoSuchProcess):
        process.suspend()
        await asyncio.sleep(seconds)
        process.resume()


def _kill(found: list[psutil.Process]) -> None:
    for each in found:
        with suppress(psutil.NoSuchProcess):
            each.kill()
