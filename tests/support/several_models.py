"""A server of several models in a thread, whose engines are fake ones that start and stop as it wants."""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.main import make_context
from server.parts.models.manager import ModelManager
from server.parts.models.slots import LoadableSlot
from server.processes.supervisor_channel import Message, StartEngine, StopEngine, make_channel
from server.settings.process_configs import ApiProcessConfig, EngineProcess, ServedModelConfig
from server.settings.table import Settings
from tests.support.fake_engine import FakeEngine, FakeEngineConfig, MortalEngine
from tests.support.serving import RunningServer, own_address, running_server, wait_until

NAMES = ("one", "two", "three")


class StubSupervisor:
    """Starts and stops fake engines, as the API process orders. It lives on the server's event loop."""

    def __init__(self, configs: Sequence[FakeEngineConfig], *, in_processes: bool) -> None:
        self.configs = list(configs)
        self._kind = MortalEngine if in_processes else FakeEngine
        self.orders: list[Message] = []
        self.engines: dict[int, Any] = {}
        self.manager: ModelManager | None = None
        self.starts_nothing = False  # orders to start an engine are lost

    def send(self, order: Message) -> None:
        self.orders.append(order)
        assert self.manager is not None
        loop = asyncio.get_running_loop()
        match order:
            case StartEngine() if self.starts_nothing:
                pass
            case StartEngine():
                loop.call_soon(self.manager.engine_started, order.number, self._start(order.number))
            case StopEngine():
                self.end(order.number)
                loop.call_soon(self.manager.engine_gone, order.number, "its process has ended")

    def _start(self, number: int) -> int:
        """Start an engine, and return the id of its process."""
        engine = self.engines[number] = self._kind(self.configs[number]).__enter__()
        return engine.pid if isinstance(engine, MortalEngine) else os.getpid()

    def end(self, number: int) -> None:
        """End an engine."""
        if (engine := self.engines.pop(number, None)) is not None:
            engine.__exit__()

    def close(self) -> None:
        for number in list(self.engines):
            self.end(number)


class SeveralModels:
    """A running server of several models."""

    def __init__(self, server: RunningServer, supervisor: StubSupervisor) -> None:
        self.url = server.url
        self.turn, self.loop = server.turn, server.loop
        self.context = server.context
        self.supervisor = supervisor

    @property
    def manager(self) -> ModelManager:
        assert isinstance(self.context.models, ModelManager)
        return self.context.models

    def call(self, function: Callable[..., None], *args: object) -> None:
        """Call a function on the server's event loop. Raises what it raises."""

        async def on_loop() -> None:
            function(*args)

        asyncio.run_coroutine_threadsafe(on_loop(), self.loop).result(30)

    @property
    def slots(self) -> Sequence[LoadableSlot]:
        return [slot for slot in self.context.models.slots if isinstance(slot, LoadableSlot)]

    @property
    def states(self) -> dict[str, str]:
        models = httpx.get(f"{self.url}/v1/models").json()["data"]
        return {model["id"]: model["state"] for model in models}

    def describe(self, name: str) -> dict[str, Any]:
        model: dict[str, Any] = httpx.get(f"{self.url}/v1/models/{name}").json()
        return model

    def complete(self, model: str, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": "Hi", "max_tokens": 4, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)


@contextmanager
def several_models(
    folder: Path,
    *,
    models: Sequence[dict[str, Any]] = ({}, {}),
    engines: dict[str, Any] | None = None,
    in_processes: bool = False,
    **settings: Any,
) -> Iterator[SeveralModels]:
    """Run a server of models in `folder` with the names of `NAMES`; `models` are settings of each.

    By default, requests wait for a day, which tests let pass. With `in_processes`, each engine has one.
    """
    with ExitStack() as stack:
        entries = tuple({"model": str(folder), "load": "on-first-use", **model} for model in models)
        base = Settings(models=entries, **{"queue_timeout": 86_400.0, **settings})
        addresses = [stack.enter_context(own_address()) for _ in models]
        fakes = [FakeEngineConfig(address=address, **(engines or {})) for address in addresses]
        supervisor = StubSupervisor(fakes, in_processes=in_processes)
        configs = tuple(
            ServedModelConfig(
                settings=each, path=str(folder), names=(name,), engines=(EngineProcess(address, None, number),)
            )
            for number, (each, name, address) in enumerate(zip(base.each_model, NAMES, addresses, strict=False))
        )
        channel, other_end = make_channel()
        stack.callback(other_end.close)
        stack.callback(channel.close)
        channel.send = supervisor.send  # type: ignore[method-assign, assignment]
        context = make_context(ApiProcessConfig(settings=base, models=configs), channel)
        assert isinstance(context.models, ModelManager)
        supervisor.manager = context.models
        stack.callback(supervisor.close)
        server = stack.enter_context(running_server(context, wait_ready=False))
        yield SeveralModels(server, supervisor)


def unload(server: SeveralModels, name: str) -> None:
    """Unload a model as clients of Ollama do."""
    answer = httpx.post(server.url + "/api/generate", json={"model": name, "keep_alive": 0})
    assert answer.json()["done_reason"] == "unload"
    assert "x-lightwell-warnings" not in answer.headers
    slot = server.slots[NAMES.index(name)]
    wait_until(lambda: server.states[name] == "unloaded" and slot.task is None)  # its engine has ended
