"""What `peers.py` measures: how each target is started, put under load, watched and stopped."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGKILL
from types import TracebackType
from typing import Self

import httpx
import msgspec
import psutil

from server.cli.bench import Report, make_report, run_benchmark
from server.cli.http_client import RemoteError, Usage
from server.cli.load_generator import Exchange, Load, make_prompts
from tests.bench.peers_setup import GGUF_NAME
from tests.bench.serve import free_port

ANSWER_SECONDS = 600.0  # to get ready, and for one workload of a target without HTTP
STOP_SECONDS = 30.0
WATCH_SECONDS = 0.5
MAX_NUM_SEQS = 32


class TargetError(Exception):
    """A target that gives no figures; the message is one line that says why."""


@dataclass(frozen=True)
class Target:
    name: str
    command: str  # {port} in it stands for where the target is to listen
    environment: Mapping[str, str] = field(default_factory=dict)
    is_peer: bool = True
    speaks_http: bool = True


def known_targets(folder: Path, *, is_sampled: bool) -> list[Target]:
    """The peers that `peers_setup.py` has installed, with as many threads as there are cores, and this checkout."""
    threads = len(os.sched_getaffinity(0))
    home, driver = shlex.quote(str(folder)), shlex.quote(str(Path(__file__).with_name("peers_openvino.py")))
    own = shlex.quote(str(Path(sys.executable).with_name("lightwell")))
    openvino = f"{home}/openvino/bin/python {driver} {home}/ov-int8 {MAX_NUM_SEQS}"
    llama = (
        f"{home}/llamacpp/bin/llama-server --model {home}/{GGUF_NAME} --port {{port}} --threads {threads} "
        f"--parallel {MAX_NUM_SEQS} --ctx-size {32 * 1024} --kv-unified"
    )
    if is_sampled:  # from all tokens, as the others do unasked
        llama += " --top-k 0 --top-p 1 --min-p 0"
    vllm = (
        f"{home}/vllm/bin/vllm serve {home}/hf --port {{port}} "
        "--max-model-len 2048 --max-num-seqs 64 --no-enable-prefix-caching"
    )
    return [
        Target("openvino", openvino, speaks_http=False),
        Target("llamacpp", llama),
        Target("vllm", vllm, {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(threads)}),
        Target("lightwell", f"{own} serve {home}/{GGUF_NAME} --port {{port}}", is_peer=False),
    ]


def own_target(text: str) -> Target:
    """From 'NAME=COMMAND with {port}'. Raises ValueError."""
    match = re.fullmatch(r"([\w.-]+)=(.*\{port\}.*)", text)
    if not match:
        raise ValueError(f"--ours takes NAME=COMMAND with {{port}} in COMMAND, not {text!r}")
    return Target(match[1], match[2], is_peer=False)


class Session(ABC):
    """A target whose process runs."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process = process
        self._log = log

    @abstractmethod
    def wait_until_ready(self) -> None:
        """Raises TargetError where the process ends before, or takes too long."""

    @abstractmethod
    def run(self, load: Load) -> Report:
        """Raises TargetError where there is nothing to report."""

    def explain(self, failure: str) -> str:
        """The failure, with the process's last words where it has ended or is about to."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1)
            lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            words = lines[-1][:200] if lines else "nothing said"
            return f"{failure}; the process ended with {code}: {words}"
        return failure


class HttpSession(Session):
    def __init__(self, process: "subprocess.Popen[str]", log: Path, port: int) -> None:
        super().__init__(process, log)
        self._url = f"http://127.0.0.1:{port}"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        with httpx.Client(trust_env=False) as client:
            while time.monotonic() < deadline and self.process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{self._url}/health").status_code == 200:
                        return
                time.sleep(0.05)
        raise TargetError("not ready")

    def run(self, load: Load) -> Report:
        try:
            return run_benchmark(replace(load, url=self._url))
        except RemoteError as error:
            raise TargetError(str(error)) from None


class _Answered(msgspec.Struct):
    """What `peers_openvino.py` says of one request."""

    start: float
    end: float
    chunks: list[tuple[float, int]]  # time, tokens
    num_prompt_tokens: int


class OpenVinoSession(Session):
    """`peers_openvino.py`, which gets its loads as lines of JSON."""

    def wait_until_ready(self) -> None:
        self._read()

    def run(self, load: Load) -> Report:
        prompts = make_prompts(load, load.seed, load.num_requests)
        fields = {"concurrency": load.concurrency, "output_len": load.output_len, "temperature": load.temperature}
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # `_read` will say so
            self.process.stdin.write(msgspec.json.encode({"prompts": prompts, **fields}).decode() + "\n")
            self.process.stdin.flush()
        exchanges = []
        for answered in msgspec.json.decode(self._read(), type=list[_Answered]):
            usage = Usage(answered.num_prompt_tokens, sum(count for _, count in answered.chunks))
            exchanges.append(Exchange(answered.start, answered.end, [*answered.chunks], usage))
        return make_report(load, "openvino", exchanges)

    def _read(self) -> str:
        assert self.process.stdout
        too_late = threading.Timer(ANSWER_SECONDS, self.process.kill)
        too_late.start()
        line = self.process.stdout.readline()
        too_late.cancel()
        if not line:
            raise TargetError("no answer")
        return line


@contextlib.contextmanager
def running(target: Target, log: Path) -> Iterator[tuple[Session, float]]:
    """A target that is ready, and the seconds that took. Raises TargetError where it does not start."""
    port = free_port()
    started = time.monotonic()
    process = _start(target, port, log)
    try:
        session = HttpSession(process, log, port) if target.speaks_http else OpenVinoSession(process, log)
        try:
            session.wait_until_ready()
        except TargetError as error:
            raise TargetError(session.explain(str(error))) from None
        yield session, time.monotonic() - started
    finally:
        _stop(process)


def _start(target: Target, port: int, log: Path) -> "subprocess.Popen[str]":
    pipe = subprocess.DEVNULL if target.speaks_http else subprocess.PIPE
    with log.open("w") as output:
        try:
            return subprocess.Popen(
                shlex.split(target.command.replace("{port}", str(port))),
                stdin=pipe,
                stdout=output if target.speaks_http else subprocess.PIPE,
                stderr=output,
                env=os.environ | target.environment,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            raise TargetError(f"cannot be started: {error}") from None


def _stop(process: "subprocess.Popen[str]") -> None:
    """The process, and then what it may have left behind: all are in one process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, SIGKILL)
    process.communicate()


class MemoryWatch:
    """The most memory (RSS) that a process and those under it held together while the context was open."""

    def __init__(self, pid: int) -> None:
        self.num_bytes = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        is_done = False
        while not is_done:
            is_done = self._done.wait(WATCH_SECONDS)
            self.num_bytes = max(self.num_bytes, self._measure())

    def _measure(self) -> int:
        num_bytes = 0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    num_bytes += process.memory_info().rss
        return num_bytes
