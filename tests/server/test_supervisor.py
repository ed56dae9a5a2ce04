"""Tests of the supervisor with stub children: real processes and signals, and every way to end."""

import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import psutil
import pytest

from engine.config import EngineConfig, EngineProcessConfig
from server import running_servers, supervisor
from server.model_paths import ModelError, ResolvedModel
from server.processes import child_process, model_files, supervised_api, supervised_engine
from server.processes.child_process import Child, SupervisorError
from server.processes.stop_signals import StopSignals
from server.processes.supervisor_channel import (
    HEARTBEAT_SECONDS,
    Channel,
    EngineGone,
    EngineStarted,
    Heartbeat,
    Message,
    StartEngine,
    StopEngine,
    make_channel,
)
from server.settings.process_configs import ApiProcessConfig, EngineProcess
from server.settings.setting import SettingsError
from server.settings.table import Settings
from server.sockets.listeners import bind_unix
from server.sockets.socket_folder import MAX_PATH_BYTES
from tests.support.clients import write_adapter
from tests.support.paths import ROOT
from tests.support.processes import is_running, wait_for_end_of
from tests.support.serving import wait_until

STUB = ROOT / "tests" / "support" / "stub_child.py"
ENGINE_CONFIG = EngineProcessConfig(address="", config=EngineConfig(model_path=""))

# Runs a supervisor with short timeouts and stub children. Fails if it has imported a heavy module.
DRIVER = """
import json, sys
from server import running_servers, supervisor
from server.processes import supervised_engine
from server.settings.table import Settings
settings, grace, stop, engine, api, delays = json.loads(sys.argv[1])
supervised_engine.RESTART_DELAYS = delays
supervisor.DEATH_GRACE_SECONDS, supervisor.DRAIN_GRACE_SECONDS, supervisor.STOP_SECONDS = grace, stop, stop
status = supervisor.supervise(Settings(**settings), supervisor.Commands(engine=engine, api=api))
heavy = [name for name in ("torch", "numpy", "fastapi", "pydantic", "httpx", "zmq", "rich") if name in sys.modules]
assert not heavy, heavy
sys.exit(status)
"""


class Running:
    """A supervisor in its own process."""

    def __init__(
        self,
        folder: Path,
        temporary: str,
        engine: tuple[str, ...],
        api: tuple[str, ...],
        grace: float,
        stop: float,
        delays: tuple[float, ...],
        **settings: Any,
    ) -> None:
        """`stop`: seconds after which a child is killed that has been asked to end."""
        self.folder = folder
        model = folder / "model.gguf"
        model.write_bytes(b"GGUF")
        commands = [[sys.executable, str(STUB), str(folder), *child] for child in (("engine", *engine), ("api", *api))]
        arguments = json.dumps(
            [{"model": str(model), "drain_timeout": 0.5, **settings}, grace, stop, *commands, delays]
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": temporary, "PYTHONPATH": str(ROOT)},
        )

    def pid(self, name: str) -> int:
        return int(self.wait_for(self.folder / f"{name}.pid").read_text())

    def wait_for(self, path: Path) -> Path:
        deadline = time.monotonic() + 10
        while not path.exists():
            assert time.monotonic() < deadline, f"no {path.name}"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)
        return path

    def signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def end(self, within: float = 30.0) -> tuple[int, list[str]]:
        """Wait for the end and return the exit status and the lines of stderr. Fail after `within` seconds."""
        started = time.monotonic()
        output, errors = self.process.communicate(timeout=within + 5)
        assert time.monotonic() - started < within
        assert output == ""
        return self.process.returncode, errors.splitlines()

    def assert_nothing_is_left(self) -> None:
        for file in self.folder.glob("*.pid"):
            assert not is_running(int(file.read_text())), file.stem
        if (self.folder / "engine.json").exists():
            config = msgspec.json.decode((self.folder / "engine.json").read_bytes(), type=EngineProcessConfig)
            assert not Path(config.address.removeprefix("ipc://")).parent.exists()


Start = Callable[..., Running]


@pytest.fixture
def temporary() -> Iterator[str]:
    """The folder for temporary files of supervisors. Its path is short, since socket paths are limited."""
    with tempfile.TemporaryDirectory(prefix="lw-") as folder:
        yield folder


