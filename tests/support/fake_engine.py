"""An engine without a model: it binds the real socket, speaks the real protocol, and generates configured replies.

`FakeEngine` runs in a thread of the test process, which can inspect it; `fake_engine_process` is a child process that
can be killed. Both follow a `FakeEngineConfig`. As in the real engine, a step generates one token of each running
choice.
"""

from __future__ import annotations

import copy
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Self

import msgspec
import zmq

from engine.shared import messages
from tests.support.engine_info import ENGINE_INFO

EOS_TOKEN_ID = 256  # of the tokenizer in tests/support/tiny_tokenizer_model.py
DEFAULT_REPLY = b"Hello, world!"


class FakeEngineConfig(msgspec.Struct, kw_only=True):
    """Replies and behaviour of a fake engine. Times are in seconds."""

    address: str
    pid: int = 0  # that it reports; 0: its own
    # Tokens generated for every prompt, before the end token.
    reply: list[int] = msgspec.field(default_factory=lambda: list(DEFAULT_REPLY))
    replies: list[tuple[list[int], list[int]]] = []  # (prompt, reply); other prompts get `reply`
    endless: bool = False  # repeat the reply until max_tokens
    step_seconds: float = 0.0
    never_ready: bool = False
    load_failure: str = ""  # why it cannot load its model
    num_prompt_steps: int = 0  # before the first token of each choice
    fail_request: bool = False  # each choice ends with an error
    last_reason: messages.FinishReason = messages.FinishReason.STOP  # finish reason at the end token
    num_cached_tokens: int = 0
    max_model_len: int = 2048
    max_num_seqs: int = 8
    num_blocks: int = 256
    inspection_problem: str | None = None  # of every inspection
    vocab_size: int = 260
    adapters: list[messages.LoraAdapter] = []  # loaded at start-up
    max_loras: int = 0
    adapter_error: messages.AdapterDone | None = None  # result of every load, with its request id
    ignores_adapters: bool = False  # loads and unloads get no reply
    steps: list[Any] = []  # `StepView`s that it has recorded
    forgets_adapters: bool = False  # weights are dropped when their adapter is unloaded; otherwise they stay forever


def make_adapter(name: str, path: str = "") -> messages.LoraAdapter:
    """Return an adapter whose fingerprint is the hash of its path."""
    path = path or f"/adapters/{name}"
    return messages.LoraAdapter(name=name, path=path, rank=8, fingerprint=hashlib.sha256(path.encode()).hexdigest())


class Running(msgspec.Struct):
    """One choice of a request and the rest of its reply."""

    identity: bytes
    submit: messages.Submit
    index: int
    queued: float
    reply: list[int]
    scheduled: float | None = None
    first_token: float | None = None
    num_output_tokens: int = 0
    num_steps: int = 0
    has_weights: bool = True  # the weights of its adapter are loaded


