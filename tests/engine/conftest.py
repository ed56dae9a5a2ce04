"""A tiny model that several modules share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from engine.loading import LoadedModel


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    """On kernels of plain torch, whose cache is easy to spoil, with one thread."""
    # This file may be read before `pytest_configure` has said how Triton runs.
    from tests.support.kernel_choice import choose_kernels
    from tests.support.tiny_engine import load_tiny_model

    with choose_kernels("torch", num_threads=1):
        yield load_tiny_model(tmp_path_factory.mktemp("model"))
