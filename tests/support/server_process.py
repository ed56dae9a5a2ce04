"""`lightwell serve` as a user starts it: real processes on a free port, with a real model."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import is_running, processes_of
from tests.support.serving import wait_until

MODEL = "smollm2-135m"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

# Limits for hangs only, with a wide margin: other jobs on the machine can make the model many times slower.
READY_SECONDS = 180.0
REQUEST_SECONDS = 300.0

# Without spinning OpenMP threads, which would take the cores from the clients.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


class ServerProcess:
    """The supervisor, its child processes, and an HTTP client for them."""

    def __init__(self, model: Path | None, folder: Path, *flags: str, **environment: str) -> None:
        """Start the server, with its log and temporary files in `folder`, on a free port unless a flag says which.

        It leads its own process group, like a command started in a terminal. Without a model, flags name the models.
        """
        self.port = next((int(flag[7:]) for flag in flags if flag.startswith("--port=")), None) or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.family: list[psutil.Process] = []  # set when it is ready; the supervisor first
        self.http = httpx.Client(
            base_url=self.url, timeout=REQUEST_SECONDS, trust_env=False, limits=httpx.Limits(max_connections=None)
        )
        self._log = folder / "log"
        self._temporary = folder / "tmp"
        self._temporary.mkdir()
        command = [sys.executable, "-m", "server.cli.main", "serve", f"--port={self.port}"]
        named = [] if model is None else [str(model), f"--served-model-name={MODEL}"]
        with self.open_log() as log:
            self.process = subprocess.Popen(
                [*command, *named, *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | ENVIRONMENT | {"TMPDIR": str(self._temporary)} | environment,
                process_group=0,
            )

    def open_log(self) -> IO[bytes]:
        """Open what the processes write to."""
        return self._log.open("wb")

    @property
    def log(self) -> str:
        """Everything that its processes have written to standard output and standard error."""
        return self._log.read_text(encoding="utf-8")

    def end_of_log(self, num_lines: int = 20) -> str:
        """Return the last lines of the log without access lines, for assertion messages."""
        return "\n".join([line for line in self.log.splitlines() if "server.access" not in line][-num_lines:])

    @property
    def engine(self) -> psutil.Process:
        (engine,) = self.children("engine.process")
        return engine

    @property
    def api(self) -> psutil.Process:
        (api,) = self.children("server.main")
        return api

    def children(self, module: str) -> list[psutil.Process]:
        """Return the supervisor's child processes that run a module."""
        return processes_of(module, psutil.Process(self.process.pid), recursive=False)

    # Requests.

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.http.get(path, headers=headers)

    def status(self, path: str) -> int:
        """Return the status code, or 0 without a response."""
        with suppress(httpx.TransportError):
            return self.get(path).status_code
        return 0

    def complete(self, prompt: object = "Once upon a time", **fields: Any) -> httpx.Response:
        return self.ask(COMPLETIONS, {"prompt": prompt} | fields)

    def ask(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.http.post(path, json={"model": MODEL} | body, headers=headers)

    def answer(self, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        response = self.ask(path, body, **headers)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def metrics(self) -> dict[str, Metric]:
        """Return the metric families by name. Names of counters have no `_total`."""
        page = self.get("/metrics")
        assert page.status_code == 200, page.text
        return {family.name: family for family in text_string_to_metric_families(page.text)}

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples that have `labels`."""
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
        """True if no request runs or waits and no block is in use."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(self.metric(f"lightwell_{name}") for name in names)

    # Start and end.

    def wait_until_ready(self) -> None:
        def has_decided() -> bool:
            return self.status("/readyz") == 200 or self.process.poll() is not None

        wait_until(has_decided, READY_SECONDS)
        assert self.process.poll() is None, self.end_of_log()
        supervisor = psutil.Process(self.process.pid)
        self.family = [supervisor, *supervisor.children(recursive=True)]

    def signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def wait(self, seconds: float) -> int:
        """Return the exit status. Fail if the server still runs after `seconds`."""
        return self.process.wait(seconds)

    def assert_nothing_is_left(self) -> None:
        """Assert that no process and no temporary file is left."""
        assert self.family
        assert [each.cmdline() for each in self.family if is_running(each.pid)] == []
        assert list(self._temporary.iterdir()) == []

    def close(self) -> None:
        """Kill all processes. The children end with the supervisor."""
        self.http.close()
        self.process.kill()
        self.process.wait()
        for each in self.family:
            with suppress(psutil.NoSuchProcess):
                each.kill()


@contextmanager
def starting_server(model: Path | None, *flags: str, **environment: str) -> Iterator[ServerProcess]:
    """Start a server without waiting for it. Its folder has a short path, since socket paths are limited."""
    folder = Path(tempfile.mkdtemp(prefix="lw-"))
    server = ServerProcess(model, folder, *flags, **environment)
    try:
        yield server
    finally:
        server.close()
        shutil.rmtree(folder)


@contextmanager
def running_server(model: Path | None, *flags: str, **environment: str) -> Iterator[ServerProcess]:
    """Start a server and wait until it is ready."""
    with starting_server(model, *flags, **environment) as server:
        server.wait_until_ready()
        yield server


@contextmanager
def shared_server(model: Path | None, *flags: str, **environment: str) -> Iterator[ServerProcess]:
    """Run a server for several tests. At its end it must exit with 0 and leave nothing behind."""
    with running_server(model, *flags, **environment) as server:
        yield server
        server.signal(signal.SIGTERM)
        assert server.wait(60) == 0, server.end_of_log()
        server.assert_nothing_is_left()


def free_port() -> int:
    """Return a TCP port that is free at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
