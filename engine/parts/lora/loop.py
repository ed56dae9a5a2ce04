"""Loads and unloads adapters between the steps of the engine's loop, as API processes ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.parts.lora.slots import LoraAdapters
from engine.parts.lora.updates import AdapterUpdates
from engine.shared.messages import AdapterDone, Adapters, LoadAdapter, UnloadAdapter

if TYPE_CHECKING:
    from engine.api_connections import Damaged
    from engine.process import EngineLoop


class UpdateQueue:
    """The part of the loop that updates adapters."""

    def __init__(self, loop: EngineLoop) -> None:
        engine = loop.engine
        self.loop = loop
        adapters = engine.adapters if isinstance(engine.adapters, LoraAdapters) else LoraAdapters([], 0, 0)
        self.updates = AdapterUpdates(adapters, engine.model_config, engine.scheduler, clock=engine.clock)

    def add(self, identity: bytes, request: LoadAdapter | UnloadAdapter) -> None:
        """Queue an update for an API process."""
        if (refusal := self.updates.add(identity, request)) is not None:
            self.loop.connections.send(identity, refusal)
        elif self.advance not in self.loop.polled:
            self.loop.polled.append(self.advance)

    def advance(self) -> None:
        """Work on the updates. Send the loaded adapters to all API processes, then the result to the one that asked."""
        connections = self.loop.connections
        for identity, done in self.updates.advance():
            for process in list(connections.identities):  # one that has gone is removed
                connections.send(process, Adapters(self.loop.engine.adapters.loaded()))
            connections.send(identity, done)
        if not self.updates.queue:
            self.loop.polled.remove(self.advance)

    def refuse(self, identity: bytes, damaged: Damaged) -> None:
        """Answer an unreadable request."""
        done = AdapterDone(request_id=damaged.request_id, error="the request cannot be read", is_temporary=True)
        self.loop.connections.send(identity, done)


def attach(loop: EngineLoop) -> None:
    """Handle the messages about adapters."""
    queue = UpdateQueue(loop)
    for kind in (LoadAdapter, UnloadAdapter):
        loop.handlers[kind] = queue.add
        loop.unreadable[kind.__name__] = queue.refuse
