"""Tests of loading and unloading LoRA adapters in a fake engine."""

import asyncio

import msgspec
import pytest

from engine.shared.messages import AdapterDone, FinishReason, LoraAdapter, Submit, ToEngine, UnloadAdapter
from server.engine_client.adapters import LoadedAdapters
from server.http.errors import AdapterNotFoundError, EngineDeadError, EngineUnavailableError, InvalidValueError
from tests.support.engine_clients import read, ready, request, tokens, until
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, MortalEngine, make_adapter

pytestmark = pytest.mark.anyio


def adapter_request(adapter: LoraAdapter, request_id: str = "r") -> Submit:
    return msgspec.structs.replace(request(request_id), lora_name=adapter.name, lora_fingerprint=adapter.fingerprint)


async def test_adapters(address: str) -> None:
    """Every client knows the adapters loaded at start-up, and those loaded later by any client."""
    chess = make_adapter("chess")
    with FakeEngine(FakeEngineConfig(address=address, adapters=[chess], max_loras=2)) as engine:
        async with ready(address) as client, ready(address) as other:
            assert client.adapters == {"chess": chess}
            await client.load_adapter("go", "/go", False)
            assert {name: adapter.path for name, adapter in client.adapters.items()} == {
                "chess": chess.path,
                "go": "/go",
            }
            await until(lambda: other.adapters == client.adapters)
            await read(client.submit(adapter_request(client.adapters["go"])))
            assert engine.submits[-1].lora_name == "go"
            with pytest.raises(InvalidValueError, match="adapter go is loaded already"):
                await client.load_adapter("go", "/other", False)
            await client.load_adapter("go", "/other", True)
            assert client.adapters["go"].path == "/other"
            await other.unload_adapter("go")
            await until(lambda: list(client.adapters) == ["chess"])
            with pytest.raises(AdapterNotFoundError, match="'go' cannot be found"):
                await client.unload_adapter("go")


async def test_requests_submitted_after_an_unload(address: str) -> None:
    """An unloaded adapter is not found, but earlier requests run as long as the engine has its weights."""
    chess, go = make_adapter("chess"), make_adapter("go")
    config = FakeEngineConfig(address=address, adapters=[chess, go], max_loras=3)
    with FakeEngine(config) as engine:
        async with ready(address) as client:
            streams = [client.submit(adapter_request(chess, "a"))]
            unloading = asyncio.create_task(client.unload_adapter("chess"))
            loading = asyncio.create_task(client.load_adapter("sql", "/sql", False))
            await asyncio.sleep(0)
            assert list(client.adapters) == ["go"]
            streams.append(client.submit(adapter_request(chess, "b")))
            await unloading
            await loading
            assert list(client.adapters) == ["go", "sql"]
            await client.load_adapter("chess", "/another", False)
            streams.append(client.submit(adapter_request(chess, "c")))
            assert [tokens(await read(stream))[:-1] for stream in streams] == [config.reply] * 3
            assert {submit.lora_fingerprint for submit in engine.submits} == {chess.fingerprint}
            config.forgets_adapters = True
            await client.unload_adapter("go")
            (event,) = await read(client.submit(adapter_request(go, "d")))
            assert event.finish_reason is FinishReason.ERROR
            assert client.num_in_flight == 0


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


async def test_death_of_the_engine_while_adapters_change(address: str) -> None:
    config = FakeEngineConfig(address=address, adapters=[make_adapter("chess")], ignores_adapters=True)
    with MortalEngine(config) as engine:
        async with ready(address) as client:
            changes = [
                asyncio.create_task(client.load_adapter("go", "/go", False)),
                asyncio.create_task(client.unload_adapter("chess")),
            ]
            await asyncio.sleep(0)
            engine.kill()
            results = await asyncio.gather(*changes, return_exceptions=True)
            assert [type(result) for result in results] == [EngineDeadError] * 2
            with pytest.raises(EngineUnavailableError):
                await client.load_adapter("go", "/go", False)


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


async def test_close_ends_the_wait_for_adapters(address: str) -> None:
    with FakeEngine(FakeEngineConfig(address=address, ignores_adapters=True)):
        async with ready(address) as client:
            loading = asyncio.create_task(client.load_adapter("go", "/go", False))
            await asyncio.sleep(0)
    with pytest.raises(EngineUnavailableError):
        await loading
