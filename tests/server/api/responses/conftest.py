"""Servers shared by the tests of a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import shared_server
from tests.support.serving import RunningServer
from tests.support.tool_model import write_tool_model


@pytest.fixture(scope="module")
def tiny(model_folder: Path) -> Iterator[RunningServer]:
    with shared_server(model_folder) as server:
        yield server


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = write_tool_model(tmp_path_factory.mktemp("model"), special_tags=True)
    with shared_server(folder, vocab_size=263) as server:
        yield server
