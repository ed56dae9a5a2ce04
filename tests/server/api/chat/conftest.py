"""Servers of models with tools and reasoning, shared by the tests of a module."""

from collections.abc import Iterator

import pytest

from tests.support.clients import (
    shared_server,
)
from tests.support.serving import RunningServer
from tests.support.tool_model import write_tool_model


@pytest.fixture(scope="module", params=["plain", "special"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Run each test with tags as control tokens and as plain text."""
    folder = write_tool_model(tmp_path_factory.mktemp("tools"), special_tags=request.param == "special")
    with shared_server(folder, vocab_size=263) as server:
        yield server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = write_tool_model(tmp_path_factory.mktemp("plain"), special_tags=False)
    with shared_server(folder) as server:
        yield server
