"""Tests of loading and unloading LoRA adapters in a fake engine."""

import asyncio

import pytest

from engine.shared.messages import AdapterDone, ToEngine, UnloadAdapter
from server.engine_client.adapters import LoadedAdapters
from server.http.errors import EngineUnavailableError
from tests.support.engine_clients import ready, until
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, make_adapter

pytestmark = pytest.mark.anyio


async def test_adapters_reported_before_the_engine_has_read_an_unload() -> None:
    sent: list[ToEngine] = []
    loaded = LoadedAdapters(sent.append)
    chess, go = make_adapter("chess"), make_adapter("go")
    loaded.update([chess])
    unloading = loaded.unload("chess")
    await asyncio.sleep(0)
    loaded.update([chess, go])
    assert list(loaded.by_name) == ["go"]
    (message,) = sent
    assert isinstance(message, UnloadAdapter)
    loaded.finish(AdapterDone(request_id=message.request_id))
    await unloading
    loaded.update([go, chess])
    assert list(loaded.by_name) == ["go", "chess"]  # loaded again by another process


async def test_waiting_for_an_adapter_may_be_cancelled(address: str) -> None:
    with FakeEngine(FakeEngineConfig(address=address, max_loras=2)) as engine:
        async with ready(address) as client:
            loading = asyncio.create_task(client.load_adapter("go", "/go", False))
            await asyncio.sleep(0)
            loading.cancel()
            await until(lambda: "go" in client.adapters)
            await client.unload_adapter("go")
            assert engine.adapters == []
            assert client.is_healthy


async def test_a_result_after_the_wait_has_failed_is_ignored(address: str) -> None:
    with FakeEngine(FakeEngineConfig(address=address, max_loras=2)):
        async with ready(address) as client:
            loading = asyncio.create_task(client.load_adapter("go", "/go", False))
            await asyncio.sleep(0)
            client.fail_streams(EngineUnavailableError("over"))
            with pytest.raises(EngineUnavailableError, match="over"):
                await loading
            await client.load_adapter("chess", "/chess", False)
            assert list(client.adapters) == ["go", "chess"]
            assert client.is_healthy
