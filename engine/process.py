"""The engine process: a loop that receives messages, runs steps, and sends events.

Each iteration sends at most one message to each API process. If one takes longer than `step_timeout`, the stacks of
all threads are written to stderr. Whether it hangs or only got no CPU is for the API process to judge.
"""

from __future__ import annotations

import errno
import faulthandler
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import FrameType
from typing import Any

import msgspec
import torch

from engine.api_connections import ApiConnections, Damaged
from engine.config import EngineProcessConfig
from engine.core import BrokenDeviceError, Engine
from engine.loading import AdapterGoneError, load_model
from engine.model.memory_plan import is_out_of_memory
from engine.scheduling.lifecycle import COULD_NOT_COMPUTE
from engine.scheduling.record import StepClock
from engine.shared.launcher import collect_garbage, die_with_parent
from engine.shared.logs import configure_logging
from engine.shared.messages import (
    HEARTBEAT_SECONDS,
    Abort,
    EngineInfo,
    FinishReason,
    FromEngine,
    Hello,
    Ready,
    Submit,
    ToEngine,
    TokenEvent,
    Vocabulary,
)
from engine.shared.parts import ENGINE_PARTS, engine_part, has_part
from engine.startup import capture_graphs, engine_info, log_plan, process_age, progress_bar, warm_up

logger = logging.getLogger("lightwell.engine")

LOOP_PARTS = ("inspection", "lora")  # which have something to do between steps
UNREADABLE = "the request cannot be read"
REFUSAL_SECONDS = 1.0  # for an API process to connect that learns why there is no engine
POLL_SECONDS = 0.005  # between calls of what is `polled`, if the engine is idle, and checks of unsent messages


