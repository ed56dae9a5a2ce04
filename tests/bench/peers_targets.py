"""The targets of `peers.py`: how each is started, put under load, watched and stopped."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGKILL

import msgspec
import psutil

from server.cli.parser import CommandError
from server.parts.bench.bench import Exchange, Report, make_prompts, make_report, run_benchmark
from server.parts.bench.commands import LoadOptions
from tests.bench.peers_setup import ModelFiles
from tests.bench.serve import READY_SECONDS, free_port, wait_until_ready

STOP_SECONDS = 30.0
MAX_NUM_SEQS = 32


class TargetError(RuntimeError):
    """A target cannot be measured. The message is one line with the reason."""


@dataclass(frozen=True)
class Target:
    name: str
    command: str  # {port} is replaced by the port to listen on
    environment: Mapping[str, str] = field(default_factory=dict)
    is_peer: bool = True
    speaks_http: bool = True
    gguf: Path | None = None  # the file whose weights it reads


def installed_targets(folder: Path, files: ModelFiles, *, is_sampled: bool, speculates: bool) -> list[Target]:
    """Return the peers that `peers_setup.py` installs, with one thread per core, and this checkout."""
    threads = len(os.sched_getaffinity(0))
    home, driver = shlex.quote(str(folder)), shlex.quote(str(Path(__file__).with_name("peers_openvino.py")))
    own, gguf = shlex.quote(str(Path(sys.executable).with_name("lightwell"))), shlex.quote(str(files.gguf))
    openvino = f"{home}/openvino/bin/python {driver} {shlex.quote(str(files.openvino))} {MAX_NUM_SEQS}"
    llama = (
        f"{home}/llamacpp/bin/llama-server --model {gguf} --port {{port}} --threads {threads} "
        f"--parallel {MAX_NUM_SEQS} --ctx-size {32 * 1024} --kv-unified"
    )
    if is_sampled:  # from all tokens, which is the default of the others
        llama += " --top-k 0 --top-p 1 --min-p 0"
    vllm = (
        f"{home}/vllm/bin/vllm serve {shlex.quote(str(files.huggingface))} --port {{port}} "
        "--max-model-len 2048 --max-num-seqs 64 --no-enable-prefix-caching"
    )
    lightwell = f"{own} serve {gguf} --port {{port}}" + ("" if speculates else " --speculative off")
    return [
        Target("openvino", openvino, speaks_http=False),
        Target("llamacpp", llama, gguf=files.gguf),
        Target("vllm", vllm, {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(threads)}),
        Target("lightwell", lightwell, is_peer=False, gguf=files.gguf),
    ]


def own_target(text: str, files: ModelFiles) -> Target:
    """Parse 'NAME=COMMAND with {port}', and replace {model} by the GGUF file. Raises ValueError."""
    match = re.fullmatch(r"([\w.-]+)=(.*\{port\}.*)", text)
    if not match:
        raise ValueError(f"--ours: expected NAME=COMMAND with {{port}} in COMMAND, got {text!r}")
    command = match[2].replace("{model}", shlex.quote(str(files.gguf)))
    return Target(match[1], command, is_peer=False, gguf=files.gguf if "{model}" in match[2] else None)


class Session:
    """A running target, by default one that speaks HTTP."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path, port: int) -> None:
        self.process = process
        self._log = log
        self._url = f"http://127.0.0.1:{port}"

    def wait_until_ready(self) -> None:
        """Wait until the target accepts requests. Raises RuntimeError if its process exits or takes too long."""
        wait_until_ready(f"{self._url}/health", self.process)

    def run(self, load: LoadOptions) -> Report:
        """Run one load. Raises TargetError if it fails as a whole."""
        try:
            return run_benchmark(replace(load, url=self._url))
        except CommandError as error:
            raise TargetError(str(error)) from None

    def explain(self, failure: str) -> str:
        """Return the failure, with the exit status and last log line of the process if it exits within a second."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1)
            lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            return f"{failure}; the process exited with status {code}: {lines[-1][:200] if lines else 'no output'}"
        return failure


class OpenVinoSession(Session):
    """A process of `peers_openvino.py`, which reads loads as lines of JSON."""

    def wait_until_ready(self) -> None:
        self._read()

    def run(self, load: LoadOptions) -> Report:
        prompts = make_prompts(load, load.seed, load.num_requests)
        fields = {"concurrency": load.concurrency, "output_len": load.output_len, "temperature": load.temperature}
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # `_read` raises the error
            self.process.stdin.write(msgspec.json.encode({"prompts": prompts, **fields}).decode() + "\n")
            self.process.stdin.flush()
        return make_report(load, "openvino", msgspec.json.decode(self._read(), type=list[Exchange]))

    def _read(self) -> str:
        assert self.process.stdout
        timeout = threading.Timer(READY_SECONDS, self.process.kill)
        timeout.start()
        line = self.process.stdout.readline()
        timeout.cancel()
        if not line:
            raise TargetError("no answer")
        return line


@contextlib.contextmanager
def running(target: Target, log: Path) -> Iterator[tuple[Session, float]]:
    """Start a target; yield it and the seconds until it was ready. Raises TargetError if it does not start.

    At the end, stop its process, and then any processes that it left in its process group.
    """
    port = free_port()
    started = time.monotonic()
    with log.open("w") as output:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        if target.speaks_http:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": output}
        command, environment = shlex.split(target.command.replace("{port}", str(port))), os.environ | target.environment
        try:
            process = subprocess.Popen(
                command, stderr=output, env=environment, text=True, start_new_session=True, **pipes
            )
        except OSError as error:
            raise TargetError(f"cannot be started: {error}") from None
    try:
        session = (Session if target.speaks_http else OpenVinoSession)(process, log, port)
        try:
            session.wait_until_ready()
        except RuntimeError as error:
            raise TargetError(session.explain(str(error))) from None
        yield session, time.monotonic() - started
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, SIGKILL)
        process.communicate()


def memory_of(pid: int) -> int:
    """Return the memory (RSS) of a process and its descendants in bytes."""
    num_bytes = 0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                num_bytes += process.memory_info().rss
    return num_bytes
