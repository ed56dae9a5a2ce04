"""LoRA adapters that are loaded and unloaded, and loaded again into an engine that replaces another one."""

import asyncio

import msgspec
import pytest

from engine.shared.messages import AdapterDone, FinishReason, LoadAdapter, LoraAdapter, Submit, ToEngine, UnloadAdapter
from server.http.errors import EngineDeadError, EngineUnavailableError
from server.parts.lora.part import AdaptersBusyError, LoadedAdapters, load_adapter, unload_adapter
from tests.support.engine_clients import SLOW, engines, read, read_error, ready, request, tokens, until
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, make_adapter

pytestmark = pytest.mark.anyio


def with_adapter(adapter: LoraAdapter, request_id: str) -> Submit:
    message = request(request_id, max_tokens=3)
    return msgspec.structs.replace(message, lora_name=adapter.name, lora_fingerprint=adapter.fingerprint)


async def test_adapters_are_loaded_again(address: str) -> None:
    """Also if the engine that loads them dies meanwhile."""
    chess = make_adapter("chess")
    async with engines(address, adapters=[chess], max_loras=2, **SLOW) as both:
        client = both.client
        await unload_adapter(client, "chess")
        await load_adapter(client, "go", "/go", replaces=False)
        go = client.adapters["go"]
        running, _ = await both.run_and_wait()
        waiting = client.submit(with_adapter(go, "a"))
        await both.lose()
        assert client.adapters == {"go": go}
        with pytest.raises(EngineUnavailableError, match="being restarted"):
            await load_adapter(client, "sql", "/sql", replaces=False)
        late = client.submit(with_adapter(go, "b"))
        await both.replace(max_loras=2, ignores_adapters=True)
        await until(lambda: client.engines[0].adapters._changes)  # type: ignore[attr-defined]
        client.drain()  # must not end the restart
        assert client.restarting_since
        client.drain_requested.clear()
        await both.replace(adapters=[chess], max_loras=2)
        for stream in (waiting, late):
            events = await read(stream)
            assert events[-1].finish_reason is FinishReason.LENGTH
        assert client.adapters == {"go": go}
        await load_adapter(client, "sql", "/sql", replaces=False)
        assert list(client.adapters) == ["go", "sql"]
        running.close()


@pytest.mark.parametrize("is_temporary", [True, False])
async def test_an_adapter_that_cannot_be_loaded_again(
    address: str, is_temporary: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with engines(address, max_loras=2, **SLOW) as both:
        client = both.client
        await load_adapter(client, "go", "/go", replaces=False)
        running, waiting = await both.run_and_wait()
        lost = client.submit(with_adapter(client.adapters["go"], "lost"))
        await both.replace(  # without a turn of the event loop since the first one died
            max_loras=2, adapter_error=AdapterDone(request_id="", error="no such file", is_temporary=is_temporary)
        )
        await read_error(running, EngineDeadError)
        await read_error(lost, EngineUnavailableError, match="'go' could not be loaded again")
        assert bytes(tokens(await read(waiting))) == b"Hello"
        assert client.adapters == {}
        assert "the LoRA adapter go is lost: no such file" in caplog.text


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


async def test_the_wait_for_an_adapter_may_end_before_its_result_comes(address: str) -> None:
    with FakeEngine(FakeEngineConfig(address=address, max_loras=2)) as engine:
        async with ready(address) as client:
            loading = asyncio.create_task(load_adapter(client, "go", "/go", replaces=False))
            await asyncio.sleep(0)
            loading.cancel()
            await until(lambda: "go" in client.adapters)
            await unload_adapter(client, "go")
            assert engine.adapters == []
            loading = asyncio.create_task(load_adapter(client, "go", "/go", replaces=False))
            await asyncio.sleep(0)
            client.fail_streams(EngineUnavailableError("over"))
            with pytest.raises(EngineUnavailableError, match="over"):
                await loading
            await load_adapter(client, "chess", "/chess", replaces=False)
            assert list(client.adapters) == ["go", "chess"]
            assert client.is_healthy


async def test_a_reply_about_an_adapter_that_cannot_be_read(address: str) -> None:
    with FakeEngine(FakeEngineConfig(address=address, max_loras=1, ignores_adapters=True)) as engine:
        async with ready(address) as client:
            change = asyncio.create_task(load_adapter(client, "a", "p", replaces=False))
            await until(lambda: any(isinstance(message, LoadAdapter) for message in engine.received))
            request_id = next(message.request_id for message in engine.received if isinstance(message, LoadAdapter))
            engine.send_raw({"type": "AdapterDone", "request_id": request_id, "error": 1})
            with pytest.raises(AdaptersBusyError):
                await change
