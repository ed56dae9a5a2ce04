"""The engine process: one loop that takes messages in, runs steps, and sends events out.

Each pass of the loop sends at most one message to each API process. The loop is its own watchdog: if a pass takes
longer than `step_timeout`, the stacks of all threads are written to stderr and the process exits.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import importlib.metadata
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import msgspec
import torch
import zmq

from engine.config import EngineConfig, EngineProcessConfig
from engine.core import Engine
from engine.loading import LoadedModel, Progress, load_model
from engine.lora.slots import AdapterGoneError, num_places
from engine.lora.updates import AdapterChanges
from engine.model.kv_cache import MIB
from engine.scheduling.record import StepClock
from engine.shared.logs import configure_logging
from engine.shared.messages import (
    HEARTBEAT_SECONDS,
    Abort,
    AdapterDone,
    Adapters,
    EngineInfo,
    EngineStats,
    FinishReason,
    FromEngine,
    LoadAdapter,
    Outputs,
    Ready,
    SamplingParams,
    Submit,
    ToEngine,
    TokenEvent,
    UnloadAdapter,
    Vocabulary,
)
from engine.shared.parent_death import die_with_parent

logger = logging.getLogger("lightwell.engine")

CHANGE_WAIT = 0.005  # seconds between looks at adapters that are being loaded, where nothing else is done
WARM_UP = SamplingParams(max_tokens=2, ignore_eos=True)
WARM_UP_SAMPLING = SamplingParams(  # by all passes of a sampler
    max_tokens=2, ignore_eos=True, temperature=1.0, top_p=0.9, repetition_penalty=1.1, logit_bias={0: 1.0}
)
FINGERPRINT_BYTES = 1024 * 1024  # read at the start, in the middle and at the end of each file of weights


class Clients:
    """The API processes: which there are, and who waits for which request."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        # A ROUTER drops what exceeds its high-water mark. What is in flight is bounded by admission instead.
        self.socket.set_hwm(0)
        self.socket.linger = 0
        self.socket.bind(address)
        self.identities: set[bytes] = set()
        self.owners: dict[str, tuple[bytes, set[int]]] = {}  # request id -> (API process, choices that have not ended)
        self.encoder = msgspec.msgpack.Encoder()
        self.decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

    def receive(self, timeout: float) -> list[tuple[bytes, ToEngine]]:
        """All messages that are there; waits up to `timeout` seconds for the first."""
        messages: list[tuple[bytes, ToEngine]] = []
        wait = int(timeout * 1000)
        while self.socket.poll(wait):
            identity, frame = self.socket.recv_multipart()
            messages.append((identity, self.decoder.decode(frame)))
            wait = 0
        return messages

    def send(self, identity: bytes, message: FromEngine) -> None:
        self.socket.send_multipart((identity, self.encoder.encode(message)))

    def send_outputs(self, events: list[TokenEvent], stats: EngineStats, num_step_tokens: int) -> None:
        """One message to each API process, with its own events."""
        by_identity: dict[bytes, list[TokenEvent]] = {identity: [] for identity in self.identities}
        for event in events:
            by_identity[self.owners[event.request_id][0]].append(event)
            if event.finish_reason is not None:
                self.forget(event.request_id, event.index)
        for identity, own_events in by_identity.items():
            self.send(identity, Outputs(stats=stats, events=own_events, num_step_tokens=num_step_tokens))

    def remember(self, identity: bytes, submit: Submit) -> None:
        self.owners[submit.request_id] = (identity, set(range(submit.n)))

    def forget(self, request_id: str, index: int | None) -> None:
        """A choice has ended (None: all have); unknown ones are ignored."""
        if request_id in self.owners:
            open_choices = self.owners[request_id][1]
            open_choices.difference_update(set(open_choices) if index is None else {index})
            if not open_choices:
                del self.owners[request_id]

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class EngineLoop:
    """Takes turns between the messages of the API processes and the steps of the engine."""

    def __init__(self, engine: Engine, info: EngineInfo, clients: Clients) -> None:
        self.engine = engine
        self.info = info
        self.clients = clients
        self.changes = AdapterChanges(engine.adapters, engine.model_config, engine.scheduler)
        self.refused: list[TokenEvent] = []  # of choices that never came to run

    def run(self, step_timeout: float) -> None:
        """For ever. Where there is nothing to do, it waits for messages and sends a heartbeat."""
        while True:
            faulthandler.dump_traceback_later(step_timeout + HEARTBEAT_SECONDS, exit=True)
            idle = CHANGE_WAIT if self.changes else HEARTBEAT_SECONDS
            self.turn(0.0 if self.engine.has_work else idle)

    def turn(self, timeout: float) -> None:
        """Messages in, at most one step, events out."""
        for identity, message in self.clients.receive(timeout):
            self.handle(identity, message)
        for identity, done in self.changes.advance():
            self.tell_of_adapters(identity, done)
        step, events = self.engine.step()
        refused, self.refused = self.refused, []
        self.clients.send_outputs(refused + events, self.engine.stats(), step.num_tokens if step else 0)

    def handle(self, identity: bytes, message: ToEngine) -> None:
        if isinstance(message, Submit):
            self.clients.remember(identity, message)
            self.add(message)
        elif isinstance(message, LoadAdapter | UnloadAdapter):
            if (refusal := self.changes.add(identity, message)) is not None:
                self.clients.send(identity, refusal)
        elif isinstance(message, Abort):
            self.engine.abort(message.request_id, message.index)
            self.clients.forget(message.request_id, message.index)
        elif isinstance(message, Vocabulary):
            self.engine.learn(message.tokenizer)
        else:
            self.clients.identities.add(identity)
            self.clients.send(identity, Ready(self.info, self.engine.adapters.loaded()))

    def add(self, submit: Submit) -> None:
        """The adapter may have gone, and others have come, while the request was on its way."""
        try:
            self.engine.add(submit)
        except AdapterGoneError:
            error = f"the LoRA adapter {submit.lora_name} is not loaded any more"
            for index in range(submit.n):
                event = TokenEvent(
                    request_id=submit.request_id, index=index, finish_reason=FinishReason.ERROR, error=error
                )
                self.refused.append(event)

    def tell_of_adapters(self, identity: bytes, done: AdapterDone) -> None:
        """All API processes which there are now, then the one that asked how it went."""
        for client in self.clients.identities:
            self.clients.send(client, Adapters(self.engine.adapters.loaded()))
        self.clients.send(identity, done)


