"""The responses that can be asked for again: in memory, the latest ones, gone with the process."""

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from server.api.responses.event_log import EventLog
from server.api.responses.schemas import ResponseObject

ITEM_ID = re.compile("[a-z]+_[0-9a-f]{32}")  # as they are made here


@dataclass(slots=True)
class StoredResponse:
    """A response and the conversation that it is the end of. Items are of OpenAI's form."""

    response: ResponseObject
    input_items: list[dict[str, Any]]
    earlier_items: list[dict[str, Any]] = field(default_factory=list)  # of the responses that it follows
    events: EventLog | None = None  # of its stream, where that is generated in the background
    num_json_bytes: int = 0  # of the whole conversation, when it was stored
    num_bytes: int = 0  # that count in the store: those, and what the events take
    items_by_id: dict[str, dict[str, Any]] = field(default_factory=dict)  # its own, when it was stored

    @property
    def own_items(self) -> list[dict[str, Any]]:
        """What was asked, and the answer."""
        return [*self.input_items, *msgspec.to_builtins(self.response.output)]

    @property
    def items(self) -> list[dict[str, Any]]:
        """The whole conversation, but for instructions."""
        return [*self.earlier_items, *self.own_items]


class ResponseStore:
    """At most so many responses and bytes; those that were not used for longest are dropped first.

    A conversation counts in full for each response of it: items that several share stay until the last one goes.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._by_id: OrderedDict[str, StoredResponse] = OrderedDict()
        self._holders: dict[str, list[str]] = {}  # id of an item -> those of its responses, the latest last
        self._num_bytes = 0
        self._lock = threading.RLock()  # an answer with log probabilities is made in a thread

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def get(self, response_id: str) -> StoredResponse | None:
        with self._lock:
            if response_id in self._by_id:
                self._by_id.move_to_end(response_id)
            return self._by_id.get(response_id)

    def item(self, item_id: str) -> dict[str, Any] | None:
        """An item of a response's input or output. Its id must have been made here, for no other is secret."""
        with self._lock:
            holders = self._holders.get(item_id)
            stored = self.get(holders[-1]) if holders else None
            return None if stored is None else stored.items_by_id[item_id]

    def put(self, stored: StoredResponse) -> None:
        """Adds a response, or counts anew one that has grown."""
        num_json_bytes = len(msgspec.json.encode((stored.items, stored.response)))
        with self._lock:
            self._remove(stored.response.id)
            stored.num_json_bytes, stored.num_bytes = num_json_bytes, 0
            stored.items_by_id = {item["id"]: item for item in stored.own_items if ITEM_ID.fullmatch(item["id"])}
            for item_id in stored.items_by_id:
                self._holders.setdefault(item_id, []).append(stored.response.id)
            self._by_id[stored.response.id] = stored
            self._count(stored)

    def count_events(self, stored: StoredResponse) -> None:
        """Says that a response's events have become more, which is a use of it. It may be gone."""
        with self._lock:
            if self.get(stored.response.id) is stored:
                self._count(stored)

    def delete(self, response_id: str) -> bool:
        """Whether it was there."""
        with self._lock:
            stored = self._remove(response_id)
            if stored is not None and stored.events is not None:
                stored.events.drop()
            return stored is not None

    def _count(self, stored: StoredResponse) -> None:
        num_bytes = stored.num_json_bytes + (0 if stored.events is None else stored.events.num_bytes)
        self._num_bytes += num_bytes - stored.num_bytes
        stored.num_bytes = num_bytes
        if num_bytes > self._max_bytes:
            self.delete(stored.response.id)  # all others would have to go, and then it
        while len(self._by_id) > self._max_responses or self._num_bytes > self._max_bytes:
            self.delete(next(iter(self._by_id)))

    def _remove(self, response_id: str) -> StoredResponse | None:
        stored = self._by_id.pop(response_id, None)
        if stored is not None:
            self._num_bytes -= stored.num_bytes
            for item_id in stored.items_by_id:
                self._drop_holder(item_id, response_id)
        return stored

    def _drop_holder(self, item_id: str, response_id: str) -> None:
        holders = self._holders[item_id]
        holders.remove(response_id)
        if not holders:
            del self._holders[item_id]
