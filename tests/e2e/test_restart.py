"""Tests of an engine that dies or hangs under load and is started again: what each client gets, and what is left."""

import json
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.config import load_model_config
from tests.e2e.conftest import StartServer
from tests.support.lora_adapters import save_random_adapter
from tests.support.processes import is_running, wait_for_end_of
from tests.support.server_process import CHAT, COMPLETIONS, MODEL, ServerProcess
from tests.support.serving import check_error, wait_until
from tests.support.streams import Stream, merge, start_streams

EVENTS = "/lightwell/v1/events"
NUM_SLOTS = 4
SLOTS = f"--max-num-seqs={NUM_SLOTS}"
RESTARTED = 120.0  # seconds; bounds hangs only, since other jobs on the machine slow the start of a process
CHAT_BODY = {"messages": [{"role": "user", "content": "Tell me a story"}], "max_completion_tokens": 16}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 1.0, "seed": 7, "n": 2}),
    (COMPLETIONS, {"prompt": "The capital of France is", "max_tokens": 24, "temperature": 0, "logprobs": 3}),
    (COMPLETIONS, {"prompt": ["def add(a, b):", "import"], "max_tokens": 8, "temperature": 1.0, "seed": 9}),
    (CHAT, CHAT_BODY | {"temperature": 0.8, "top_p": 0.9, "seed": 11, "frequency_penalty": 0.5}),
    (CHAT, CHAT_BODY | {"seed": 12, "structured_outputs": {"regex": "[a-z ]{8,12}"}}),
]


def children_of(server: ServerProcess, module: str) -> list[psutil.Process]:
    """Return the child process that runs a module, or nothing while there is none."""
    children = []
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):
            children += [child] if module in child.cmdline() else []
    return children


def engine_of(server: ServerProcess) -> psutil.Process:
    (engine,) = children_of(server, "engine.process")
    return engine


def kill_engine(server: ServerProcess) -> None:
    """Kill the engine, and wait until the process of the next one is there."""
    dead = engine_of(server)
    dead.kill()
    wait_until(lambda: [each.pid for each in children_of(server, "engine.process")] not in ([], [dead.pid]), RESTARTED)


def api_of(server: ServerProcess) -> psutil.Process:
    (api,) = children_of(server, "server.main")
    return api