def leave(_signal: int, _frame: FrameType | None) -> None:
    """On SIGTERM. The API process has drained before, so nobody waits for the step that runs."""
    raise SystemExit(0)


def engine_info(engine: Engine, loaded: LoadedModel, model_path: str) -> EngineInfo:
    deterministic = loaded.runner.kernels.deterministic
    return EngineInfo(
        pid=os.getpid(),
        max_model_len=loaded.limits.max_model_len,
        max_num_seqs=loaded.limits.max_num_seqs,
        block_size=loaded.memory.block_size,
        num_blocks=loaded.memory.num_blocks,
        vocab_size=loaded.config.num_token_ids,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        kernels=loaded.runner.kernels.name,
        deterministic=deterministic,
        fingerprint=fingerprint(model_path, loaded),
        max_loras=loaded.adapters.max_loras,
    )


def fingerprint(model_path: str, loaded: LoadedModel) -> str:
    """Names what the output depends on: weights, versions, device, number formats, kernels, whether promise 1 holds."""
    path = Path(model_path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:  # size, header, and some weights tell models apart, without reading all of a large one
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            for offset in (0, size // 2, max(0, size - FINGERPRINT_BYTES)):
                content.seek(offset)
                digest.update(content.read(FINGERPRINT_BYTES))
    version = importlib.metadata.version("lightwell")
    dtype = str(loaded.dtype).removeprefix("torch.")
    kernels = loaded.runner.kernels
    digest.update(
        f"{version} {loaded.device.type} {dtype} {kernels.name} {kernels.formats} {torch.__version__}".encode()
    )
    mode = "invariant" if kernels.deterministic else "varying"
    return f"lightwell-{version}-{dtype}-{mode}-{digest.hexdigest()[:12]}"


def log_plan(loaded: LoadedModel, config: EngineConfig) -> None:
    """One line each for model, device, number format and memory."""
    memory, shape = loaded.memory, loaded.config
    logger.info(
        "model: %s, %s, %d layers, %d of %d heads hold keys and values, context %d",
        Path(config.model_path).name,
        shape.architecture,
        shape.num_hidden_layers,
        shape.num_key_value_heads,
        shape.num_attention_heads,
        loaded.limits.max_model_len,
    )
    kernels = loaded.runner.kernels
    logger.info("device: %s, %d threads, kernels: %s", loaded.device, kernels.num_threads, kernels.name)
    invariant = "the same in any batch" if kernels.deterministic else "NOT the same in any batch"
    logger.info("formats: %s; answers are %s", kernels.formats, invariant)
    logger.info(
        "memory: weights %.0f MiB, KV cache %.0f MiB for %d tokens, which are %.1f requests of full length",
        loaded.weight_bytes / MIB,
        memory.kv_cache_bytes / MIB,
        memory.num_tokens,
        memory.num_full_length_requests,
    )
    adapters = loaded.adapters
    if adapters.max_loras:
        names = ", ".join(adapter.name for adapter in adapters.loaded()) or "none yet"
        size = (num_places(adapters.max_loras), adapters.max_rank, adapters.num_bytes / MIB)
        logger.info("LoRA adapters: %s; %d places of rank %d, %.0f MiB", names, *size)


def main() -> None:
    """Read `EngineProcessConfig` from standard input, load, and serve until SIGTERM. SIGINT is the supervisor's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(os.getppid())
    process_config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineProcessConfig)
    close_log = configure_logging(process_config.log_level, process_config.log_format)
    try:
        loop = start(process_config)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        logger.error("%s", error)
        close_log()
        sys.exit(1)
    try:
        loop.run(process_config.config.step_timeout)
    except Exception:
        logger.exception("the engine cannot go on")
        sys.exit(1)
    finally:
        faulthandler.cancel_dump_traceback_later()
        loop.clients.close()
        close_log()


def start(process_config: EngineProcessConfig) -> EngineLoop:
    """Load the model and get everything ready to run."""
    config = process_config.config
    clients = Clients(process_config.address)
    age = process_age()
    clock = StepClock()
    loaded = load_model(config, clock, progress_bar())
    # The kernels have threads of their own, and torch's would wait for work on the same cores.
    torch.set_num_threads(loaded.runner.kernels.num_torch_threads)
    warm_up(Engine(config, loaded), loaded.limits.max_model_len)  # its own books; the real ones start at zero
    clock.lap("warm-up")
    engine = Engine(config, loaded)
    log_plan(loaded, config)
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in {"imports": age, **clock.seconds}.items())
    logger.info("engine: ready after %.1f s: %s", process_age(), parts)
    loop = EngineLoop(engine, engine_info(engine, loaded, config.model_path), clients)
    signal.signal(signal.SIGTERM, leave)
    gc.collect()
    gc.freeze()  # what was loaded stays; the collector need not look at it again
    return loop


def process_age() -> float:
    """Seconds since this process was started."""
    with open("/proc/self/stat") as file:
        start_ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def warm_up(engine: Engine, max_model_len: int) -> None:
    """Generate a few tokens, so that what is done at the first call, as compiling, does not wait for a request."""
    num_tokens = min(engine.runner.kernels.num_warm_up_tokens, max_model_len - WARM_UP.max_tokens)
    for number, params in enumerate((WARM_UP, WARM_UP_SAMPLING)):
        submit = Submit(
            request_id=f"warm-up {number}",
            prompt_token_ids=[0] * max(1, num_tokens),
            params=params,
            arrival=time.monotonic(),
        )
        engine.add(submit)
    while engine.has_work:
        engine.step()


def progress_bar() -> Progress | None:
    """A bar on the terminal while weights are read; nothing where stderr is a file."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(TextColumn("weights"), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task("weights")
    bar.start()

    def advance(num_bytes_done: int, num_bytes: int) -> None:
        bar.update(task, completed=num_bytes_done, total=num_bytes)
        if num_bytes_done == num_bytes:
            bar.stop()

    return advance


if __name__ == "__main__":
    main()