class EngineLoop:
    """Alternates between the messages of the API processes and the steps of the engine."""

    def __init__(self, engine: Engine, info: EngineInfo, connections: ApiConnections) -> None:
        self.engine = engine
        self.info = info
        self.connections = connections
        self.clock = engine.clock
        self.last_work = self.clock()  # when there was something to do other than what is in `not_work`
        self.refused: list[TokenEvent] = []  # of choices that were refused before they were queued
        # What parts add to:
        self.handlers: dict[type, Callable[[bytes, Any], None]] = {
            Hello: self.greet,
            Submit: self.add,
            Abort: self.abort,
            Vocabulary: self.set_tokenizer,
            Damaged: self.end,
        }
        self.not_work: set[type] = set()  # messages that do not keep an idle engine from its preparations
        self.unreadable: dict[str, Callable[[bytes, Damaged], None]] = {}  # by the names of messages
        self.polled: list[Callable[[], None]] = []  # called before each step, and when there is none, as long as listed
        self.queue: deque[Callable[[], None]] = deque()  # of which one is called before each step
        self.after_step: list[Callable[[float | None], None]] = []  # called with the seconds of each step, or of none
        for name in LOOP_PARTS:
            if has_part(ENGINE_PARTS, name):
                engine_part(name, "loop").attach(self)

    def run(self, step_timeout: float) -> None:
        """Loop forever. If there is nothing to compute, wait for messages and send a heartbeat each second."""
        armed = -HEARTBEAT_SECONDS
        while True:
            if time.monotonic() >= armed + HEARTBEAT_SECONDS:  # not each time: it starts a thread
                armed = time.monotonic()
                faulthandler.dump_traceback_later(step_timeout + 2 * HEARTBEAT_SECONDS)
            self.run_once(self.seconds_to_wait())

    def seconds_to_wait(self) -> float:
        """Return for how long to wait for messages before the next step, which is not computed while one is unsent."""
        if self.connections.unsent:
            return POLL_SECONDS
        if self.engine.has_work or self.queue or self.after_step:
            return 0.0
        return POLL_SECONDS if self.polled else HEARTBEAT_SECONDS

    def run_once(self, timeout: float) -> None:
        """Receive messages, run at most one step and what parts have to do before and after it, and send its events.

        Wait up to `timeout` seconds for a message.
        """
        messages = self.connections.receive(timeout)
        for identity, message in messages:
            self.handle(identity, message)
        if self.engine.has_work or not all(type(message) in self.not_work for _, message in messages):
            self.last_work = self.clock()
        may_prepare = self.clock() >= self.last_work + HEARTBEAT_SECONDS or not messages
        if timeout == HEARTBEAT_SECONDS and may_prepare:  # there was nothing to do
            self.engine.grammars.prepare()
            self.engine.runner.capture_next()
        for poll in tuple(self.polled):
            poll()
        if self.connections.unsent and not self.connections.flush():
            return  # what is computed now would have to be kept
        if self.queue:
            self.queue.popleft()()
        started_at = self.clock()
        step, events = self.engine.step()
        step_seconds = self.clock() - started_at if self.engine.has_work or step else None
        refused, self.refused = self.refused, []
        num_tokens, started = (step.num_tokens, step.started) if step else (0, [])
        pool = self.engine.scheduler.pool
        prefixes: tuple[list[bytes], list[bytes]] = pool.take_changes() if pool.changes else ([], [])
        stats = self.engine.scheduler.current_stats()
        aborts = self.connections.send_outputs(refused + events, stats, num_tokens, started, prefixes)
        for abort in aborts:  # what could not be sent, or whose API process has gone
            self.engine.abort(abort.request_id, abort.index)
        for act in tuple(self.after_step):
            act(step_seconds)

    def handle(self, identity: bytes, message: ToEngine | Damaged) -> None:
        """Act on a message of the API process `identity`."""
        kind = type(message)
        if kind is not Hello and identity not in self.connections.identities:
            logger.error("a message of an API process is dropped, since its connection was not announced")
        elif kind in self.handlers:
            self.handlers[kind](identity, message)
        else:
            logger.error("a message of an API process is dropped: the engine lacks the part for %s", kind.__name__)

    def greet(self, identity: bytes, _hello: Hello) -> None:
        """Tell a new API process about the engine."""
        self.connections.identities.add(identity)
        pool = self.engine.scheduler.pool
        prefixes = [] if pool.changes is None else pool.prefix_names()
        self.connections.send(identity, Ready(self.info, self.engine.adapters.loaded(), prefixes))

    def abort(self, _identity: bytes, abort: Abort) -> None:
        """End a choice or all choices of a request."""
        self.engine.abort(abort.request_id, abort.index)
        self.connections.forget(abort.request_id, abort.index)

    def set_tokenizer(self, _identity: bytes, vocabulary: Vocabulary) -> None:
        """Set the tokenizer that grammars need."""
        self.engine.grammars.set_tokenizer(vocabulary.tokenizer)

    def reply(self, identity: bytes, answer: FromEngine) -> None:
        """Send an answer to the API process that asked, unless it has gone."""
        if identity in self.connections.identities:
            self.connections.send(identity, answer)

    def end(self, identity: bytes, damaged: Damaged) -> None:
        """End the request that an unreadable message is about."""
        if damaged.type in self.unreadable:
            self.unreadable[damaged.type](identity, damaged)
        elif choices := self.connections.open_choices(identity, damaged):
            self.engine.abort(damaged.request_id)
            self.refuse(damaged.request_id, choices, UNREADABLE)

    def add(self, identity: bytes, submit: Submit) -> None:
        """Queue a request. It is refused if its adapter was unloaded or replaced while the request was on its way."""
        self.connections.remember(identity, submit)
        try:
            self.engine.add(submit)
        except AdapterGoneError:
            problem = f"the LoRA adapter {submit.lora_name} is no longer loaded"
            self.refuse(submit.request_id, range(submit.n), problem)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:  # a panic of a library in Rust is no Exception
            logger.exception("request %s cannot be queued", submit.request_id)
            self.engine.abort(submit.request_id)
            self.refuse(submit.request_id, range(submit.n), COULD_NOT_COMPUTE)

    def refuse(self, request_id: str, choices: Iterable[int], error: str) -> None:
        """End choices of a request that is not queued."""
        for index in choices:
            event = TokenEvent(request_id=request_id, index=index, finish_reason=FinishReason.ERROR, error=error)
            self.refused.append(event)


