"""The API processes that the engine serves, and the socket to them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec
import zmq

from engine.shared.messages import EngineStats, FinishReason, FromEngine, Outputs, Submit, ToEngine, TokenEvent

logger = logging.getLogger("lightwell.engine")


class ApiConnections:
    """The connected API processes, and the requests that each of them waits for."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        # A ROUTER drops messages above its high-water mark. Admission bounds the messages in flight instead.
        self.socket.set_hwm(0)
        self.socket.linger = 0
        self.socket.bind(address)
        self.identities: set[bytes] = set()
        self.owners: dict[str, tuple[bytes, set[int]]] = {}  # request id -> (API process, unfinished choices)
        self.encoder = msgspec.msgpack.Encoder()
        self.decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

    def receive(self, timeout: float) -> list[tuple[bytes, ToEngine]]:
        """Return all pending messages with their senders. Wait up to `timeout` seconds for the first."""
        messages: list[tuple[bytes, ToEngine]] = []
        wait = int(timeout * 1000)
        while self.socket.poll(wait):
            identity, content = self.socket.recv_multipart()
            messages.append((identity, self.decoder.decode(content)))
            wait = 0
        return messages

    def send(self, identity: bytes, message: FromEngine) -> None:
        self.socket.send_multipart((identity, self.encoder.encode(message)))

    def send_outputs(
        self, events: list[TokenEvent], stats: EngineStats, num_step_tokens: int, started: Iterable[str] = ()
    ) -> list[TokenEvent]:
        """Send one message to each API process, with the events of its own requests and which of them have started.

        A choice whose event cannot be encoded ends with an error instead. Return the events of these choices.
        """
        started_of: dict[bytes, list[str]] = {}
        for request_id in started:
            if request_id in self.owners:
                started_of.setdefault(self.owners[request_id][0], []).append(request_id)
        by_identity: dict[bytes, list[TokenEvent]] = {identity: [] for identity in self.identities}
        for event in events:
            by_identity[self.owners[event.request_id][0]].append(event)
        failed: list[TokenEvent] = []
        for identity, own_events in by_identity.items():
            own_started = started_of.get(identity, [])
            outputs = Outputs(stats=stats, events=own_events, num_step_tokens=num_step_tokens, started=own_started)
            content, own_failed = self._encode(outputs)
            failed += own_failed
            self.socket.send_multipart((identity, content))
        for event in events:
            if event.finish_reason is not None:
                self.forget(event.request_id, event.index)
        return failed

    def _encode(self, outputs: Outputs) -> tuple[bytes, list[TokenEvent]]:
        """Return a message, and those of its events that became errors because they cannot be encoded."""
        try:
            return self.encoder.encode(outputs), []
        except Exception:
            failed = [event for event in outputs.events if not self._can_encode(event)]
        for event in failed:
            event.token_ids, event.logprobs, event.prompt_logprobs, event.embedding = [], None, None, None
            event.finish_reason, event.error = FinishReason.ERROR, "an event of this request cannot be sent"
        return self.encoder.encode(outputs), failed

    def _can_encode(self, event: TokenEvent) -> bool:
        try:
            self.encoder.encode(event)
        except Exception:
            logger.exception("an event of request %s cannot be sent", event.request_id)
            return False
        return True

    def remember(self, identity: bytes, submit: Submit) -> None:
        """Note that an API process waits for the choices of a request."""
        self.owners[submit.request_id] = (identity, set(range(submit.n)))

    def forget(self, request_id: str, index: int | None) -> None:
        """Note that a choice has ended, or all choices if `index` is None. Unknown ids are ignored."""
        if request_id in self.owners:
            open_choices = self.owners[request_id][1]
            open_choices.difference_update(set(open_choices) if index is None else {index})
            if not open_choices:
                del self.owners[request_id]

    def close(self) -> None:
        self.socket.close()
        self.context.term()
