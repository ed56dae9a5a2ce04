"""`lightwell serve` as a user starts it: a tree of real processes on a free port, with the real model."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import is_running
from tests.support.serving import wait_until

MODEL = "smollm2-135m"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

# These bound hangs only: whatever else runs on the machine may make the model many times slower.
READY_SECONDS = 180.0
REQUEST_SECONDS = 300.0

# Threads that spin while they wait for each other cost most of the time where clients share the cores.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


class ServerProcess:
    """The supervisor, its children, and a client to ask them with."""

    def __init__(self, model: Path, folder: Path, *flags: str, **environment: str) -> None:
        """The process leads a group of its own, as a command in a terminal does. It finds `folder` for its files."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.family: list[psutil.Process] = []  # known once it is ready; the supervisor first
        self.http = httpx.Client(
            base_url=self.url, timeout=REQUEST_SECONDS, trust_env=False, limits=httpx.Limits(max_connections=None)
        )
        self._log = folder / "log"
        self._temporary = folder / "tmp"
        self._temporary.mkdir()
        command = [sys.executable, "-m", "server.cli.main", "serve", str(model), f"--port={self.port}"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--served-model-name={MODEL}", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | ENVIRONMENT | {"TMPDIR": str(self._temporary)} | environment,
                process_group=0,
            )

    @property
    def log(self) -> str:
        """What all its processes have written, to standard output or error."""
        return self._log.read_text(encoding="utf-8")

    def last_words(self, num_lines: int = 20) -> str:
        """The end of the log without the requests, for the message of an assertion."""
        return "\n".join([line for line in self.log.splitlines() if "server.access" not in line][-num_lines:])

    @property
    def engine(self) -> psutil.Process:
        return self._child("engine.process")

    @property
    def api(self) -> psutil.Process:
        return self._child("server.main")

    def _child(self, module: str) -> psutil.Process:
        (child,) = (each for each in self.family[1:] if module in each.cmdline())
        return child

    # Asking.

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.http.get(path, headers=headers)

    def status(self, path: str) -> int:
        """0 where there is no answer."""
        with suppress(httpx.TransportError):
            return self.get(path).status_code
        return 0

    def complete(self, prompt: object = "Once upon a time", **fields: Any) -> httpx.Response:
        return self.ask(COMPLETIONS, {"prompt": prompt} | fields)

    def ask(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.http.post(path, json={"model": MODEL} | body)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self.ask(path, body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def metrics(self) -> dict[str, Metric]:
        """The families of a scrape by name; counters without `_total`."""
        page = self.get("/metrics")
        assert page.status_code == 200, page.text
        return {family.name: family for family in text_string_to_metric_families(page.text)}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that carry `labels`."""
        samples = [sample for family in self.metrics().values() for sample in family.samples if sample.name == name]
        assert samples, name
        return float(sum(sample.value for sample in samples if labels.items() <= sample.labels.items()))

    @property
    def num_running(self) -> int:
        return int(self.metric("lightwell_num_requests_running"))

    @property
    def num_waiting(self) -> int:
        return int(self.metric("lightwell_num_requests_waiting"))

    @property
    def is_idle(self) -> bool:
        """Nothing runs, nothing waits, and no block is held."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(self.metric(f"lightwell_{name}") for name in names)

    # Beginning and ending.

    def wait_until_ready(self) -> None:
        def has_decided() -> bool:
            return self.status("/readyz") == 200 or self.process.poll() is not None

        wait_until(has_decided, READY_SECONDS)
        assert self.process.poll() is None, self.last_words()
        supervisor = psutil.Process(self.process.pid)
        self.family = [supervisor, *supervisor.children(recursive=True)]

    def signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def wait(self, seconds: float) -> int:
        """Its exit status; fails if it runs on."""
        return self.process.wait(seconds)

    def assert_nothing_is_left(self) -> None:
        """No process, no file."""
        assert self.family
        assert [each.cmdline() for each in self.family if is_running(each.pid)] == []
        assert list(self._temporary.iterdir()) == []

    def close(self) -> None:
        """End whatever still runs. The children die with the supervisor."""
        self.http.close()
        self.process.kill()
        self.process.wait()
        for each in self.family:
            with suppress(psutil.NoSuchProcess):
                each.kill()


@contextmanager
def starting_server(model: Path, *flags: str, **environment: str) -> Iterator[ServerProcess]:
    """A server that has just been started. Paths of sockets must be short, hence the folder."""
    folder = Path(tempfile.mkdtemp(prefix="lw-"))
    server = ServerProcess(model, folder, *flags, **environment)
    try:
        yield server
    finally:
        server.close()
        shutil.rmtree(folder)


@contextmanager
def running_server(model: Path, *flags: str, **environment: str) -> Iterator[ServerProcess]:
    """A server that is ready."""
    with starting_server(model, *flags, **environment) as server:
        server.wait_until_ready()
        yield server


@contextmanager
def shared_server(model: Path, *flags: str, **environment: str) -> Iterator[ServerProcess]:
    """A server for several tests, which must leave nothing behind at their end, nor it at its own."""
    with running_server(model, *flags, **environment) as server:
        yield server
        server.signal(signal.SIGTERM)
        assert server.wait(10) == 0, server.last_words()
        server.assert_nothing_is_left()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def seconds_until(condition: Any, limit: float) -> float:
    """How long it takes until `condition()` is true; fails after `limit`."""
    started = time.monotonic()
    wait_until(condition, limit)
    return time.monotonic() - started