@pytest.fixture
def start(tmp_path: Path, temporary: str) -> Iterator[Start]:
    running: list[Running] = []

    def start_one(
        engine: tuple[str, ...] = ("run",),
        api: tuple[str, ...] = ("run",),
        grace: float = 0.6,
        stop: float = 60.0,
        delays: tuple[float, ...] = supervised_engine.RESTART_DELAYS,
        **settings: Any,
    ) -> Running:
        running.append(Running(tmp_path, temporary, engine, api, grace, stop, delays, **settings))
        return running[-1]

    yield start_one
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def test_the_timeouts_add_up_to_less_than_five_seconds() -> None:
    """The supervisor exits within five seconds of a death, or of the end of --drain-timeout."""
    after_death = supervisor.DEATH_GRACE_SECONDS + supervisor.STOP_SECONDS
    after_drain = supervisor.DRAIN_GRACE_SECONDS + supervisor.STOP_SECONDS
    assert max(after_death, after_drain) <= 4.5


def test_children_get_their_configuration(start: Start) -> None:
    running = start(api_key=["k"], served_model_name=[], seed=3, max_num_seqs=7, log_format="json")
    engine_pid, api_pid = running.pid("engine"), running.pid("api")
    engine = msgspec.json.decode((running.folder / "engine.json").read_bytes(), type=EngineProcessConfig)
    api = msgspec.json.decode((running.folder / "api.json").read_bytes(), type=ApiProcessConfig)
    assert engine.config.max_num_seqs == 7
    (model,) = api.models
    assert engine.config.model_path == model.path == str(running.folder / "model.gguf")
    assert engine.log_format == "json"
    assert model.engines == (EngineProcess(engine.address, engine_pid),)
    assert model.names == ("model.gguf",)
    assert api.settings.api_key == ("k",)
    assert api.settings.seed == 3

    socket = Path(engine.address.removeprefix("ipc://"))
    assert len(os.fsencode(socket)) <= MAX_PATH_BYTES
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    for pid in (engine_pid, api_pid):
        assert os.getpgid(pid) == pid  # so Ctrl-C in the terminal does not reach it
        assert psutil.Process(pid).ppid() == running.process.pid
        assert "k" not in psutil.Process(pid).cmdline()

    running.signal(signal.SIGTERM)
    assert running.end() == (0, [])
    running.assert_nothing_is_left()


def test_several_engines_have_addresses_and_cpus_of_their_own(start: Start) -> None:
    running = start(data_parallel_size=2)
    api, *engines = (running.pid(name) for name in ("api", "engine", "engine-1"))
    (model,) = msgspec.json.decode((running.folder / "api.json").read_bytes(), type=ApiProcessConfig).models
    assert [Path(engine.address).name for engine in model.engines] == ["engine-0.sock", "engine-1.sock"]
    assert [engine.pid for engine in model.engines] == engines
    first, second = (psutil.Process(engine.pid) for engine in model.engines)
    cpus = os.sched_getaffinity(0)
    if len(cpus) > 1:
        assert {*first.cpu_affinity(), *second.cpu_affinity()} == cpus
        assert not set(first.cpu_affinity()) & set(second.cpu_affinity())
    assert psutil.Process(api).cpu_affinity() == sorted(cpus)
    for rank, name in enumerate(("engine", "engine-1")):
        process = msgspec.json.decode((running.folder / f"{name}.json").read_bytes(), type=EngineProcessConfig)
        assert (process.config.data_parallel_size, process.config.data_parallel_rank) == (2, rank)
    running.signal(signal.SIGTERM)
    assert running.end() == (0, [])
    running.assert_nothing_is_left()


def socket_of(pid: int, fd: int) -> str:
    return os.readlink(f"/proc/{pid}/fd/{fd}")


def test_several_api_processes_are_linked(start: Start) -> None:
    running = start(api_server_count=3)
    names = ("api", "api-1", "api-2")
    pids = [running.pid(name) for name in names]
    coordinator, *workers = [
        msgspec.json.decode((running.folder / f"{name}.json").read_bytes(), type=ApiProcessConfig) for name in names
    ]
    assert coordinator.coordinator is None
    assert [Path(link.address).name for link in coordinator.workers] == ["api-1.sock", "api-2.sock"]
    held = {os.readlink(file) for file in Path(f"/proc/{running.process.pid}/fd").iterdir()}
    passed = []
    for pid, worker, link in zip(pids[1:], workers, coordinator.workers, strict=True):
        assert worker.workers == ()
        assert worker.coordinator is not None
        assert worker.coordinator.address == link.address
        passed += [socket_of(pids[0], link.sockets_fd), socket_of(pid, worker.coordinator.sockets_fd)]
    assert all(each.startswith("socket:") for each in passed)
    assert len(set(passed)) == 4
    assert held.isdisjoint(passed)
    assert {psutil.Process(pid).ppid() for pid in pids} == {running.process.pid}
    running.signal(signal.SIGTERM)
    assert running.end() == (0, [])
    running.assert_nothing_is_left()


