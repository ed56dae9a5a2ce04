"""The LoRA adapters loaded in the engine, and the pending requests to load or unload one."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence

from engine.shared.messages import AdapterDone, AdapterField, LoadAdapter, LoraAdapter, ToEngine, UnloadAdapter
from server.engine_client.client import EngineClient
from server.engine_client.connected_engine import ConnectedEngine, EngineAdapters
from server.http.errors import APIError, BadRequestError, EngineUnavailableError, InvalidValueError, clip

logger = logging.getLogger(__name__)

PARAMS = {AdapterField.NAME: "lora_name", AdapterField.PATH: "lora_path"}  # names of the fields in the API

Change = LoadAdapter | UnloadAdapter


class AdapterNotFoundError(APIError):
    def __init__(self, name: str) -> None:
        message = f"The lora adapter '{clip(name)}' cannot be found."
        super().__init__(404, message, code="model_not_found", param="lora_name")


class AdaptersBusyError(EngineUnavailableError):
    """The engine cannot load a LoRA adapter at the moment. The message comes from the engine."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="adapters_busy")


class LoadedAdapters(EngineAdapters):
    """The adapters that the engine has reported as loaded, and the changes that callers wait for."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        super().__init__(send)
        self._send = send
        self._changes: dict[str, tuple[Change, asyncio.Future[None]]] = {}  # by request_id
        self._is_restoring = False
        self._reported: Sequence[LoraAdapter] = ()  # by the engine

    def load(self, name: str, path: str, *, replaces: bool) -> asyncio.Future[None]:
        """Load an adapter. The result comes once requests can use it.

        Raises BadRequestError or AdaptersBusyError with the engine's message, or the error passed to `fail`.
        """
        return self._change(LoadAdapter(request_id=secrets.token_hex(16), name=name, path=path, replaces=replaces))

    def unload(self, name: str) -> asyncio.Future[None]:
        """Unload an adapter. New requests cannot use it from now on; requests that already use it are completed.

        Raises AdapterNotFoundError, and what `load` raises.
        """
        self.by_name.pop(name, None)
        return self._change(UnloadAdapter(request_id=secrets.token_hex(16), name=name))

    def _change(self, message: Change) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes[message.request_id] = message, done
        self._send(message)
        return done

    def update(self, adapters: Sequence[LoraAdapter]) -> None:
        """Set the loaded adapters, except those being unloaded: the engine may not have read that request yet.

        While the engine is being restarted, they stay what they were: `restore` needs them.
        """
        self._reported = adapters
        if self._is_restoring:
            return
        unloading = {change.name for change, _ in self._changes.values() if isinstance(change, UnloadAdapter)}
        self.by_name = {adapter.name: adapter for adapter in adapters if adapter.name not in unloading}

    def finish(self, message: AdapterDone) -> None:
        """Complete a pending change with its result or error."""
        if (pending := self._changes.pop(message.request_id, None)) is None:
            return
        change, done = pending
        if done.done():  # the caller was cancelled
            return
        if message.error:
            done.set_exception(_error(change, message))
        else:
            done.set_result(None)

    def keep(self) -> None:
        """Keep the adapters of an engine that is lost until `restore` has loaded them in another one."""
        self._is_restoring = True

    async def restore(self, loaded: Sequence[LoraAdapter]) -> None:
        """Load the adapters of the lost engine into another one, which has `loaded`, and log those that fail.

        It is to be cancelled if that engine is lost too.
        """
        self.update(loaded)
        fingerprints = {adapter.name: adapter.fingerprint for adapter in loaded}
        for name in fingerprints.keys() - self.by_name.keys():
            await self._change(UnloadAdapter(request_id=secrets.token_hex(16), name=name))
        for adapter in list(self.by_name.values()):
            if fingerprints.get(adapter.name) != adapter.fingerprint:
                await self._load_again(adapter)
        self._is_restoring = False
        self.update(self._reported)

    async def _load_again(self, adapter: LoraAdapter) -> None:
        try:
            await self.load(adapter.name, adapter.path, replaces=True)
        except (BadRequestError, AdaptersBusyError) as error:
            logger.error("the LoRA adapter %s is lost: %s", adapter.name, error.message)

    def fail(self, error: APIError) -> None:
        """Fail all pending changes with `error`."""
        for _, done in self._changes.values():
            if not done.done():
                done.set_exception(error)
        self._changes.clear()


def _error(change: Change, message: AdapterDone) -> APIError:
    """Return the API error for a change that the engine rejected."""
    if message.is_temporary:
        return AdaptersBusyError(message.error)
    if message.field is None:
        return BadRequestError(message.error)
    if isinstance(change, UnloadAdapter) and message.field is AdapterField.NAME:
        return AdapterNotFoundError(change.name)
    return InvalidValueError(message.error, param=PARAMS[message.field])


async def load_adapter(client: EngineClient, name: str, path: str, *, replaces: bool) -> None:
    """Load an adapter into all engines of a model, or none; see `LoadedAdapters.load`.

    If only some engines fail to replace one, all unload it. Raises EngineUnavailableError if no new work is accepted.
    """
    engines = _engines_to_change(client)
    loads = [_adapters(engine).load(name, path, replaces=replaces) for engine in engines]
    errors = [result for result in await asyncio.gather(*loads, return_exceptions=True) if result is not None]
    client.tell_listeners()
    if not errors:
        return
    if len(errors) < len(engines):
        unloads = [_adapters(engine).unload(name) for engine in engines if engine.liveness.is_ready]
        await asyncio.gather(*unloads, return_exceptions=True)
    raise errors[0]


async def unload_adapter(client: EngineClient, name: str) -> None:
    """Unload an adapter; see `LoadedAdapters.unload`. Raises EngineUnavailableError if no new work is accepted."""
    unloads = [_adapters(engine).unload(name) for engine in _engines_to_change(client)]
    client.tell_listeners()
    await asyncio.gather(*unloads)


def _engines_to_change(client: EngineClient) -> Sequence[ConnectedEngine]:
    """Return the engines that are left. Raises EngineUnavailableError unless all are ready."""
    client.check_open()
    for engine in client.alive:
        engine.liveness.check_ready()
    return client.alive


def _adapters(engine: ConnectedEngine) -> LoadedAdapters:
    assert isinstance(engine.adapters, LoadedAdapters)
    return engine.adapters
