"""Fixtures for tests of parts: several API processes, and a receiver of spans."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from server.parts.otel.tracer import Tracer
from tests.server.conftest import StartServer
from tests.support.fake_engine import FakeEngine
from tests.support.otlp_receiver import OTLPReceiver
from tests.support.serving import RunningServer, make_test_context, running_server
from tests.support.workers import Pair, running_worker

os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "20"  # milliseconds from a span to its being sent

StartPair = Callable[..., Pair]


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
