"""A client of a fake engine."""

from collections.abc import AsyncIterator

import pytest

from server.engine_client.client import EngineClient
from tests.support.engine_clients import ready
from tests.support.fake_engine import FakeEngine


@pytest.fixture
async def client(fake_engine: FakeEngine) -> AsyncIterator[EngineClient]:
    """A client of `fake_engine`, which is ready."""
    async with ready(fake_engine.config.address) as client:
        yield client