def test_a_signal_drains_all_api_processes_at_once(start: Start) -> None:
    running = start(api=("drain", "0.3"), api_server_count=3)
    names = ("api", "api-1", "api-2")
    for name in names:
        running.pid(name)
    running.signal(signal.SIGTERM)
    for name in names:
        running.pid(f"{name}-end")
    assert running.end() == (0, [])
    running.assert_nothing_is_left()


@pytest.mark.parametrize(("name", "title"), [("api", "API 0"), ("api-2", "API 2")])
def test_the_death_of_an_api_process_ends_all(start: Start, name: str, title: str) -> None:
    running = start(api=("drain", "0"), api_server_count=3)
    for each in ("engine", "api", "api-1", "api-2"):
        running.pid(each)
    os.kill(running.pid(name), signal.SIGKILL)
    assert running.end() == (1, [f"lightwell: error: the {title} process was killed by SIGKILL"])
    assert (running.folder / "api-1-end.pid").exists()  # it was asked to end
    running.assert_nothing_is_left()


def test_an_api_process_that_hangs_ends_all(start: Start) -> None:
    running = start(api=("beat",), api_server_count=2, step_timeout=0.5)
    running.pid("api")
    worker = running.pid("api-1")
    time.sleep(1)
    os.kill(worker, signal.SIGSTOP)
    status, lines = running.end(within=20.0)
    assert (status, lines) == (1, ["lightwell: error: the API 1 process has not responded for more than 3.5 s"])
    running.assert_nothing_is_left()


def test_the_death_of_the_last_engine_ends_all_api_processes(start: Start) -> None:
    running = start(api=("outlive-engine", "0.2"), api_server_count=2, grace=60.0)
    running.pid("api"), running.pid("api-1")
    os.kill(running.pid("engine"), signal.SIGKILL)
    assert running.end() == (1, ["lightwell: error: the engine process was killed by SIGKILL"])
    assert all((running.folder / f"{name}-end.pid").exists() for name in ("api", "api-1"))
    running.assert_nothing_is_left()


def test_an_api_process_that_cannot_be_started(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    wait = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(SupervisorError, match=r"cannot start the API 0 process: .*No such file"):
        supervisor.supervise(
            Settings(model=str(model), api_server_count=2), supervisor.Commands(engine=wait, api=["/nonexistent"])
        )


def test_served_model_names(start: Start) -> None:
    running = start(served_model_name=["a", "b"])
    running.pid("api")
    (model,) = msgspec.json.decode((running.folder / "api.json").read_bytes(), type=ApiProcessConfig).models
    assert model.names == ("a", "b")


def test_the_sampling_of_an_alias_is_passed_on() -> None:
    resolved = ResolvedModel(Path("/m.gguf"), "m", {"temperature": 0.2})
    model = model_files.ModelOnDisk(Settings(), resolved, ("m",), {})
    assert model_files.api_model_config(model, ()).card_sampling == {"temperature": 0.2}


def test_adapters_are_resolved_before_the_engine_starts(start: Start, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "sql")
    running = start(lora_modules=[f"sql={adapter}/"], max_lora_rank=8)
    running.pid("engine")
    engine = msgspec.json.decode((running.folder / "engine.json").read_bytes(), type=EngineProcessConfig)
    assert engine.config.lora_modules == {"sql": str(adapter)}
    assert (engine.config.max_loras, engine.config.max_lora_rank) == (8, 8)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("sql=/nothing/there", "--lora-modules sql: adapter '/nothing/there' is neither"),
        ("model.gguf=/nothing", "--lora-modules: model.gguf is the name of the model"),
    ],
)
def test_invalid_adapters_are_rejected(tmp_path: Path, module: str, message: str) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    with pytest.raises((ModelError, SettingsError), match=message):
        supervisor.supervise(Settings(model=str(model), lora_modules=(module,)))


def test_an_idle_supervisor_uses_no_cpu(start: Start) -> None:
    running = start()
    running.pid("engine"), running.pid("api")
    time.sleep(0.2)
    process = psutil.Process(running.process.pid)
    before, switches = process.cpu_times(), process.num_ctx_switches().voluntary
    time.sleep(1.0)
    after = process.cpu_times()
    assert (after.user, after.system) == (before.user, before.system)
    assert process.num_ctx_switches().voluntary == switches
    assert process.num_threads() == 1
    assert process.memory_info().rss < 60e6


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_and_ends_with_0(start: Start, signum: int) -> None:
    running = start(engine=("drain", "0"), api=("drain", "0.3"))
    running.pid("engine"), running.pid("api")
    running.signal(signum)
    running.pid("api-end")
    assert is_running(running.pid("engine"))
    assert not (running.folder / "engine-end.pid").exists()  # the engine is stopped last
    assert running.end() == (0, [])
    assert (running.folder / "engine-end.pid").exists()
    running.assert_nothing_is_left()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.yaml"
    file.write_text(f"alice: {{keys: {'0' * 64}}}")
    return file


