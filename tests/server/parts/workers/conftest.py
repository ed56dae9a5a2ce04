"""A coordinator and a worker, shared by the tests of a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.workers import Pair, reset_pair, shared_pair

QUEUE_TIMEOUT, REQUEST_TIMEOUT = 500, 5000  # seconds


@pytest.fixture(scope="package")
def default_pair(model_folder: Path) -> Iterator[Pair]:
    timeouts = {"queue_timeout": QUEUE_TIMEOUT, "request_timeout": REQUEST_TIMEOUT}
    with shared_pair(model_folder, engine={"max_loras": 2}, allow_runtime_lora_updating=True, **timeouts) as pair:
        yield pair


@pytest.fixture
def pair(default_pair: Pair) -> Iterator[Pair]:
    """A coordinator in front of a fake engine, and a worker."""
    yield default_pair
    reset_pair(default_pair)
