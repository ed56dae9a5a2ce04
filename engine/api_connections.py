"""The API processes that the engine serves, and the socket to them."""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
import zmq

from engine.shared.messages import (
    MAX_UNREAD_MESSAGES,
    Abort,
    EngineStats,
    FinishReason,
    FromEngine,
    LoadFailed,
    Outputs,
    Submit,
    ToEngine,
    TokenEvent,
)

MAX_ATTEMPTS = 10  # of a call of the socket
PAUSE = 0.01  # seconds between attempts
GONE = {errno.EHOSTUNREACH, errno.ENOTCONN, errno.EPIPE}  # the API process has closed its end
MAX_CHOICES = 1024  # of a request that cannot be read

Result = TypeVar("Result")

logger = logging.getLogger("lightwell.engine")


class Damaged(msgspec.Struct):
    """What can be read of a message that cannot be decoded."""

    request_id: str
    type: Any = None
    n: Any = 1

    @property
    def num_choices(self) -> int:
        return self.n if isinstance(self.n, int) and 0 < self.n <= MAX_CHOICES else 1


class ApiConnections:
    """The connected API processes, and the requests that each of them waits for.

    Calls of the socket that fail are repeated a few times, since the cause may pass. Then they raise zmq.ZMQError or
    MemoryError, and the engine cannot go on: nobody knows what the message was about.
    """

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.rcvhwm = 0  # admission bounds what API processes send
        self.socket.sndhwm = MAX_UNREAD_MESSAGES
        self.socket.router_mandatory = 1  # a message that cannot be sent is an error, and is not dropped
        self.socket.linger = 0
        self.socket.bind(address)
        self.identities: set[bytes] = set()
        self.owners: dict[str, tuple[bytes, set[int]]] = {}  # request id -> (API process, unfinished choices)
        self.unsent: deque[tuple[bytes, bytes]] = deque()  # (API process, message)
        self.lost: list[str] = []  # requests of API processes that have gone
        self.frames: list[zmq.Frame] = []  # of the message that is being received
        self.encoder = msgspec.msgpack.Encoder()
        self.decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

    def receive(self, timeout: float) -> list[tuple[bytes, ToEngine | Damaged]]:
        """Return all pending messages with their senders. Wait up to `timeout` seconds for the first."""
        messages: list[tuple[bytes, ToEngine | Damaged]] = []
        wait = int(timeout * 1000)
        while self._poll(wait):
            receive: Callable[[], zmq.Frame] = partial(self.socket.recv, zmq.NOBLOCK, copy=False)  # type: ignore[assignment]
            frame = repeat(receive)
            self.frames.append(frame)
            if not frame.more:
                frames, self.frames = self.frames, []
                messages += self._decode(frames)
            wait = 0
        return messages

    def _poll(self, wait: int) -> int:
        """Return whether there is a message, after up to `wait` milliseconds."""
        try:
            return self.socket.poll(wait)
        except (zmq.ZMQError, MemoryError):
            return repeat(partial(self.socket.poll, wait))

    def _decode(self, frames: Sequence[zmq.Frame]) -> list[tuple[bytes, ToEngine | Damaged]]:
        """Return the message and its sender, or an empty list if nothing of the message can be read."""
        identity, content = frames[0].bytes, frames[-1].bytes
        try:
            return [(identity, repeat(partial(self.decoder.decode, content)))]
        except MemoryError:
            logger.error("there is too little memory to read a message of an API process")
        except Exception:
            logger.exception("a message of an API process cannot be read")
        try:
            return [(identity, msgspec.msgpack.decode(content, type=Damaged))]
        except Exception:
            return []

    def send(self, identity: bytes, message: FromEngine) -> None:
        self._send(identity, repeat(partial(self.encoder.encode, message)))

    def _send(self, identity: bytes, content: bytes) -> None:
        self.unsent.append((identity, content))
        self.flush()

    def flush(self) -> bool:
        """Send what is unsent. Return False if an API process has not read `MAX_UNREAD_MESSAGES` messages."""
        while self.unsent:
            identity, content = self.unsent[0]
            try:
                repeat(partial(self.socket.send, identity, zmq.SNDMORE | zmq.NOBLOCK), final=zmq.Again)
            except zmq.Again:
                return False
            except zmq.ZMQError as error:
                if error.errno not in GONE:
                    raise
                self._lose(identity)
            else:
                repeat(partial(self.socket.send, content))
                self.unsent.popleft()
        return True

    def _lose(self, identity: bytes) -> None:
        """Forget an API process that has gone."""
        self.identities.discard(identity)
        self.unsent = deque(entry for entry in self.unsent if entry[0] != identity)
        lost = [request_id for request_id, (owner, _) in self.owners.items() if owner == identity]
        for request_id in lost:
            del self.owners[request_id]
        if lost:
            logger.warning("an API process has gone; its %d requests end", len(lost))
        self.lost += lost

    def send_outputs(
        self,
        events: list[TokenEvent],
        stats: EngineStats,
        num_step_tokens: int,
        started: Iterable[str] = (),
        prefixes: tuple[list[bytes], list[bytes]] = ([], []),
    ) -> list[Abort]:
        """Send one message to each API process, with the events of its own requests and which of them have started.

        `prefixes`: the names of those that have been cached and evicted.

        Return what is to be aborted: a choice whose event cannot be encoded, which ends with an error instead, and the
        requests of API processes that have gone.
        """
        started_of: dict[bytes, list[str]] = {}
        for request_id in started:
            if request_id in self.owners:
                started_of.setdefault(self.owners[request_id][0], []).append(request_id)
        by_identity: dict[bytes, list[TokenEvent]] = {identity: [] for identity in self.identities}
        for event in events:
            if event.request_id in self.owners:
                by_identity[self.owners[event.request_id][0]].append(event)
        failed: list[TokenEvent] = []
        for identity, own_events in by_identity.items():
            own_started = started_of.get(identity, [])
            outputs = Outputs(
                stats=stats,
                events=own_events,
                num_step_tokens=num_step_tokens,
                started=own_started,
                cached=prefixes[0],
                evicted=prefixes[1],
            )
            content, own_failed = self._encode(outputs)
            failed += own_failed
            self._send(identity, content)
        for event in events:
            if event.finish_reason is not None:
                self.forget(event.request_id, event.index)
        lost, self.lost = self.lost, []
        return [Abort(event.request_id, event.index) for event in failed] + [Abort(request_id) for request_id in lost]

    def _encode(self, outputs: Outputs) -> tuple[bytes, list[TokenEvent]]:
        """Return a message, and those of its events that became errors because they cannot be encoded."""
        try:
            return self.encoder.encode(outputs), []
        except Exception:
            failed = [event for event in outputs.events if not self._can_encode(event)]
        for event in failed:
            event.token_ids, event.logprobs, event.prompt_logprobs, event.embedding = [], None, None, None
            event.finish_reason, event.error = FinishReason.ERROR, "an event of this request cannot be sent"
        return repeat(partial(self.encoder.encode, outputs)), failed

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

    def open_choices(self, identity: bytes, damaged: Damaged) -> list[int]:
        """Return the choices of an unreadable request that the API process waits for from now on, if it is its own."""
        choices = set(range(damaged.num_choices))
        owner, choices = self.owners.setdefault(damaged.request_id, (identity, choices))
        return sorted(choices) if owner == identity else []

    def forget(self, request_id: str, index: int | None) -> None:
        """Note that a choice has ended, or all choices if `index` is None. Unknown ids are ignored."""
        if request_id in self.owners:
            open_choices = self.owners[request_id][1]
            open_choices.difference_update(set(open_choices) if index is None else {index})
            if not open_choices:
                del self.owners[request_id]

    def refuse(self, reason: str, seconds: float) -> None:
        """Tell the API process that the engine cannot load its model, if it connects within some seconds."""
        for identity, _ in self.receive(seconds)[:1]:
            self.socket.linger = int(1000 * seconds)
            self.send(identity, LoadFailed(reason))

    def close(self) -> None:
        self.socket.close()
        self.context.term()


def repeat(call: Callable[[], Result], final: type[Exception] | tuple[()] = ()) -> Result:
    """Return what `call` returns. If it fails, call it up to `MAX_ATTEMPTS` times, then raise; `final` at once."""
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return call()
        except final:
            raise
        except (zmq.ZMQError, MemoryError):
            time.sleep(PAUSE)
    return call()
