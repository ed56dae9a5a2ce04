"""One of the engines that the API process is connected to, and the requests that it computes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from engine.shared.messages import (
    MAX_UNREAD_MESSAGES,
    AdapterDone,
    Adapters,
    Answer,
    EngineStats,
    FromEngine,
    Hello,
    LoadFailed,
    LoraAdapter,
    Outputs,
    Ready,
    ToEngine,
    Vocabulary,
)
from server.engine_client.admission import Admission
from server.engine_client.liveness import EngineLiveness
from server.engine_client.streams import OpenStreams
from server.http.errors import APIError, EngineDeadError, ServerError
from server.metrics import Metrics
from server.part_table import is_installed, load_module
from server.settings.process_configs import EngineProcess

logger = logging.getLogger(__name__)

MAX_BATCH_MESSAGES = 16  # read at a time; then others have their turn

UNREADABLE = "The engine's reply cannot be read. Please retry later."


class DamagedEvent(msgspec.Struct):
    """What can be read of an event that cannot be decoded."""

    request_id: str


class Damaged(msgspec.Struct):
    """What can be read of a message that cannot be decoded."""

    type: str = ""
    request_id: str = ""
    events: list[DamagedEvent] = []


class EngineConnection:
    """Sends and receives msgpack messages over a DEALER socket, a new one for each engine at the address."""

    received: Any = FromEngine  # the type of the messages

    def __init__(self, address: str) -> None:
        self._address = address
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(self.received)
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._on_message: Callable[[Any], None]
        self._on_failure: Callable[[], None]

    def open(self, on_message: Callable[[Any], None], on_failure: Callable[[], None]) -> None:
        """Connect a socket, and pass each message to `on_message` until `disconnect`.

        ZeroMQ keeps what is sent until the engine has bound its end. `on_failure` is called when nothing more can
        be read, for example because `on_message` has failed.
        """
        self._loop, self._on_message, self._on_failure = asyncio.get_running_loop(), on_message, on_failure
        self._context = self._context or zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in ((zmq.SNDHWM, 0), (zmq.RCVHWM, MAX_UNREAD_MESSAGES), (zmq.LINGER, 0)):
            self._socket.setsockopt(option, value)
        self._attach(self._socket, self._address)
        self._loop.add_reader(self._socket.fileno(), self._receive)

    def _attach(self, socket: zmq.Socket[bytes], address: str) -> None:
        socket.connect(address)

    def send(self, message: ToEngine) -> None:
        """Queue a message, unless the connection is closed or disconnected, or nobody has connected to a bound socket.

        Never blocks: sent messages have no high-water mark, and admission bounds the number of messages in its queue.
        """
        if self._socket is None:
            return
        self._loop.call_soon(self._receive)  # sending uses up the event that messages have arrived
        with suppress(zmq.Again):
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    def _receive(self) -> None:
        """Pass on what has arrived: ZeroMQ's file descriptor tells once of all messages.

        Each message is decoded once: once per step, not once per token.
        """
        socket = self._socket
        try:
            for _ in range(MAX_BATCH_MESSAGES):
                if socket is None or socket is not self._socket:
                    return
                content = socket.recv(zmq.NOBLOCK)
                try:
                    message = self._decoder.decode(content)
                except Exception:
                    logger.exception("a message of the engine cannot be read")
                    message = _readable(content)
                self._on_message(message)
        except zmq.Again:
            return
        except Exception:
            logger.exception("cannot read from the engine")
            self.disconnect()
            self._on_failure()
        else:
            self._loop.call_soon(self._receive)

    def ignore_messages(self) -> None:
        """Pass on no more messages. They can still be sent."""
        self._on_message = lambda message: None

    def disconnect(self) -> None:
        """Drop all messages, sent and received ones, of an engine that is lost. `open` connects to another engine."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        self._socket = None

    def close(self) -> None:
        self.disconnect()
        if self._context is not None:
            self._context.term()
        self._context = None


def _readable(content: bytes) -> Damaged:
    try:
        return msgspec.msgpack.decode(content, type=Damaged)
    except Exception:
        return Damaged()