def answer(server: ServerProcess, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return what the same request must always give: all but ids, times and numbers of cached tokens."""
    content = server.answer(path, body)
    return {"choices": content["choices"], "completion_tokens": content["usage"]["completion_tokens"]}


def wait_for_restart(server: ServerProcess, num_restarts: int) -> None:
    """Wait until the server is ready after this many restarts."""
    wait_until(lambda: server.get("/readyz").json() == {"status": "ok", "restarts": num_restarts}, RESTARTED)


def resources(server: ServerProcess) -> list[int]:
    """Return the numbers of file descriptors, without those of clients, and threads of supervisor and API process."""
    processes = (psutil.Process(server.process.pid), api_of(server))
    counts = ((each.num_fds() - len(each.net_connections("inet")), each.num_threads()) for each in processes)
    return [number for pair in counts for number in pair]


@pytest.mark.checklist("F05", "F06")
def test_the_engine_dies_or_hangs_under_load(start_server: StartServer) -> None:
    """Requests with a token get one error; the others get the answer that they would have got without the death."""
    server = start_server(SLOTS, "--step-timeout=10", "--kv-cache-memory=128MiB")
    expected = [answer(server, path, body) for path, body in REQUESTS]
    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        used = []
        for number, signum in enumerate((signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP), start=1):
            running = start_streams(server, NUM_SLOTS, max_tokens=900)
            plain = [threads.submit(answer, server, path, body) for path, body in REQUESTS]
            streams = [Stream(server, body, path) for path, body in REQUESTS]
            wait_until(lambda: server.num_waiting == 2 * 7, 30)
            engine = engine_of(server)
            engine.send_signal(signum)
            check_running(running)
            late = threads.submit(answer, server, *REQUESTS[0])
            wait_for_restart(server, number)
            check_waiting(expected, plain, streams)
            assert late.result() == expected[0]
            wait_for_end_of(engine.pid)
            wait_until(lambda: server.is_idle, 30)
            used.append(resources(server))
    # Threads and processes for text come and go.
    assert all(last <= second + 3 for last, second in zip(used[-1], used[1], strict=True)), used
    assert server.metric("lightwell_engine_restarts_total") == 3
    server.family = [*server.family, *psutil.Process(server.process.pid).children(recursive=True)]
    server.signal(signal.SIGTERM)
    assert server.wait(10) == 0, server.end_of_log()
    server.assert_nothing_is_left()


def check_running(streams: list[Stream]) -> None:
    for stream in streams:
        stream.result()
        assert stream.error is not None
        assert stream.error["code"] == "engine_unavailable"
        assert stream.is_done
        assert not stream.is_cut


def check_waiting(expected: list[dict[str, Any]], plain: list[Future[dict[str, Any]]], streams: list[Stream]) -> None:
    assert [each.result() for each in plain] == expected
    for stream, content in zip(streams, expected, strict=True):
        assert stream.result().is_complete, stream.error
        assert merge(stream.chunks) == merge([content])


@pytest.mark.checklist("F04")
def test_five_deaths_in_a_minute_end_the_server(start_server: StartServer) -> None:
    server = start_server()
    started = time.monotonic()
    for number in range(1, 5):
        engine_of(server).kill()
        wait_for_restart(server, number)
    engine_of(server).kill()
    if time.monotonic() - started > 60:
        pytest.skip("the machine is too slow for five restarts in a minute")
    assert server.wait(10) == 1
    assert "the engine process was killed by SIGKILL; that was failure 5 in " in server.log.splitlines()[-1]
    server.assert_nothing_is_left()


@pytest.mark.checklist("F03", "F11")
@pytest.mark.parametrize("share", [0.25, 0.85])
def test_another_engine_gets_too_little_memory(start_server: StartServer, share: float) -> None:
    """A share of what the first one had: too little for its libraries, or for the model."""
    server = start_server()
    engine = engine_of(server)
    limit = int(share * engine.memory_info().vms)
    running = start_streams(server, 1, max_tokens=900)
    resource.prlimit(server.process.pid, resource.RLIMIT_AS, (limit, limit))
    with ThreadPoolExecutor() as threads:
        engine.kill()
        check_running(running)
        assert server.get("/health").json()["status"] == "restarting"
        waiting = [threads.submit(server.complete) for _ in range(4)]
        assert server.wait(RESTARTED) == 1
        for request in waiting:
            check_error(request.result(), 503)
    assert "Traceback" not in server.log
    assert server.log.count("not enough memory") == 4
    assert server.log.count("the engine process exited with code 1; another one starts in") == 3
    assert "the engine process exited with code 1; that was failure 5 in" in server.log.splitlines()[-1]
    server.assert_nothing_is_left()


def test_adapters_are_loaded_again(start_server: StartServer, smollm2_path: Path, tmp_path: Path) -> None:
    """Those loaded at run time, too. One whose files are gone is lost, and its requests fail."""
    config = load_model_config(smollm2_path)
    for number, name in enumerate(("poet", "coder", "gone")):
        save_random_adapter(tmp_path / name, config, number, ranks={"": 4}, strength=1.0)
    server = start_server(SLOTS, "--allow-runtime-lora-updating", f"--lora-modules=poet={tmp_path / 'poet'}")
    for name in ("coder", "gone"):
        load = {"lora_name": name, "lora_path": str(tmp_path / name)}
        assert server.http.post("/v1/load_lora_adapter", json=load).status_code == 200
    body = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
    expected = {name: answer(server, COMPLETIONS, body | {"model": name}) for name in (MODEL, "poet", "coder")}
    assert len({content["choices"][0]["text"] for content in expected.values()}) == 3
    (tmp_path / "gone" / "adapter_model.safetensors").unlink()
    start_streams(server, NUM_SLOTS, max_tokens=900)
    with ThreadPoolExecutor() as threads:
        waiting = {name: threads.submit(answer, server, COMPLETIONS, body | {"model": name}) for name in expected}
        lost = threads.submit(server.complete, **body | {"model": "gone"})
        wait_until(lambda: server.num_waiting == 4)
        engine_of(server).kill()
        assert {name: each.result() for name, each in waiting.items()} == expected
        message = check_error(lost.result(), 503)["message"]
        assert message == "The LoRA adapter 'gone' could not be loaded again after a restart of the engine."
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == [MODEL, "poet", "coder"]
    assert "the LoRA adapter gone is lost" in server.log
    check_error(server.complete(**body | {"model": "gone"}), 404)


@pytest.mark.checklist("E11", "F05")
def test_the_queue_timeout_goes_on_after_a_restart(start_server: StartServer) -> None:
    """The lost engine had begun with the prompt, and the next one is not ready in time."""
    sizes = ("--max-model-len=8192", "--max-num-batched-tokens=256", "--kv-cache-memory=256MiB")
    server = start_server("--queue-timeout=4", *sizes)
    with ThreadPoolExecutor() as threads:
        begun = threads.submit(server.complete, prompt="word " * 7000, max_tokens=4)
        wait_until(lambda: server.num_running == 1)
        kill_engine(server)
        engine_of(server).suspend()
        assert check_error(begun.result(), 503)["code"] == "request_timeout"
        engine_of(server).resume()
    wait_for_restart(server, 1)
    assert server.is_idle


def test_sigterm_while_the_engine_is_restarted(start_server: StartServer) -> None:
    """Requests that wait for the engine are drained, too."""
    server = start_server(SLOTS)
    start_streams(server, NUM_SLOTS, max_tokens=900)
    waiting = Stream(server, REQUESTS[0][1])
    wait_until(lambda: server.num_waiting == 2)
    kill_engine(server)
    server.signal(signal.SIGTERM)
    assert waiting.result().is_complete, waiting.error
    assert server.wait(10) == 0, server.end_of_log()
    assert not any(is_running(each.pid) for each in server.family)


def next_event(lines: Iterator[str]) -> tuple[str, list[int]]:
    """Return the engine and the steps of the next event."""
    event = json.loads(next(line for line in lines if line.startswith("data: ")).removeprefix("data: "))
    return event["engine"], [step["id"] for step in event["data"]]


def test_a_stream_of_steps_goes_on_with_the_restarted_engine(start_server: StartServer) -> None:
    """One that is open, and one that is opened later with the id of the dead engine's last event."""
    server = start_server()
    with server.http.stream("GET", EVENTS) as response:
        lines = response.iter_lines()
        assert server.complete(max_tokens=4).status_code == 200
        last = server.get("/lightwell/v1/steps?limit=1").json()["data"][0]["id"]
        engine, steps = next_event(lines)
        while steps[-1] < last:
            steps = next_event(lines)[1]
        time.sleep(0.5)  # the engine has answered whatever it was asked after that
        kill_engine(server)
        wait_until(lambda: server.status("/health") == 200, RESTARTED)
        assert server.complete(max_tokens=4).status_code == 200
        restarted, steps = next_event(lines)
    assert (restarted != engine, steps[0]) == (True, 1)
    with server.http.stream("GET", EVENTS, headers={"last-event-id": f"{engine}-{last}"}) as response:
        later, steps = next_event(response.iter_lines())
    assert (later, steps[0]) == (restarted, 1)
