"""The LoRA adapters that the engine has loaded, and what it was asked to change of them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence

from engine.shared.messages import AdapterDone, AdapterField, LoadAdapter, LoraAdapter, ToEngine, UnloadAdapter
from server.http.errors import AdapterNotFoundError, AdaptersBusyError, APIError, BadRequestError, InvalidValueError

PARAMS = {AdapterField.NAME: "lora_name", AdapterField.PATH: "lora_path"}  # what the API calls them

Change = LoadAdapter | UnloadAdapter


class AdapterBook:
    """What `EngineClient` knows of adapters. It hands on what the engine says of them."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self.loaded: dict[str, LoraAdapter] = {}  # by name
        self._send = send
        self._changes: dict[str, tuple[Change, asyncio.Future[None]]] = {}  # by request_id

    async def load(self, name: str, path: str, *, replaces: bool) -> None:
        """Returns once requests can use it.

        Raises BadRequestError or AdaptersBusyError in the engine's words, or what `fail` is given.
        """
        await self._change(LoadAdapter(request_id=secrets.token_hex(16), name=name, path=path, replaces=replaces))

    async def unload(self, name: str) -> None:
        """As `load`, and AdapterNotFoundError. It is out of the book at once: no request finds it from now on."""
        self.loaded.pop(name, None)
        await self._change(UnloadAdapter(request_id=secrets.token_hex(16), name=name))

    async def _change(self, message: Change) -> None:
        done = asyncio.get_running_loop().create_future()
        self._changes[message.request_id] = message, done
        self._send(message)
        await done

    def take(self, adapters: Sequence[LoraAdapter]) -> None:
        """Those that are loaded. The engine may have said so before it read that one of them is to go."""
        going = {change.name for change, _ in self._changes.values() if isinstance(change, UnloadAdapter)}
        self.loaded = {adapter.name: adapter for adapter in adapters if adapter.name not in going}

    def finish(self, message: AdapterDone) -> None:
        """A change is made, or cannot be."""
        if (waiting := self._changes.pop(message.request_id, None)) is None:
            return
        change, done = waiting
        if done.done():  # whoever waited has gone away
            return
        if message.error:
            done.set_exception(_error(change, message))
        else:
            done.set_result(None)

    def fail(self, error: APIError) -> None:
        """Whoever waits for a change gets the error instead."""
        for _, done in self._changes.values():
            if not done.done():
                done.set_exception(error)
        self._changes.clear()


def _error(change: Change, message: AdapterDone) -> APIError:
    """As it would be were it judged here."""
    if message.is_temporary:
        return AdaptersBusyError(message.error)
    if message.field is None:
        return BadRequestError(message.error)
    if isinstance(change, UnloadAdapter) and message.field is AdapterField.NAME:
        return AdapterNotFoundError(change.name)
    return InvalidValueError(message.error, param=PARAMS[message.field])