class EngineAdapters:
    """The LoRA adapters that an engine has loaded: none, without the part that loads them."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self.by_name: dict[str, LoraAdapter] = {}

    def update(self, adapters: Sequence[LoraAdapter]) -> None:
        """Set the loaded adapters, as the engine reports them."""

    def finish(self, message: AdapterDone) -> None:
        """Complete a pending change with its result or error."""

    def keep(self) -> None:
        """Keep the adapters of an engine that is lost until `restore` has loaded them in another one."""

    async def restore(self, loaded: Sequence[LoraAdapter]) -> None:
        """Load the adapters of the lost engine into another one, which has `loaded`."""

    def fail(self, error: APIError) -> None:
        """Fail all pending changes with `error`."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What all engines of a client have in common."""

    step_timeout: float  # seconds that the longest step may take; an engine that is silent for longer is dead
    can_restart: bool = False  # an engine that dies after it has been ready is replaced, see `engine_started`
    vocabulary: Vocabulary | None = None  # that engines need for grammars; None: they have it
    connect: Callable[[str], EngineConnection] = EngineConnection  # to an address


class ConnectedEngine:
    """The connection to an engine, its liveness and LoRA adapters, the streams of its requests, and questions to it.

    All methods but `__init__` must be called on the event loop that called `start`.
    """

    def __init__(
        self,
        number: int,
        process: EngineProcess,
        options: EngineOptions,
        *,
        name: str,
        owner: Admission,
        metrics: Metrics,
        streams: type[OpenStreams] = OpenStreams,
    ) -> None:
        """Create the connection; `start` opens it.

        Args:
            number: Number of the engine, which metrics and records show.
            process: Where it is. Without its id, its death is noticed only after it has become ready.
            options: What it has in common with other engines.
            name: Names it in the log.
            owner: The client, to which it returns capacity, and which it tells when it becomes ready, is lost, or dies.
            metrics: To which its own are added.
            streams: The class of those of its requests.
        """
        self.number = number
        self.stats = EngineStats()
        self.num_steps = 0  # that it has reported
        self.cached: set[bytes] = set()  # names of prefixes, if there are several engines
        self._options = options
        self._owner = owner
        self._connection = options.connect(process.address)
        self.liveness = EngineLiveness(
            step_timeout=options.step_timeout,
            engine_pid=process.pid,
            can_restart=options.can_restart,
            on_loss=self._on_loss,
            on_death=self._on_death,
            name=name,
        )
        self._metrics = metrics.add_engine(number, self._current_stats)
        self.streams = streams(self._send_if_ready, owner, self._metrics)
        adapters = load_module("lora", "part").LoadedAdapters if is_installed("lora") else EngineAdapters
        self.adapters: EngineAdapters = adapters(self._connection.send)
        self.send = self._connection.send
        self.asker: Any = None  # of a part: `finish` gets the engine's answers, `fail` an error that ends all questions
        self._tasks: list[asyncio.Task[None]] = []  # of the current process
        self._watcher: asyncio.Task[None] | None = None  # of the heartbeat

    def start(self) -> None:
        """Connect and ask the engine to report when it is ready. The engine may start later."""
        self._connect()
        self.liveness.start()
        self._watcher = asyncio.create_task(self.liveness.watch_heartbeat())

    def engine_started(self, pid: int) -> None:
        """Connect to the process that replaces a lost one. When it is ready, it gets the waiting requests."""
        self.liveness.engine_started(pid)
        if self.liveness.is_restarting:
            self._leave_engine()
            self._connect()

    def _connect(self) -> None:
        self._connection.open(self._on_message, self._on_unreadable)
        self._connection.send(Hello())
        if self._options.vocabulary is not None:
            self._connection.send(self._options.vocabulary)

    async def close(self, error: APIError) -> None:
        """Stop the tasks, fail the open streams with `error`, and close the connection."""
        self._connection.ignore_messages()
        tasks = [*self._tasks, *([] if self._watcher is None else [self._watcher])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks, self._watcher = [], None
        self.fail_streams(error)
        self.liveness.close()
        self._connection.close()

    def fail_streams(self, error: APIError) -> None:
        """End all open streams with `error`, and their requests in the engine. Fail changes of adapters, questions."""
        self.streams.fail(error)
        self.adapters.fail(error)
        self._fail_questions(error)

    def _fail_questions(self, error: APIError) -> None:
        if self.asker is not None:
            self.asker.fail(error)

    # Messages from the engine.

    def _on_unreadable(self) -> None:
        self.liveness.lose("its messages cannot be read")

    def _on_message(self, message: FromEngine | Damaged) -> None:
        if isinstance(message, Damaged):
            self._on_damaged(message)
            return
        now = time.monotonic()
        self.liveness.was_heard = True
        match message:
            case Outputs():
                self._on_outputs(message, now)
            case Ready():
                self._on_ready(message)
            case LoadFailed():
                if not self.liveness.is_restarting:  # else the supervisor decides how often a restart is tried
                    self.liveness.mark_dead(message.reason)
            case Adapters():
                self.adapters.update(message.adapters)
            case AdapterDone():
                self.adapters.finish(message)
            case Answer():
                if self.asker is not None:
                    self.asker.finish(message)

    def _on_outputs(self, message: Outputs, now: float) -> None:
        self.stats = message.stats
        if message.num_step_tokens:
            self._metrics.step_tokens.observe(message.num_step_tokens)
            self._owner.count_step(message.num_step_tokens, now, self.number, message.stats.num_waiting)
            self.num_steps += 1
        elif not message.stats.num_waiting:
            self._owner.forget_waiting(self.number)
        self.cached.update(message.cached)
        self.cached.difference_update(message.evicted)
        if message.started:
            self.streams.start(message.started)
        self.streams.push(message.events, now)

    def _on_damaged(self, message: Damaged) -> None:
        """End what a message is about which cannot be read: all questions or requests, if it does not even say that."""
        if not self.liveness.is_ready or message.type == Ready.__name__:
            self.liveness.lose("its messages cannot be read")
        elif message.request_id:
            self.adapters.finish(AdapterDone(request_id=message.request_id, error=UNREADABLE, is_temporary=True))
        elif message.events:
            self.streams.discard([event.request_id for event in message.events], ServerError())
        elif message.type == Answer.__name__:
            self._fail_questions(ServerError())
        elif message.type != Adapters.__name__:
            self.fail_streams(ServerError())

    def _on_ready(self, message: Ready) -> None:
        if self.liveness.info is None and not self._owner.accepts(message.info):
            self.liveness.mark_dead("its answers would not be those of the other engines; has the model been changed?")
            return
        self._metrics.set_info(message.info)
        self.cached = set(message.prefixes)
        if self.liveness.is_restarting:
            self._tasks.append(asyncio.create_task(self._resume(message)))
        elif self.liveness.info is None:
            self.adapters.update(message.adapters)
            self.liveness.set_ready(message.info)
            self._owner.update()
        else:  # from a coordinator whose engines have changed
            self.liveness.info = message.info
            self._owner.update()

    async def _resume(self, message: Ready) -> None:
        """Give a restarted engine the adapters that were loaded, and then the waiting requests."""
        await self.adapters.restore(message.adapters)
        self.liveness.set_ready(message.info)
        self.streams.submit_again(self.adapters.by_name)
        self._owner.update()

    def _send_if_ready(self, message: ToEngine) -> None:
        """Send a message about a request. A restarting engine gets all waiting requests when it is ready."""
        if self.liveness.is_ready:
            self._connection.send(message)

    def _current_stats(self) -> EngineStats:
        """Return the engine's latest statistics. While it is being restarted, requests wait in this process."""
        if not self.liveness.is_restarting:
            return self.stats
        return msgspec.structs.replace(self.stats, num_waiting=self.streams.num_waiting)

    def _on_loss(self) -> None:
        """The engine is being restarted: fail the requests that have had tokens; the others wait for it."""
        self._metrics.restarts.inc()
        self.adapters.keep()
        self._leave_engine()
        self.streams.lose_engine(EngineDeadError())
        self._owner.update()

    def _on_death(self) -> None:
        try:
            self._leave_engine()
            self.streams.lose_engine(EngineDeadError())
        finally:
            self._owner.update()  # other engines may take the rest
        self.fail_streams(EngineDeadError())

    def _leave_engine(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        self._connection.disconnect()
        self.adapters.fail(EngineDeadError())
        self._fail_questions(EngineDeadError())
        self.cached = set()
        self._owner.forget_waiting(self.number)
        self.stats = msgspec.structs.replace(
            self.stats, num_running=0, num_waiting=0, num_blocks_used=0, running_adapters=[], waiting_adapters=[]
        )
