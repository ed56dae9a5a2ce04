"""A tiny model that several modules share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from engine.loading import LoadedModel
    from tests.engine.test_api_connections import Connected


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    """On kernels of plain torch, whose cache is easy to spoil, with one thread."""
    # This file may be read before `pytest_configure` has said how Triton runs.
    from tests.support.kernel_choice import choose_kernels
    from tests.support.tiny_engine import load_tiny_model

    with choose_kernels("torch", num_threads=1):
        yield load_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def connected(tiny_model: LoadedModel) -> Iterator[Connected]:
    from tests.engine.test_api_connections import Connected
    from tests.support.tiny_engine import new_engine

    connected = Connected(new_engine(tiny_model))
    yield connected
    connected.close()
