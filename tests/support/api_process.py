"""`python -m server.main` as a process, with a fake engine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from server.part_table import load_module
from server.settings.process_configs import ApiProcessConfig, EngineProcess
from server.settings.table import Settings
from server.sockets import SocketFolder
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, fake_engine_process
from tests.support.server_process import free_port
from tests.support.serving import api_config, skip_without_parts, wait_until

COMMAND = [sys.executable, "-m", "server.main"]
SECONDS = 60.0  # for hangs only


@dataclass
class Api:
    """A running API process and its fake engine. If there are workers, it is their coordinator."""

    process: subprocess.Popen[bytes]
    workers: Sequence[subprocess.Popen[bytes]]
    engine: Any  # a FakeEngine, or its process
    port: int
    log_file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def announced(self) -> dict[str, Any]:
        """What the log says when the server is ready, in JSON."""
        wait_until(lambda: "base_url" in self.log)
        (record,) = [record for record in map(json.loads, self.log.splitlines()) if "base_url" in record]
        return dict(record)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=SECONDS)

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.status("/readyz") == 200)

    def status(self, path: str) -> int:
        """Return the status code, or 0 without a response."""
        with suppress(httpx.TransportError):
            return self.get(path).status_code
        return 0

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=SECONDS)

    def complete(self, **body: Any) -> httpx.Response:
        return self.post("/v1/completions", **{"model": "tiny", "prompt": "x"} | body)

    def count(self, state: str) -> int:
        """Return how many requests run, or wait."""
        lines = self.get("/metrics").text.splitlines()
        (value,) = [line.split()[-1] for line in lines if line.startswith(f"lightwell_num_requests_{state}{{")]
        return round(float(value))

    def end(self) -> int:
        """Terminate all processes at once, and return the greatest exit status."""
        for process in (self.process, *self.workers):
            process.terminate()
        return self.wait()

    def wait(self) -> int:
        return max(process.wait(SECONDS) for process in (self.process, *self.workers))


def start_process(
    config: ApiProcessConfig, log: Path, *, redirection: str = "", **environment: str
) -> subprocess.Popen[bytes]:
    """Start a process that logs to a file. `redirection` is the shell's, for example "2>&-"."""
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND],
            stdin=subprocess.PIPE,
            stderr=stderr,
            env=os.environ | environment,
            pass_fds=config.inherited_fds,
        )
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(msgspec.json.encode(config))
    return process


@contextmanager
def api_process(
    engine: FakeEngineConfig,
    model: Path,
    folder: Path,
    *,
    dies: bool = False,
    environment: dict[str, str] | None = None,
    redirection: str = "",
    supervisor_fd: int | None = None,
    num_workers: int = 0,
    **settings: Any,
) -> Iterator[Api]:
    """Start an API process and a fake engine.

    `dies`: the engine is a process that can be killed. Otherwise it is a thread of this one.
    """
    skip_without_parts(settings)
    with ExitStack() as stack:
        fake: FakeEngine | subprocess.Popen[bytes]
        fake = stack.enter_context(fake_engine_process(engine)) if dies else stack.enter_context(FakeEngine(engine))
        port = free_port()
        config = api_config(
            Settings(port=port, api_server_count=1 + num_workers, **settings),
            EngineProcess(engine.address, fake.pid if isinstance(fake, subprocess.Popen) else os.getpid()),
            model,
            ("tiny",),
            supervisor_fd=supervisor_fd,
        )
        processes = []
        sockets = stack.enter_context(closing(SocketFolder())).path
        linked = load_module("workers", "links").linked_configs if num_workers else lambda *_: nullcontext([config])
        with linked(config, sockets) as configs:
            for number, each in enumerate(configs):
                log = folder / f"api-{number}.log"
                processes.append(start_process(each, log, redirection=redirection, **(environment or {})))
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield Api(processes[0], processes[1:], fake, port, folder / "api-0.log")