class FakeEngine:
    """A fake engine in a thread, whose loop reads a message or runs a step in each iteration.

    `received` has all messages in order; `config` may be changed between requests. `reply_to` returns the reply to a
    prompt, instead of those of `config`.
    """

    def __init__(self, config: FakeEngineConfig, reply_to: Callable[[list[int]], list[int]] | None = None) -> None:
        self.config = config
        self.received: list[messages.ToEngine] = []
        self._reply_to = reply_to
        self._stop = threading.Event()
        self._paused = threading.Event()  # no steps, but heartbeats
        self._hung = threading.Event()  # it is to hang
        self._hangs = threading.Event()  # and does
        self.running: list[Running] = []
        self.waiting: list[Running] = []
        self._raw: list[bytes] = []  # messages to be sent as they are
        self._resets: list[tuple[dict[str, Any] | None, threading.Event]] = []  # `_start_anew`, and who waits
        self._defaults = copy.deepcopy(config)
        self._begin()
        self._clients: set[bytes] = set()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(messages.ToEngine)
        self._last_sent = 0.0
        self._thread = threading.Thread(target=self.run, name="fake-engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)

    @property
    def submits(self) -> list[messages.Submit]:
        return [message for message in self.received if isinstance(message, messages.Submit)]

    @property
    def aborts(self) -> list[messages.Abort]:
        return [message for message in self.received if isinstance(message, messages.Abort)]

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self.loaded)

    @property
    def num_choices(self) -> int:
        """Number of choices that wait or run."""
        return len(self.waiting) + len(self.running)

    def pause(self) -> None:
        """Stop stepping until `resume`. Heartbeats go on."""
        self._paused.set()

    def resume(self) -> None:
        self._paused.clear()

    def send_raw(self, message: object) -> None:
        """Send bytes, or the MessagePack of another object, to all clients."""
        self._raw.append(message if isinstance(message, bytes) else msgspec.msgpack.encode(message))

    def hang(self) -> None:
        """Stop steps and heartbeats, until `reset`."""
        self._hung.set()
        assert self._hangs.wait(60)

    def reset(self) -> None:
        """Forget all requests and all that was received, and behave as at the start. Clients stay connected."""
        self._reset(None)

    def _reset(self, changes: dict[str, Any] | None) -> None:
        done = threading.Event()
        self._resets.append((changes, done))
        assert done.wait(60)
        self.received.clear()

    # The thread.

    def _begin(self) -> None:
        self.stats = messages.EngineStats(num_blocks=self.config.num_blocks)
        self.loaded = {adapter.name: adapter for adapter in self.config.adapters}
        self._weights = {adapter.fingerprint for adapter in self.config.adapters}
        self._next_step = 0.0

    def run(self) -> None:
        context = zmq.Context()
        self._socket = context.socket(zmq.ROUTER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error says that a client is gone
        self._socket.bind(self.config.address)
        try:
            while not self._stop.is_set():
                self._iterate()
        finally:
            self._socket.close()
            context.term()

    def _start_anew(self, changes: dict[str, Any] | None) -> None:
        """Go back to the start; with `changes` of the configuration, as another process, which knows no client yet."""
        for name, value in (msgspec.structs.asdict(copy.deepcopy(self._defaults)) | (changes or {})).items():
            setattr(self.config, name, value)
        if changes is not None:
            self._clients.clear()
        for what in (self.running, self.waiting, self._raw, self._paused, self._hung, self._hangs):
            what.clear()
        adapters = self.loaded
        self._begin()
        if adapters != self.loaded:
            self._send_to_all(messages.Adapters(self.config.adapters))
        self._send_outputs({})

    def _iterate(self) -> None:
        while self._resets:
            changes, done = self._resets.pop()
            self._start_anew(changes)
            done.set()
        if self._hung.is_set():
            self._hangs.set()
            time.sleep(0.01)
            return
        while self._raw:
            for identity in list(self._clients):
                self._send_bytes(identity, self._raw[0])
            del self._raw[0]
        busy = bool(self.running or self.waiting) and not self._paused.is_set()
        wait = max(0.0, self._next_step - time.monotonic()) if busy else 0.005
        if self._socket.poll(round(wait * 1000)):
            self._read()
        elif busy and time.monotonic() >= self._next_step:
            self._step()
        if time.monotonic() - self._last_sent >= messages.HEARTBEAT_SECONDS:
            self._send_outputs({})

    def _read(self) -> None:
        identity, frame = self._socket.recv_multipart()
        message = self._decoder.decode(frame)
        if identity not in self._clients and not isinstance(message, messages.Hello):
            return  # it was for the process before
        self.received.append(message)
        match message:
            case messages.Hello():
                self._clients.add(identity)
                while self.config.never_ready:
                    if self._stop.wait(0.01) or self._resets:
                        return
                ready = messages.Ready(self._info(), list(self.loaded.values()))
                failure = self.config.load_failure
                self._send(identity, messages.LoadFailed(failure) if failure else ready)
            case messages.Submit() | messages.Abort():
                self._add(identity, message) if isinstance(message, messages.Submit) else self._abort(message)
                self._send_outputs({})
            case messages.LoadAdapter() | messages.UnloadAdapter():
                self._change_adapters(identity, message)
            case messages.Ask():  # whose answers need a part
                answer = import_module("tests.support.records").answer(self, message.question)
                self._send(identity, messages.Answer(message.number, answer))

    def _change_adapters(self, identity: bytes, message: messages.LoadAdapter | messages.UnloadAdapter) -> None:
        if self.config.ignores_adapters:
            return
        done = self._load_or_unload(message)
        loaded = {adapter.fingerprint for adapter in self.loaded.values()}
        self._weights = loaded if self.config.forgets_adapters else self._weights | loaded
        if not done.error:
            self._send_to_all(messages.Adapters(list(self.loaded.values())))
        self._send(identity, done)

    def _load_or_unload(self, message: messages.LoadAdapter | messages.UnloadAdapter) -> messages.AdapterDone:
        name, error = message.name, ""
        field: messages.AdapterField | None = messages.AdapterField.NAME
        if isinstance(message, messages.UnloadAdapter):
            error = "" if self.loaded.pop(name, None) else f"no adapter is called {name}"
        elif self.config.adapter_error is not None:
            return msgspec.structs.replace(self.config.adapter_error, request_id=message.request_id)
        elif name in self.loaded and not message.replaces:
            error = f"adapter {name} is loaded already"
        elif name not in self.loaded and len(self.loaded) >= self.config.max_loras:
            error, field = f"{self.config.max_loras} adapters are loaded already", None
        else:
            self.loaded[name] = make_adapter(name, message.path)
        return messages.AdapterDone(request_id=message.request_id, error=error, field=field if error else None)

    def _info(self) -> messages.EngineInfo:
        names = ("max_model_len", "max_num_seqs", "num_blocks", "vocab_size", "max_loras")
        same: dict[str, Any] = {name: getattr(self.config, name) for name in names}
        own: dict[str, Any] = {"pid": self.config.pid or os.getpid(), "fingerprint": "fp_fake", "device": "fake"}
        return msgspec.structs.replace(ENGINE_INFO, **same, **own, dtype="none", kernels="none")

    def _add(self, identity: bytes, submit: messages.Submit) -> None:
        reply = next((r for p, r in self.config.replies if p == submit.prompt_token_ids), self.config.reply)
        if self._reply_to is not None:
            reply = self._reply_to(submit.prompt_token_ids)
        if self.config.endless:
            reply = reply * (submit.params.max_tokens // max(1, len(reply)) + 1)
        now = time.monotonic()
        has_weights = not submit.lora_name or submit.lora_fingerprint in self._weights
        for index in range(submit.n):
            choice = Running(identity, submit, index, now, [*reply, EOS_TOKEN_ID], has_weights=has_weights)
            self.waiting.append(choice)
        self.stats.prompt_tokens_total += len(submit.prompt_token_ids) * submit.n
        self.stats.prompt_tokens_cached_total += self.config.num_cached_tokens * submit.n
        self.stats.prefix_cache_queries_total += len(submit.prompt_token_ids)
        self.stats.prefix_cache_hits_total += self.config.num_cached_tokens

    def _abort(self, abort: messages.Abort) -> None:
        def is_aborted(choice: Running) -> bool:
            return choice.submit.request_id == abort.request_id and abort.index in (None, choice.index)

        self.running = [choice for choice in self.running if not is_aborted(choice)]
        self.waiting = [choice for choice in self.waiting if not is_aborted(choice)]

    def _step(self) -> None:
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            self.running.append(self.waiting.pop(0))
        events: dict[bytes, list[messages.TokenEvent]] = {}
        for choice in self.running:
            choice.num_steps += 1
            if choice.num_steps > self.config.num_prompt_steps:
                events.setdefault(choice.identity, []).append(self._token(choice))
        ended = {(e.request_id, e.index) for batch in events.values() for e in batch if e.finish_reason}
        self.running = [c for c in self.running if (c.submit.request_id, c.index) not in ended]
        self.stats.steps_total += 1
        self._send_outputs(events, num_step_tokens=sum(map(len, events.values())))
        self._next_step = time.monotonic() + self.config.step_seconds

    def _token(self, choice: Running) -> messages.TokenEvent:
        now = time.monotonic()
        params = choice.submit.params
        event = messages.TokenEvent(request_id=choice.submit.request_id, index=choice.index)
        if choice.scheduled is None:
            choice.scheduled = now
            event.num_cached_tokens = self.config.num_cached_tokens
        if self.config.fail_request or not choice.has_weights:
            event.error, event.finish_reason = "a secret of the engine", messages.FinishReason.ERROR
            return event
        if params.max_tokens == 0:
            event.finish_reason = messages.FinishReason.LENGTH
            event.embedding = _embedding(choice.submit.prompt_token_ids) if params.pooling else None
        else:
            self._take_token(choice, event, now)
        if params.prompt_logprobs is not None and choice.index == 0 and choice.num_output_tokens <= 1:
            event.prompt_logprobs = [_logprobs(t, params.prompt_logprobs) for t in choice.submit.prompt_token_ids[1:]]
        if event.finish_reason is not None:
            event.times = self.times(choice, now)
        return event

    def _take_token(self, choice: Running, event: messages.TokenEvent, now: float) -> None:
        params = choice.submit.params
        token_id = choice.reply.pop(0)
        choice.first_token = choice.first_token or now
        choice.num_output_tokens += 1
        event.token_ids = [token_id]
        self.stats.generation_tokens_total += 1
        if params.logprobs is not None:
            event.logprobs = [_logprobs(token_id, params.logprobs, params.logprob_token_ids)]
        if token_id in params.stop_token_ids or (token_id == EOS_TOKEN_ID and not params.ignore_eos):
            event.finish_reason = self.config.last_reason
            event.stop_token_id = token_id if event.finish_reason is messages.FinishReason.STOP else None
        elif choice.num_output_tokens == params.max_tokens or not choice.reply:
            event.finish_reason = messages.FinishReason.LENGTH

    def times(self, choice: Running, now: float | None) -> messages.RequestTimes:
        return messages.RequestTimes(
            arrival=choice.submit.arrival,
            queued=choice.queued,
            scheduled=choice.scheduled,
            first_token=choice.first_token,
            finished=now,
            num_prompt_tokens=len(choice.submit.prompt_token_ids),
            num_cached_tokens=self.config.num_cached_tokens,
            num_output_tokens=choice.num_output_tokens,
            num_chunks=1,
        )

    def _send_outputs(self, events: dict[bytes, list[messages.TokenEvent]], num_step_tokens: int = 0) -> None:
        self.stats.num_running = len(self.running)
        self.stats.num_waiting = len(self.waiting)
        self.stats.num_blocks_used = len(self.running)
        self.stats.running_adapters = _adapters_of(self.running)
        self.stats.waiting_adapters = _adapters_of(self.waiting)
        for identity in list(self._clients):
            outputs = messages.Outputs(
                stats=self.stats,
                events=events.get(identity, []),
                num_step_tokens=num_step_tokens,
                started=[choice.submit.request_id for choice in self.running if choice.identity == identity],
            )
            self._send(identity, outputs)
        self._last_sent = time.monotonic()

    def _send_to_all(self, message: messages.FromEngine) -> None:
        for identity in list(self._clients):
            self._send(identity, message)

    def _send(self, identity: bytes, message: messages.FromEngine) -> None:
        self._send_bytes(identity, self._encoder.encode(message))

    def _send_bytes(self, identity: bytes, content: bytes) -> None:
        try:
            self._socket.send_multipart([identity, content])
        except zmq.ZMQError:
            self._clients.discard(identity)


def _adapters_of(choices: list[Running]) -> list[str]:
    return list(dict.fromkeys(choice.submit.lora_name for choice in choices if choice.submit.lora_name))


def _embedding(token_ids: list[int]) -> list[float]:
    """Return a vector of norm 1 with 64 numbers: the first is 0.6, and one that depends on the prompt is 0.8."""
    embedding = [0.6] + [0.0] * 63
    embedding[1 + sum(token_ids) % 63] = 0.8
    return embedding


def _logprobs(token_id: int, num_alternatives: int, chosen: tuple[int, ...] = ()) -> messages.TokenLogprobs:
    """Return log probabilities -0.5, -1.5, -2.5 ... for the token, which comes first, and the next ids, or `chosen`."""
    top_token_ids = list(chosen) or [(token_id + k) % 256 for k in range(num_alternatives)]
    return messages.TokenLogprobs.pack(-0.5, 1, top_token_ids, [-0.5 - k for k in range(len(top_token_ids))])


class MortalEngine(FakeEngine):
    """A fake engine whose process, as its clients see it, is killed and replaced by another one."""

    def __enter__(self) -> Self:
        self._process = self._start_process()
        self.config.pid = self._process.pid
        return super().__enter__()

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        super().__exit__()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int:
        """That of the process, which ends."""
        return self._process.wait(60)

    def kill(self) -> None:
        """End the process, and forget what it had. Whoever watches it notices."""
        self._process.kill()
        self._process.wait()
        self._reset({"pid": self.pid})

    def replace(self, **changes: Any) -> int:
        """Start another process, with these changes of the configuration, and return its id."""
        self.kill()
        self._process = self._start_process()
        self._reset({"pid": self.pid} | changes)
        return self.pid

    def _start_process(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "1000"])


@contextmanager
def fake_engine_process(config: FakeEngineConfig) -> Iterator[subprocess.Popen[bytes]]:
    """Run a fake engine in a child process, which can be killed."""
    command = [sys.executable, "-m", "tests.support.fake_engine"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(config))
            process.stdin.close()
            yield process
        finally:
            process.kill()


if __name__ == "__main__":
    FakeEngine(msgspec.json.decode(sys.stdin.buffer.read(), type=FakeEngineConfig)).run()
