"""Fixtures for tests of the server: a tiny model, a fake engine, a running server."""

import importlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import constants

from server.parts.otel.tracer import Tracer
from server.text.tokenizer import Tokenizer
from tests.server.kinds import *  # noqa: F403
from tests.support.fake_engine import FakeEngine
from tests.support.otlp_receiver import OTLPReceiver
from tests.support.serving import RunningServer, fresh_server, make_test_context, own_address, running_server
from tests.support.stub_hub import StubHub
from tests.support.tiny_tokenizer_model import write_tiny_model
from tests.support.turned_loop import TurnedLoop
from tests.support.workers import Pair, running_worker

# Requests to servers under test have this many seconds, which are for hangs only.
for name in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, name, 60.0)
os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "20"  # milliseconds from a span to its being sent

StartServer = Callable[..., RunningServer]
StartPair = Callable[..., Pair]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """An event loop whose time a test turns, with `turn` of tests/support/turned_loop.py."""
    return "asyncio", {"loop_factory": TurnedLoop}


@pytest.fixture
def rng() -> random.Random:
    """A source of random numbers whose seed a failed test shows."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json and the tokenizer of `tiny_model`."""
    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.from_model(model_folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A stub of Hugging Face's hub, which is the hub for this process and those that it starts."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "repositories").mkdir()
    with StubHub(tmp_path / "repositories") as stub:
        for name, value in stub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        importlib.reload(constants)  # which reads the environment only when it is imported
        yield stub
    monkeypatch.undo()
    importlib.reload(constants)


@pytest.fixture(scope="session")
def default_server(model_folder: Path) -> Iterator[RunningServer]:
    with fresh_server(model_folder) as server:
        yield server


@pytest.fixture
def fake_engine(default_server: RunningServer) -> Iterator[FakeEngine]:
    """A fake engine with default behaviour. Change `fake_engine.config` before a request to change its replies."""
    yield default_server.engine
    default_server.reset()


@pytest.fixture
def server(default_server: RunningServer, fake_engine: FakeEngine) -> RunningServer:
    """A server with default settings in front of `fake_engine`, shared by all tests of this process."""
    return default_server


@pytest.fixture
def address() -> Iterator[str]:
    """A ZeroMQ address for one test."""
    with own_address() as address:
        yield address


@pytest.fixture
def start_server(fake_engine: FakeEngine, model_folder: Path) -> Iterator[StartServer]:
    """A function that starts a server in front of `fake_engine`: `start_server(strict=True).url`."""
    with ExitStack() as stack:

        def start(*, server: dict[str, Any] | None = None, **settings: Any) -> RunningServer:
            context = make_test_context(fake_engine.config.address, model_folder, **settings)
            return stack.enter_context(running_server(context, fake_engine, **(server or {})))

        yield start


@pytest.fixture
def start_pair(fake_engine: FakeEngine, model_folder: Path) -> Iterator[StartPair]:
    """A function that starts a coordinator in front of `fake_engine`, and a worker, and returns both."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running_worker(fake_engine, model_folder, **settings))


@pytest.fixture(scope="session")
def shared_receiver() -> Iterator[OTLPReceiver]:
    with OTLPReceiver() as receiver:
        yield receiver


@pytest.fixture
def receiver(shared_receiver: OTLPReceiver) -> Iterator[OTLPReceiver]:
    """A receiver of spans."""
    yield shared_receiver
    shared_receiver.reset()


@pytest.fixture
def start_traced(receiver: OTLPReceiver, start_server: StartServer) -> StartServer:
    """A function that starts a server which sends its spans to `receiver`."""
    return partial(start_server, otlp_endpoint=receiver.url)


@pytest.fixture(scope="session")
def traced_server(
    default_server: RunningServer, shared_receiver: OTLPReceiver, model_folder: Path
) -> Iterator[RunningServer]:
    engine = default_server.engine
    context = make_test_context(engine.config.address, model_folder, otlp_endpoint=shared_receiver.url)
    with running_server(context, engine) as server:
        yield server


@pytest.fixture
def traced(traced_server: RunningServer, fake_engine: FakeEngine, receiver: OTLPReceiver) -> Iterator[RunningServer]:
    """A server which sends its spans to `receiver`, in front of `fake_engine`."""
    yield traced_server
    traced_server.reset()
    tracer = next(each for each in traced_server.context.services if isinstance(each, Tracer))
    tracer._provider.force_flush()


@pytest.fixture
def server_url(server: RunningServer) -> str:
    """The URL of a server with default settings."""
    return server.url
