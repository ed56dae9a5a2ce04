"""An API process with a fake engine, for tests that let the system fail it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest

from tests.faults.failing_calls import FailingCalls
from tests.support.api_process import SECONDS, Api, api_process
from tests.support.fake_engine import FakeEngine, FakeEngineConfig
from tests.support.serving import own_address, wait_until
from tests.support.tiny_tokenizer_model import write_tiny_model


class FaultyApi:
    """A running API process, and its fake engine in a thread of the test."""

    def __init__(self, api: Api) -> None:
        assert isinstance(api.engine, FakeEngine)
        self.engine = api.engine
        self.process = psutil.Process(api.process.pid)
        self.url, self.port, self.get, self._api = api.url, api.port, api.get, api

    def post(self, path: str, **body: object) -> httpx.Response:
        return self._api.post(path, **{"model": "tiny"} | body)

    def is_ready(self) -> bool:
        return self._api.status("/readyz") == 200

    def end(self) -> int:
        return self._api.end()

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


StartApi = Callable[..., FaultyApi]


@pytest.fixture(scope="session")
def failing(tmp_path_factory: pytest.TempPathFactory) -> FailingCalls:
    """For one process at a time."""
    return FailingCalls(tmp_path_factory.mktemp("failing-calls"))


@pytest.fixture(scope="module")
def start_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartApi]:
    """A function that starts an API process: `start_api(redirection="2>&-", environment={"NAME": "value"})`."""
    model = tmp_path_factory.mktemp("model")
    write_tiny_model(model)
    with ExitStack() as stack:

        def start(**options: Any) -> FaultyApi:
            address, folder = stack.enter_context(own_address()), tmp_path_factory.mktemp("api")
            api = stack.enter_context(api_process(FakeEngineConfig(address=address), model, folder, **options))
            api.wait_until_ready()
            return FaultyApi(api)

        yield start