def leave(_signal: int, _frame: FrameType | None) -> None:
    """Exit on SIGTERM. The API processes have drained before, so no client waits for the step in flight."""
    raise SystemExit(0)


def main() -> None:
    """Read `EngineProcessConfig` from standard input, load the model, and serve until SIGTERM.

    SIGINT is ignored: the supervisor handles it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(os.getppid())
    process_config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineProcessConfig)
    config = process_config.config
    label = f" {config.data_parallel_rank}" if config.data_parallel_size > 1 else ""
    close_log = configure_logging(process_config.log_level, process_config.log_format, label=label)
    exit_code = run(process_config, partial(end_with_rank, close_log))
    close_log()
    os._exit(exit_code)  # sys.exit would take the interpreter and torch apart for half a second


def end_with_rank(close_log: Callable[[], None], what: str) -> None:
    """End this process after a rank has ended: a step that waits for it cannot be stopped in another way."""
    logger.error("the engine cannot go on: %s", what)
    close_log()
    os._exit(1)


def run(process_config: EngineProcessConfig, on_rank_death: Callable[[str], None]) -> int:
    """Serve until SIGTERM or a failure. Return the exit code. `on_rank_death`: see `Leader`."""
    connections = ApiConnections(process_config.address)
    try:
        loop = start(process_config, connections, on_rank_death)
    except Exception as error:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            reason = f"there is not enough memory to load the model: {str(error) or type(error).__name__}"
        elif isinstance(error, ValueError | OSError | BrokenDeviceError):
            reason = str(error)
        else:
            raise
        logger.error("%s", reason)
        connections.refuse(reason, REFUSAL_SECONDS)
        connections.close()
        return 1
    try:
        loop.run(process_config.config.step_timeout)
    except SystemExit:  # of `leave`
        return 0
    except BrokenDeviceError as error:
        logger.error("the engine cannot go on: %s", error)
    except Exception:
        logger.exception("the engine cannot go on")
    finally:
        faulthandler.cancel_dump_traceback_later()
        loop.connections.close()
    return 1


def start(
    process_config: EngineProcessConfig, connections: ApiConnections, on_rank_death: Callable[[str], None]
) -> EngineLoop:
    """Load the model, warm it up, and return the loop, ready to run."""
    config = process_config.config
    age = process_age()
    clock = StepClock()
    shows_progress = config.data_parallel_rank == 0  # bars of several processes would overwrite each other
    progress = progress_bar("weights", is_bytes=True) if shows_progress else None
    if config.tensor_parallel_size == 1:
        loaded = load_model(config, clock, progress)
    else:
        loaded = engine_part("distributed", "rank").load(process_config, on_rank_death, clock, progress)
    # The kernels have their own threads. Torch's threads would busy-wait on the same cores.
    torch.set_num_threads(loaded.runner.kernels.num_torch_threads)
    warm_up(Engine(config, loaded), loaded.limits.max_model_len)  # a separate engine, so that statistics start at zero
    clock.lap("warm-up")
    if loaded.runner.execution.uncaptured:
        capture_graphs(loaded.runner, progress_bar("CUDA graphs", is_bytes=False) if shows_progress else None)
        clock.lap("CUDA graphs")
    engine = Engine(config, loaded)
    log_plan(loaded, config)
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in {"imports": age, **clock.seconds}.items())
    logger.info("engine: ready after %.2f s: %s", process_age(), parts)
    loop = EngineLoop(engine, engine_info(loaded, config.model_path), connections)
    signal.signal(signal.SIGTERM, leave)
    collect_garbage()
    return loop


if __name__ == "__main__":
    main()
