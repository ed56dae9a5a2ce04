"""The LoRA adapters that the engine has loaded, and what it was asked to change of them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence

from engine.messages import AdapterDone, LoadAdapter, LoraAdapter, ToEngine, UnloadAdapter
from server.errors import APIError, BadRequestError


class AdapterBook:
    """What `EngineClient` knows of adapters. It hands on what the engine says of them."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self.loaded: dict[str, LoraAdapter] = {}  # by name
        self._send = send
        self._changes: dict[str, tuple[LoadAdapter | UnloadAdapter, asyncio.Future[None]]] = {}  # by request_id

    async def load(self, name: str, path: str, *, replaces: bool) -> None:
        """Returns once requests can use it. Raises BadRequestError in the engine's words, or what `fail` is given."""
        await self._change(LoadAdapter(request_id=secrets.token_hex(16), name=name, path=path, replaces=replaces))

    async def unload(self, name: str) -> None:
        """As `load`. It is out of the book at once, so that nothing is submitted behind the message."""
        self.loaded.pop(name, None)
        await self._change(UnloadAdapter(request_id=secrets.token_hex(16), name=name))

    async def _change(self, message: LoadAdapter | UnloadAdapter) -> None:
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
        _, done = self._changes.pop(message.request_id, (None, None))
        if done is None or done.done():  # nobody waits any more
            return
        if message.error:
            done.set_exception(BadRequestError(message.error))
        else:
            done.set_result(None)

    def fail(self, error: APIError) -> None:
        """Nothing more will come of the engine."""
        for _, done in self._changes.values():
            if not done.done():
                done.set_exception(error)
        self._changes.clear()