def test_with_a_keys_file_a_hangup_reaches_the_api_process_alone(start: Start, keys_file: Path) -> None:
    running = start(api=("reload", "0.5"), api_keys_file=str(keys_file))
    running.wait_for(running.folder / "api.json")
    running.signal(signal.SIGHUP)  # waits until the process is ready for it
    for _ in range(3):
        running.wait_for(running.folder / "api-reload.pid").unlink()
        running.signal(signal.SIGHUP)
    running.wait_for(running.folder / "api-reload.pid")
    assert is_running(running.pid("engine"))
    running.signal(signal.SIGTERM)  # is no echo of the hangup
    assert running.end() == (0, [])
    running.assert_nothing_is_left()


def test_a_hangup_reaches_all_api_processes(start: Start, keys_file: Path) -> None:
    running = start(api=("reload",), api_server_count=2, api_keys_file=str(keys_file))
    running.pid("api"), running.pid("api-1")
    running.signal(signal.SIGHUP)
    running.pid("api-reload"), running.pid("api-1-reload")
    running.signal(signal.SIGTERM)
    assert running.end() == (0, [])


def test_a_bad_keys_file_is_found_before_the_model(monkeypatch: pytest.MonkeyPatch, keys_file: Path) -> None:
    keys_file.write_text("alice: {keys: secret}")
    monkeypatch.setattr(model_files, "resolve_model", lambda *_: pytest.fail("the model was resolved first"))
    with pytest.raises(SettingsError, match=r"keys.yaml: alice: keys: expected .* hashes"):
        supervisor.supervise(Settings(api_keys_file=str(keys_file)))


def test_an_api_that_does_not_stop_is_killed_after_the_drain_timeout(start: Start) -> None:
    running = start(api=("ignore",), stop=0.3)
    running.pid("engine"), running.pid("api")
    started = time.monotonic()
    running.signal(signal.SIGTERM)
    status, lines = running.end()
    assert time.monotonic() - started > 0.85
    assert (status, lines) == (1, ["lightwell: error: the API process was killed by SIGKILL"])
    running.assert_nothing_is_left()


def test_an_engine_in_a_long_step_is_killed_after_the_drain(start: Start) -> None:
    running = start(engine=("ignore",), stop=0.3)
    running.pid("engine"), running.pid("api")
    running.signal(signal.SIGTERM)
    assert running.end() == (0, [])
    running.assert_nothing_is_left()


