"""An API process with a fake engine, for tests that let the system fail it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import httpx
import msgspec
import psutil
import pytest

from server.settings.process_configs import EngineProcess
from server.settings.table import Settings
from tests.faults.failing_calls import FailingCalls
from tests.support.fake_engine import FakeEngine, FakeEngineConfig
from tests.support.server_process import free_port
from tests.support.serving import api_config, own_address, wait_until
from tests.support.tiny_tokenizer_model import write_tiny_model

SECONDS = 60.0  # bounds hangs only


@dataclass
class Api:
    """A running API process, and its fake engine in a thread of the test."""

    process: psutil.Process
    engine: FakeEngine
    url: str

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=SECONDS)

    def post(self, path: str, **body: object) -> httpx.Response:
        return httpx.post(self.url + path, json={"model": "tiny"} | body, timeout=SECONDS)

    def is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self.get("/readyz").status_code == 200
        return False

    def num_ended(self) -> int:
        """Return how many choices have ended, for whatever reason."""
        lines = self.get("/metrics").text.splitlines()
        return round(sum(float(line.split()[-1]) for line in lines if "request_success_total{" in line))

    def num_admitted(self) -> int:
        """Return how many choices the engine was given."""
        return sum(submit.n for submit in self.engine.submits)

    def check_well(self, num_files: int, num_threads: int) -> None:
        """Assert that the process serves, and that nothing is left of earlier requests."""
        assert self.process.is_running()
        assert self.process.status() != psutil.STATUS_ZOMBIE
        answer = self.post("/v1/completions", prompt="x")
        assert answer.status_code == 200, answer.text
        wait_until(lambda: self.engine.num_choices == 0, SECONDS)
        wait_until(lambda: self.num_ended() == self.num_admitted(), SECONDS)
        wait_until(lambda: self.process.num_fds() <= num_files, SECONDS)
        assert self.process.num_threads() <= num_threads


StartApi = Callable[..., Api]


@pytest.fixture(scope="session")
def failing(tmp_path_factory: pytest.TempPathFactory) -> FailingCalls:
    """For one process at a time."""
    return FailingCalls(tmp_path_factory.mktemp("failing-calls"))


@pytest.fixture(scope="module")
def start_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartApi]:
    """A function that starts an API process with more environment variables: `start_api(NAME="value")`.

    `redirection` is the shell's, for example "2>&-".
    """
    model = tmp_path_factory.mktemp("model")
    write_tiny_model(model)
    with ExitStack() as stack:

        def start(*, stderr: int = subprocess.DEVNULL, redirection: str = "", **environment: str) -> Api:
            address = stack.enter_context(own_address())
            engine = stack.enter_context(FakeEngine(FakeEngineConfig(address=address)))
            port = free_port()
            config = api_config(Settings(port=port), EngineProcess(address, os.getpid()), model, ("tiny",))
            process = subprocess.Popen(
                ["sh", "-c", f'exec "$0" -m server.main {redirection}', sys.executable],
                stdin=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | environment,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write(msgspec.json.encode(config))
            api = Api(psutil.Process(process.pid), engine, f"http://127.0.0.1:{port}")
            wait_until(api.is_ready, timeout=60)
            return api

        yield start
