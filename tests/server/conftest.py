"""Fixtures for tests of the server: a tiny model, a fake engine, a running server."""

import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import constants

from server.text.tokenizer import Tokenizer
from tests.server.kinds import *  # noqa: F403
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, fresh_server, is_served, make_test_context, own_address, running_server
from tests.support.stub_hub import StubHub
from tests.support.tiny_tokenizer_model import write_tiny_model
from tests.support.turned_loop import TurnedLoop

# Requests to servers under test have this many seconds, which are for hangs only.
for name in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, name, 60.0)

StartServer = Callable[..., RunningServer]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leave out the cases of paths that nobody serves: in a copy of the core, those of parts."""
    paths = [item.callspec.params.get("path") if hasattr(item, "callspec") else None for item in items]
    items[:] = [item for item, path in zip(items, paths, strict=True) if is_served(str(path))]


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