def test_an_engine_that_cannot_be_killed_is_reported(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It hangs in a driver, for example."""
    killpg = os.killpg
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(child_process, "KILL_SECONDS", 0.2)
    ignore_sigterm = "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    ignores = tmp_path / "ignores"
    with (
        StopSignals() as signals,
        supervisor.Supervisor(signals, Settings(drain_timeout=0.0)) as watched,
    ):
        monkeypatch.setattr(os, "killpg", lambda *_: None)
        code = f"{ignore_sigterm}; pathlib.Path({str(ignores)!r}).touch(); time.sleep(60)"
        watched.add_engine(0, supervisor.EngineLaunch("engine", [sys.executable, "-c", code], ENGINE_CONFIG))
        watched.start_engine(0)
        watched.start_api("API", [sys.executable, "-c", "pass"], ApiProcessConfig(settings=Settings(), models=()))
        wait_until(ignores.exists)
        status = watched._after_signal()
        monkeypatch.setattr(os, "killpg", killpg)
    assert status == 1
    assert "the engine process cannot be killed" in capfd.readouterr().err


def test_an_api_that_fails_to_drain_is_reported(start: Start) -> None:
    running = start(api=("fail", "4"))
    running.pid("engine"), running.pid("api")
    running.signal(signal.SIGTERM)
    assert running.end() == (1, ["lightwell: error: the API process exited with code 4"])
    running.assert_nothing_is_left()


def test_an_echoed_signal_is_not_a_second_one(start: Start) -> None:
    running = start(api=("drain", "0.3"))
    running.pid("engine"), running.pid("api")
    running.signal(signal.SIGTERM)
    running.signal(signal.SIGTERM)
    running.signal(signal.SIGCONT)
    assert running.end() == (0, [])


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(start: Start, first: int, second: int) -> None:
    running = start(engine=("ignore",), api=("drain", "60"), stop=0.3, drain_timeout=60.0)
    running.pid("engine"), running.pid("api")
    running.signal(first)
    running.pid("api-end")
    time.sleep(0.15)
    running.signal(second)
    assert running.end() == (128 + second, [])
    running.assert_nothing_is_left()


def test_an_early_signal_while_children_start(start: Start) -> None:
    running = start()
    running.wait_for(running.folder / "engine.json")
    running.signal(signal.SIGTERM)
    status, _ = running.end()
    assert status == 0
    running.assert_nothing_is_left()


@pytest.mark.checklist("F04")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_death_of_the_engine(start: Start, signum: signal.Signals) -> None:
    running = start(api=("outlive-engine", "0.2"), grace=60.0)
    running.pid("api")
    os.kill(running.pid("engine"), signum)
    outcome = "exited with code 0" if signum == signal.SIGTERM else f"was killed by {signum.name}"
    assert running.end() == (1, [f"lightwell: error: the engine process {outcome}"])
    assert (running.folder / "api-end.pid").exists()  # it ended by itself
    running.assert_nothing_is_left()


@pytest.mark.parametrize("api", ["run", "ignore"])
def test_death_of_the_engine_with_an_api_that_does_not_exit(start: Start, api: str) -> None:
    running = start(api=(api,), stop=0.3)
    running.pid("api")
    os.kill(running.pid("engine"), signal.SIGKILL)
    assert running.end() == (1, ["lightwell: error: the engine process was killed by SIGKILL"])
    running.assert_nothing_is_left()


@pytest.mark.parametrize("engine", ["run", "ignore"])
def test_death_of_the_api(start: Start, engine: str) -> None:
    running = start(engine=(engine,), stop=0.3)
    running.pid("engine")
    os.kill(running.pid("api"), signal.SIGKILL)
    assert running.end() == (1, ["lightwell: error: the API process was killed by SIGKILL"])
    running.assert_nothing_is_left()


@pytest.mark.checklist("F11")
def test_an_engine_that_cannot_start(start: Start) -> None:
    running = start(engine=("exit", "0"), api=("outlive-engine", "0"), grace=60.0)
    assert running.end() == (1, ["lightwell: error: the engine process exited with code 7"])
    running.assert_nothing_is_left()


def test_an_api_that_cannot_start(start: Start) -> None:
    running = start(api=("exit-well", "0"))
    assert running.end() == (1, ["lightwell: error: the API process exited with code 0"])
    running.assert_nothing_is_left()


def ready_engine(running: Running, number: int) -> int:
    """Return the process id of the engine with this number, once it has been reported as ready and runs."""
    wait_until(lambda: num_engines(running) == number and running.pid("engine") == engine_pids(running)[-1])
    time.sleep(0.3)
    return engine_pids(running)[-1]


def engine_pids(running: Running) -> list[int]:
    return [int(pid) for pid in running.wait_for(running.folder / "engines").read_text().split()]


def num_engines(running: Running) -> int:
    return len(engine_pids(running))


def test_an_engine_that_dies_is_started_again(start: Start) -> None:
    running = start(engine=("fork",), api=("report", "9"), delays=(0.0, 0.5))
    supervisor_process = psutil.Process(running.process.pid)
    ready_engine(running, 1)
    num_fds = supervisor_process.num_fds()
    for number, signum, expected_delay in ((1, signal.SIGKILL, 0.0), (2, signal.SIGTERM, 0.5)):
        dead, helper = ready_engine(running, number), running.pid("helper")
        os.kill(dead, signum)
        killed = time.monotonic()
        wait_until(lambda number=number: num_engines(running) == number + 1)
        assert time.monotonic() - killed >= expected_delay
        wait_for_end_of(dead, helper)
    last = ready_engine(running, 3)
    assert supervisor_process.num_fds() == num_fds
    assert {child.pid for child in supervisor_process.children()} == {last, running.pid("api")}
    os.kill(last, signal.SIGKILL)
    status, lines = running.end(within=15.0)
    assert status == 1
    assert lines[0] == "lightwell: error: the engine process was killed by SIGKILL; another one starts"
    assert lines[1] == "lightwell: error: the engine process exited with code 0; another one starts in 0.5 s"
    assert re.fullmatch(
        r"lightwell: error: the engine process was killed by SIGKILL; that was failure 3 in \d s", lines[2]
    )
    assert len(lines) == 3
    assert (running.folder / "gone").read_text()
    running.assert_nothing_is_left()


@pytest.mark.checklist("G07")
def test_an_engine_is_started_again_while_nobody_reads_the_log(start: Start) -> None:
    running = start(api=("report", "9"))
    first = ready_engine(running, 1)
    log = os.open(f"/proc/{running.process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(log, bytes(4096))
    os.close(log)
    os.kill(first, signal.SIGKILL)
    ready_engine(running, 2)
    running.signal(signal.SIGTERM)
    assert running.end()[0] == 0


def test_restarts_may_be_switched_off(start: Start) -> None:
    running = start(api=("report", "9"), grace=60.0, on_engine_death="exit")
    os.kill(ready_engine(running, 1), signal.SIGKILL)
    assert running.end() == (1, ["lightwell: error: the engine process was killed by SIGKILL"])
    assert (running.folder / "api-end.pid").exists()
    running.assert_nothing_is_left()


def test_engines_that_die_while_they_load(start: Start) -> None:
    running = start(engine=("run-once",), api=("report", "1"), grace=60.0, delays=(0.0, 0.0, 0.0))
    os.kill(ready_engine(running, 1), signal.SIGKILL)
    status, lines = running.end(within=15.0)
    assert status == 1
    assert num_engines(running) == 4
    assert len(lines) == 4
    assert lines[-1].startswith("lightwell: error: the engine process exited with code 7; that was failure 4 in ")
    running.assert_nothing_is_left()


def test_a_restarted_engine_that_never_becomes_ready_is_killed(start: Start) -> None:
    """It has three times as long as the first engine, and --step-timeout."""
    running = start(api=("report", "1"), delays=(0.0, 60.0), step_timeout=0.5)
    os.kill(ready_engine(running, 1), signal.SIGKILL)
    wait_until(lambda: num_engines(running) == 2)
    wait_for_end_of(engine_pids(running)[1], seconds=10)
    running.signal(signal.SIGTERM)
    _, lines = running.end()
    assert any("has not become ready within" in line for line in lines)
    running.assert_nothing_is_left()


def test_the_server_goes_on_while_an_engine_is_left(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    channel, api_end = make_channel()
    wait = f"while not pathlib.Path({str(tmp_path / 'end')!r}).exists():\n    time.sleep(0.05)"
    with (
        closing(channel),
        closing(api_end),
        StopSignals() as signals,
        supervisor.Supervisor(signals, Settings()) as watched,
    ):
        for number, code in enumerate(("pass", f"{wait}\nsys.exit(3)", "sys.exit(7)")):
            command = [sys.executable, "-c", f"import pathlib, sys, time\n{code}"]
            watched.add_engine(number, supervisor.EngineLaunch(f"engine {number}", command, ENGINE_CONFIG))
            watched.start_engine(number)
        api = watched.start("API", [sys.executable, "-c", "import time; time.sleep(60)"], msgspec.Struct())
        watched.add_api(api, channel)
        gone: list[Message] = []

        def read() -> None:
            while len(gone) < 2:
                gone.extend(api_end.receive())
                time.sleep(0.01)
            (tmp_path / "end").touch()
            while len(gone) < 3:
                gone.extend(api_end.receive())
                time.sleep(0.01)
            api.terminate()

        reader = Thread(target=read)
        reader.start()
        assert watched.watch() == 1
        reader.join()
    assert {message.number for message in gone[:2] if isinstance(message, EngineGone)} == {0, 2}
    assert gone[2] == EngineGone(1, supervisor.ENDED)
    lines = capfd.readouterr().err.splitlines()
    goes_on = "; the server goes on without it"
    assert sorted(lines[:2]) == [
        f"lightwell: error: the engine 0 process exited with code 0{goes_on}",
        f"lightwell: error: the engine 2 process exited with code 7{goes_on}",
    ]
    assert lines[2:] == ["lightwell: error: the engine 1 process exited with code 3"]


def test_news_of_engines_are_for_the_coordinator(tmp_path: Path) -> None:
    ends = [make_channel() for _ in range(2)]
    wait = "import time; time.sleep(60)"
    with ExitStack() as stack:
        for channel in chain.from_iterable(ends):
            stack.enter_context(closing(channel))
        watched = supervisor.Supervisor(stack.enter_context(StopSignals()), Settings())
        stack.enter_context(watched)
        for number, code in enumerate(("pass", wait)):
            launch = supervisor.EngineLaunch(f"engine {number}", [sys.executable, "-c", code], ENGINE_CONFIG)
            watched.add_engine(number, launch)
            watched.start_engine(number)
        for number, (channel, _) in enumerate(ends):
            watched.add_api(watched.start(f"API {number}", [sys.executable, "-c", wait], msgspec.Struct()), channel)
        (_, coordinator), (_, worker) = ends
        news: list[Message] = []

        def read() -> None:
            while not news:
                news.extend(coordinator.receive())
                time.sleep(0.01)
            worker.send(Heartbeat())
            os.kill(os.getpid(), signal.SIGTERM)

        reader = Thread(target=read)
        reader.start()
        assert watched.watch() == 0
        reader.join()
        assert news == [EngineGone(0, supervisor.ENDED)]
        assert worker.receive() == []


class Orders:
    """The orders of an API process to a supervisor, in a thread. `act` is given it; its errors are kept."""

    def __init__(self, api_end: Channel, api: Child, act: Callable[["Orders"], None]) -> None:
        self.errors: list[BaseException] = []
        self._channel, self._api, self._act = api_end, api, act
        self.thread = Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._act(self)
        except BaseException as error:
            self.errors.append(error)
        self._api.terminate()

    def send(self, order: Message) -> Message:
        """Send an order, and return the answer."""
        self._channel.send(order)
        return self.next()

    def next(self) -> Message:
        messages: list[Message] = []

        def has_received() -> bool:
            messages.extend(self._channel.receive())
            return bool(messages)

        wait_until(has_received)
        (message,) = messages
        return message

    def start(self, number: int, memory_limit: int | None = None) -> int:
        """Start an engine, and return its process id."""
        answer = self.send(StartEngine(number, memory_limit))
        assert isinstance(answer, EngineStarted)
        assert answer.number == number
        assert is_running(answer.pid)
        return answer.pid


def test_the_api_process_starts_and_stops_engines(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    channel, api_end = make_channel()
    copy = f"import pathlib, sys, time; pathlib.Path({str(tmp_path)!r}, 'config').write_text(sys.stdin.read())"
    config = tmp_path / "config"

    def act(orders: Orders) -> None:
        first = orders.start(5, 123)
        assert orders.send(StartEngine(5)) == EngineStarted(5, first)
        wait_until(lambda: config.exists() and config.read_text())
        assert msgspec.json.decode(config.read_bytes(), type=EngineProcessConfig).config.memory_limit == 123
        assert orders.send(StopEngine(5)) == EngineGone(5, supervisor.ENDED)
        assert not is_running(first)
        second = orders.start(5)
        assert second != first
        os.kill(second, signal.SIGKILL)  # it has not been ready, so it is not started again
        assert orders.next() == EngineGone(5, supervisor.ENDED)
        gone = orders.send(StartEngine(6))
        assert isinstance(gone, EngineGone)
        assert gone.reason.startswith("cannot start the missing process: ")

    with (
        closing(channel),
        closing(api_end),
        StopSignals() as signals,
        supervisor.Supervisor(signals, Settings(load="on-first-use")) as watched,
    ):
        command = [sys.executable, "-c", f"{copy}; time.sleep(60)"]
        watched.add_engine(5, supervisor.EngineLaunch("engine", command, ENGINE_CONFIG))
        watched.add_engine(6, supervisor.EngineLaunch("missing", ["/no/such/program"], ENGINE_CONFIG))
        api = watched.start("API", [sys.executable, "-c", "import time; time.sleep(60)"], msgspec.Struct())
        watched.add_api(api, channel)
        orders = Orders(api_end, api, act)
        assert watched.watch() == 1
        orders.thread.join()
    assert orders.errors == []
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "lightwell: error: the engine process was killed by SIGKILL; the server goes on without it"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_no_engine_runs(start: Start, signum: int) -> None:
    running = start(api=("report", "9"), grace=60.0, delays=(60.0,))
    os.kill(ready_engine(running, 1), signal.SIGKILL)
    time.sleep(0.3)
    running.signal(signum)
    status, lines = running.end()
    assert status == 1
    assert lines[-1] == "lightwell: error: the engine process was killed by SIGKILL"
    running.assert_nothing_is_left()


def test_death_of_the_api_while_no_engine_runs(start: Start) -> None:
    running = start(api=("report", "9"), delays=(60.0,))
    os.kill(ready_engine(running, 1), signal.SIGKILL)
    time.sleep(0.3)
    os.kill(running.pid("api"), signal.SIGKILL)
    status, lines = running.end()
    assert (status, lines[-1]) == (1, "lightwell: error: the API process was killed by SIGKILL")
    running.assert_nothing_is_left()


def test_an_api_process_without_heartbeats(start: Start) -> None:
    """It gets the signal to write its stacks, and then it is killed. Without a first heartbeat, it is still loading."""
    running = start(api=("fall-silent",), step_timeout=0.5)
    running.pid("api")
    started = time.monotonic()
    status, lines = running.end(within=15.0)
    assert time.monotonic() - started > 0.5 + supervised_api.MISSED_HEARTBEATS * HEARTBEAT_SECONDS
    assert (status, lines) == (1, ["lightwell: error: the API process has not responded for more than 3.5 s"])
    assert (running.folder / "dumped.pid").exists()
    running.assert_nothing_is_left()


def test_a_pause_of_all_processes_is_no_hang(start: Start) -> None:
    """Heartbeats that come soon after the pause count."""
    running = start(api=("report", "9"), step_timeout=0.5)
    api = running.pid("api")
    time.sleep(1)
    processes = [psutil.Process(pid) for pid in (running.process.pid, api)]
    for process in processes:
        process.suspend()
    time.sleep(5)
    for process in processes:
        process.resume()
        time.sleep(0.5)
    assert running.process.poll() is None
    os.kill(api, signal.SIGSTOP)
    assert running.end(within=15.0)[0] == 1
    running.assert_nothing_is_left()


@pytest.mark.checklist("A16", "F11")
def test_an_engine_that_cannot_be_started_again(start: Start) -> None:
    """There are no file descriptors. Each try counts as a death, and the messages are about the tries."""
    running = start(api=("report", "1"), grace=60.0, delays=(0.0, 0.1, 0.2))
    engine = ready_engine(running, 1)
    num_fds = psutil.Process(running.process.pid).num_fds()
    resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (num_fds, num_fds))
    os.kill(engine, signal.SIGKILL)
    status, lines = running.end(within=15.0)
    assert status == 1
    assert num_engines(running) == 1
    assert lines[0] == "lightwell: error: the engine process was killed by SIGKILL; another one starts"
    failure = "lightwell: error: cannot start the engine process: .*; "
    patterns = (r"another one starts in 0\.1 s", r"another one starts in 0\.2 s", r"that was failure 4 in \d s")
    assert len(lines) == 4
    assert all(re.fullmatch(failure + pattern, line) for pattern, line in zip(patterns, lines[1:], strict=True)), lines
    running.assert_nothing_is_left()


def test_death_of_the_engine_while_draining(start: Start) -> None:
    running = start(api=("drain", "60"), drain_timeout=60.0)
    running.pid("api")
    running.signal(signal.SIGTERM)
    running.pid("api-end")
    os.kill(running.pid("engine"), signal.SIGKILL)
    status, lines = running.end()
    assert status == 1
    assert "lightwell: error: the engine process was killed by SIGKILL" in lines
    running.assert_nothing_is_left()


def test_a_signal_during_the_grace_after_the_engines_death(start: Start) -> None:
    running = start(api=("ignore",), grace=60.0, stop=0.3)
    running.pid("api")
    os.kill(running.pid("engine"), signal.SIGKILL)
    time.sleep(0.1)
    running.signal(signal.SIGINT)
    assert running.end() == (130, [])
    running.assert_nothing_is_left()


def test_death_of_the_supervisor(start: Start) -> None:
    """The stub children do not arrange their end: the parent-death signal is set before they run any code."""
    running = start()
    pids = [running.pid("engine"), running.pid("api")]
    running.process.kill()
    wait_for_end_of(*pids)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_subprocesses_of_a_child_end_with_it(start: Start, signum: int) -> None:
    running = start(engine=("fork",))
    running.pid("api")
    helper, engine = running.pid("helper"), running.pid("engine")
    os.kill(engine, signum)
    assert running.end()[0] == 1
    wait_for_end_of(helper)


def test_the_last_line_can_be_json(start: Start) -> None:
    running = start(engine=("exit", "0"), log_format="json")
    status, lines = running.end()
    assert status == 1
    record = json.loads(lines[-1])
    assert record["level"] == "error"
    assert record["message"] == "the engine process exited with code 7"


@pytest.mark.checklist("F09")
def test_files_of_a_killed_api_process_are_removed(start: Start, tmp_path: Path, temporary: str) -> None:
    running = start(uds=f"{temporary}/api.sock")
    api = running.pid("api")
    bind_unix(f"{temporary}/api.sock").close()
    file = running_servers.folder() / f"{api}.json"
    file.parent.mkdir(exist_ok=True)
    file.touch()
    os.kill(api, signal.SIGKILL)
    assert running.end() == (1, ["lightwell: error: the API process was killed by SIGKILL"])
    running.assert_nothing_is_left()
    assert os.listdir(temporary) == []
    assert not file.exists()


@pytest.mark.checklist("F09")
def test_files_of_a_killed_supervisor_are_removed_when_another_one_starts(start: Start, temporary: str) -> None:
    killed = start()
    children = [killed.pid("engine"), killed.pid("api")]
    killed.signal(signal.SIGKILL)
    wait_for_end_of(*children)
    (left,) = os.listdir(temporary)
    for child in ("engine", "api"):
        (killed.folder / f"{child}.pid").unlink()
    running = start()
    running.pid("api")
    (folder,) = os.listdir(temporary)
    assert folder != left
    running.signal(signal.SIGTERM)
    assert running.end() == (0, [])
    assert os.listdir(temporary) == []


def test_a_missing_command(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    settings = Settings(model=str(model))
    with pytest.raises(SupervisorError, match=r"cannot start the engine process: .*No such file"):
        supervisor.supervise(settings, supervisor.Commands(engine=["/nonexistent"], api=["/nonexistent"]))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
