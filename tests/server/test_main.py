"""Tests of `python -m server.main` as a process: start, shutdown, and what clients see of them."""

import gc
import hashlib
import json
import os
import resource
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from server.main import MAX_CONNECTIONS, SPARE_FILES, Lifecycle, make_context, raise_file_limit, run
from server.processes.supervised_api import linked_configs
from server.processes.supervisor_channel import (
    DUMP_SIGNAL,
    Channel,
    EngineGone,
    EngineStarted,
    Heartbeat,
    make_channel,
)
from server.settings.process_configs import ApiProcessConfig, EngineProcess
from server.settings.table import Settings
from server.sockets.listeners import bind, url
from tests.support.clients import write_adapter
from tests.support.fake_engine import FakeEngineConfig, FakeEngineProcess
from tests.support.paths import ROOT
from tests.support.serving import api_config, check_envelope, check_error, own_address, raw_request, wait_until

COMMAND = [sys.executable, "-m", "server.main"]
MAX_RSS = 150 << 20
TLS = ROOT / "tests/support/tls"


@dataclass
class Api:
    """A running API process and its fake engine. If there are workers, it is their coordinator."""

    process: subprocess.Popen[bytes]
    workers: Sequence[subprocess.Popen[bytes]]
    engine: FakeEngineProcess
    url: str
    log: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=5)

    def complete(self, **body: Any) -> httpx.Response:
        return httpx.post(self.url + "/v1/completions", json={"model": "tiny", "prompt": "x"} | body, timeout=30)

    def is_ready(self) -> bool:
        try:
            return self.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def wait(self, timeout: float) -> int:
        return self.process.wait(timeout)


StartApi = Callable[..., Api]
TLS = ROOT / "tests/support/tls"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def start_process(config: ApiProcessConfig, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stderr=stderr, env=os.environ | environment, pass_fds=config.inherited_fds
        )
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(msgspec.json.encode(config))
    return process


@pytest.fixture
def start_api(address: str, model_folder: Path, tmp_path: Path) -> Iterator[StartApi]:
    """A function that starts an API process and waits for it: `start_api({engine settings}, **settings)`."""
    with ExitStack() as stack:

        def start(
            engine: dict[str, Any] | None = None,
            *,
            model_path: Path = model_folder,
            wait_ready: bool = True,
            environment: dict[str, str] | None = None,
            supervisor_fd: int | None = None,
            num_workers: int = 0,
            **settings: Any,
        ) -> Api:
            fake = stack.enter_context(FakeEngineProcess(FakeEngineConfig(address=address, **(engine or {}))))
            port = free_port()
            config = api_config(
                Settings(port=port, api_server_count=1 + num_workers, **settings),
                EngineProcess(address, fake.pid),
                model_path,
                ("tiny",),
                supervisor_fd=supervisor_fd,
            )
            logs = [tmp_path / "api.log", *(tmp_path / f"api-{number}.log" for number in range(num_workers))]
            addresses = [stack.enter_context(own_address()) for _ in range(num_workers)]
            with linked_configs(config, addresses) as configs:
                processes = [
                    start_process(each, log, **(environment or {})) for each, log in zip(configs, logs, strict=True)
                ]
            for process in processes:
                stack.callback(process.wait)
                stack.callback(process.kill)
            api = Api(processes[0], processes[1:], fake, f"http://127.0.0.1:{port}", logs[0])
            if wait_ready:
                wait_until(api.is_ready, timeout=20)
            return api

        yield start


class Background:
    """A request in a thread, its response and the time of its end."""

    def __init__(self, call: Callable[[], httpx.Response]) -> None:
        self._call = call
        self.response: httpx.Response | None = None  # None while it runs, or if the connection was closed
        self.ended = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(httpx.TransportError):
            self.response = self._call()
        self.ended = time.monotonic()

    def result(self) -> httpx.Response:
        self._thread.join(20)
        assert self.response is not None
        return self.response


def running(api: Api) -> int:
    lines = api.get("/metrics").text.splitlines()
    (value,) = [line.split()[-1] for line in lines if line.startswith("lightwell_num_requests_running{")]
    return round(float(value))


def waiting_choices(api: Api) -> int:
    lines = api.get("/metrics").text.splitlines()
    (value,) = [line.split()[-1] for line in lines if line.startswith("lightwell_num_requests_waiting{")]
    return round(float(value))


def last_error(response: httpx.Response) -> dict[str, Any]:
    """Return the error from the last event of a stream."""
    *_, error, done, end = response.content.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    return check_envelope(error.removeprefix(b"data: "))


SLOW = {"step_seconds": 0.05, "endless": True}


@pytest.mark.checklist("G01")
def test_sigterm_when_idle(start_api: StartApi) -> None:
    api = start_api()
    assert api.complete().json()["choices"][0]["text"] == "Hello, world!"
    api.process.terminate()
    assert api.wait(2) == 0


@pytest.mark.checklist("G02")
def test_sigterm_lets_running_requests_finish(start_api: StartApi) -> None:
    api = start_api(SLOW)
    plain = Background(lambda: api.complete(max_tokens=30))
    stream = Background(lambda: api.complete(max_tokens=30, stream=True))
    wait_until(lambda: running(api) == 2)
    api.process.terminate()
    wait_until(lambda: api.get("/readyz").status_code == 503, timeout=0.5)
    refused = api.complete()
    check_error(refused, 503)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["connection"] == "close"
    assert plain.result().json()["usage"]["completion_tokens"] == 30
    assert stream.result().text.endswith("data: [DONE]\n\n")
    assert "error" not in stream.result().text
    assert api.wait(3) == 0


def connect_to(worker: subprocess.Popen[bytes], api: Api) -> httpx.Client:
    """Return a client whose connection a worker has got."""
    deadline = time.monotonic() + 20
    while True:
        assert time.monotonic() < deadline, "the worker gets no connections"
        client = httpx.Client(base_url=api.url, timeout=30)
        client.get("/healthz")
        if psutil.Process(worker.pid).net_connections("tcp"):
            return client
        client.close()


def test_sigterm_lets_requests_of_workers_finish(start_api: StartApi) -> None:
    """All processes drain at once. The coordinator does not leave before the worker."""
    api = start_api(SLOW, num_workers=1)
    (worker,) = api.workers
    body = {"model": "tiny", "prompt": "x", "max_tokens": 40, "stream": True}
    with closing(connect_to(worker, api)) as client:
        stream = Background(lambda: client.post("/v1/completions", json=body))
        wait_until(lambda: running(api) == 1)
        for process in (api.process, worker):
            process.terminate()
        assert stream.result().text.endswith("data: [DONE]\n\n")
        assert "error" not in stream.result().text
        assert [process.wait(5) for process in (api.process, worker)] == [0, 0]


def test_a_client_that_is_slow_to_close_is_no_failure(start_api: StartApi) -> None:
    """A TLS connection is closed once the client answers, which these do not. The coordinator waits for the worker."""
    files = {"ssl_certfile": str(TLS / "one.crt"), "ssl_keyfile": str(TLS / "one.key")}
    api = start_api(num_workers=1, wait_ready=False, **files)
    (worker,) = api.workers
    context = ssl._create_unverified_context()
    port = int(api.url.rpartition(":")[2])
    with ExitStack() as stack:

        def worker_has_connection() -> bool:
            with suppress(OSError):
                connection = context.wrap_socket(socket.create_connection(("127.0.0.1", port)))
                stack.enter_context(connection).sendall(raw_request("GET", "/readyz"))
                assert connection.recv(1000).startswith(b"HTTP/1.1 ")
            return bool(psutil.Process(worker.pid).net_connections("tcp"))

        wait_until(worker_has_connection, 20)
        for process in (api.process, worker):
            process.terminate()
        assert [process.wait(10) for process in (api.process, worker)] == [0, 0]
    assert "died" not in api.log.read_text()


def test_requests_that_outlast_the_drain_timeout_fail(start_api: StartApi) -> None:
    api = start_api(SLOW, drain_timeout=0.5)
    plain = Background(lambda: api.complete(max_tokens=2000))
    stream = Background(lambda: api.complete(max_tokens=2000, stream=True))
    wait_until(lambda: running(api) == 2)
    terminated = time.monotonic()
    api.process.terminate()
    assert api.wait(5) == 0
    assert time.monotonic() - terminated < 3
    check_error(plain.result(), 503)
    assert last_error(stream.result())["type"] == "service_unavailable_error"


def test_draining_does_not_wait_for_adapters(start_api: StartApi, tmp_path: Path) -> None:
    api = start_api({"max_loras": 2, "ignores_adapters": True}, allow_runtime_lora_updating=True)
    body = {"lora_name": "go", "lora_path": str(write_adapter(tmp_path / "go"))}
    load = Background(lambda: httpx.post(f"{api.url}/v1/load_lora_adapter", json=body, timeout=20))
    time.sleep(0.5)
    assert load.response is None
    api.process.terminate()
    assert api.wait(3) == 0
    assert "shutting down" in check_error(load.result(), 503)["message"]


def test_draining_does_not_wait_for_downloads(start_api: StartApi) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:  # never responds
        endpoint = f"http://127.0.0.1:{hub.getsockname()[1]}"
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        api = start_api({"max_loras": 2}, environment=environment, allow_runtime_lora_updating=True)
        body = {"lora_name": "go", "lora_path": "org/go"}
        load = Background(lambda: httpx.post(f"{api.url}/v1/load_lora_adapter", json=body, timeout=20))
        hub.settimeout(20)
        with hub.accept()[0]:
            api.process.terminate()
            assert api.wait(3) == 0
        assert "shutting down" in check_error(load.result(), 503)["message"]


def test_a_second_sigterm_ends_it_at_once(start_api: StartApi) -> None:
    api = start_api(SLOW)
    Background(lambda: api.complete(max_tokens=2000, stream=True))
    wait_until(lambda: running(api) == 1)
    api.process.terminate()
    wait_until(lambda: api.get("/readyz").status_code == 503)
    api.process.terminate()
    assert api.wait(1) == 1


def test_sigint_is_ignored(start_api: StartApi) -> None:
    api = start_api()
    api.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert api.complete().status_code == 200


@pytest.mark.checklist("F02", "F05")
def test_death_of_the_engine(start_api: StartApi) -> None:
    api = start_api(SLOW)
    plain = Background(lambda: api.complete(max_tokens=2000))
    stream = Background(lambda: api.complete(max_tokens=2000, stream=True))
    wait_until(lambda: running(api) == 2)
    os.kill(api.engine.pid, signal.SIGKILL)
    killed = time.monotonic()
    check_error(plain.result(), 503)
    assert last_error(stream.result())["code"] == "engine_unavailable"
    assert max(plain.ended, stream.ended) - killed < 1
    check_error(api.get("/health"), 503)
    check_error(api.get("/healthz"), 503)
    check_error(api.complete(), 503)
    assert api.wait(5) == 1
    assert time.monotonic() - killed < 5
    assert "the engine died" in api.log.read_text()


@pytest.fixture
def channel() -> Iterator[tuple[Channel, Channel]]:
    """The supervisor's end of a channel, and that of the API process."""
    own, other = make_channel()
    yield own, other
    own.close()
    other.close()


def test_restart_of_the_engine(start_api: StartApi, address: str, channel: tuple[Channel, Channel]) -> None:
    supervisor, api_end = channel
    api = start_api(SLOW | {"max_num_seqs": 1}, supervisor_fd=api_end.fileno())
    beats = [*supervisor.receive()]
    assert beats[0] == Heartbeat()

    def is_announced() -> bool:
        beats.extend(supervisor.receive())
        return beats[-1] == Heartbeat((api.engine.pid,))

    wait_until(is_announced)
    running_stream = Background(lambda: api.complete(max_tokens=2000, stream=True))
    wait_until(lambda: running(api) == 1)
    waiting = [Background(partial(api.complete, max_tokens=5, stream=stream)) for stream in (False, True)]
    wait_until(lambda: waiting_choices(api) == 2)
    before = time.time()
    os.kill(api.engine.pid, signal.SIGKILL)
    assert last_error(running_stream.result())["code"] == "engine_unavailable"
    for path in ("/health", "/readyz"):
        response = api.get(path)
        state = response.json()
        assert (response.status_code, state["status"], state["restarts"]) == (503, "restarting", 1)
        assert before - 1 <= state["since"] <= time.time()
        assert state["error"]["code"] == "engine_unavailable"
        assert response.headers["retry-after"]
    assert api.get("/healthz").json() == {"status": "ok", "restarts": 1}
    waiting.append(Background(lambda: api.complete(max_tokens=5)))
    wait_until(lambda: waiting_choices(api) == 3)
    with FakeEngineProcess(FakeEngineConfig(address=address, max_num_seqs=1)) as another:
        supervisor.send(EngineStarted(0, another.pid))
        for each in waiting:
            assert each.result().status_code == 200
            assert "error" not in each.result().text
        assert api.get("/readyz").json() == {"status": "ok", "restarts": 1}
        assert "lightwell_engine_restarts_total{" in api.get("/metrics").text
        supervisor.receive()
        wait_until(lambda: Heartbeat((another.pid,)) in supervisor.receive())
    last = Background(api.complete)
    wait_until(lambda: api.get("/health").status_code == 503)
    supervisor.send(EngineGone(0, "five deaths"))
    assert api.wait(5) == 1
    check_error(last.result(), 503)
    assert "the engine died: five deaths" in api.log.read_text()


def test_heartbeats_and_stacks(start_api: StartApi, channel: tuple[Channel, Channel]) -> None:
    """A stuck event loop sends no heartbeat, but its stack can still be written."""
    supervisor, api_end = channel
    api = start_api(supervisor_fd=api_end.fileno())
    supervisor.receive()
    time.sleep(2.5)
    assert 2 <= len(supervisor.receive()) <= 3
    api.process.send_signal(DUMP_SIGNAL)
    wait_until(lambda: "most recent call first" in api.log.read_text())
    assert api.complete().status_code == 200


def test_death_of_an_engine_that_was_never_ready(start_api: StartApi) -> None:
    api = start_api({"never_ready": True}, wait_ready=False)
    wait_until(lambda: _status(api, "/healthz") == 200, timeout=10)
    api.engine.kill()
    assert api.wait(2) == 1


@pytest.mark.checklist("G04")
def test_sigterm_while_the_engine_loads(start_api: StartApi) -> None:
    api = start_api({"never_ready": True}, wait_ready=False)
    wait_until(lambda: _status(api, "/healthz") == 200, timeout=10)
    assert "listening" not in api.log.read_text()
    api.process.terminate()
    assert api.wait(2) == 0


def _status(api: Api, path: str) -> int:
    try:
        return api.get(path).status_code
    except httpx.TransportError:
        return 0


@pytest.mark.checklist("B07")
@pytest.mark.parametrize("level", ["debug", "info"])
@pytest.mark.parametrize("log_format", ["human", "json"])
def test_logs_contain_no_prompt_and_no_key(start_api: StartApi, level: str, log_format: str) -> None:
    settings = {"api_key": ("key-canary",), "log_level": level, "log_format": log_format}
    api = start_api({"reply": list(b"reply-canary")}, wait_ready=True, **settings)
    headers = {"authorization": "Bearer key-canary"}
    for stream in (False, True):
        body = {"model": "tiny", "prompt": "prompt-canary", "stream": stream}
        response = httpx.post(api.url + "/v1/completions", json=body, headers=headers)
        assert "reply-canary" in response.text or stream
    httpx.post(api.url + "/v1/completions", content=b"\x00canary", headers=headers)
    api.process.terminate()
    assert api.wait(3) == 0
    log = api.log.read_text()
    assert "/v1/completions" in log
    assert "canary" not in log
    if log_format == "json":
        assert all(json.loads(line)["level"] for line in log.splitlines())


@pytest.mark.parametrize("key", [(), ("key-canary",)])
def test_the_log_of_the_start_ends_with_what_to_do_next(
    start_api: StartApi, smollm2_path: Path, tmp_path: Path, key: tuple[str, ...]
) -> None:
    """The curl command works with the key, and the file for `lightwell chat` lasts as long as the server."""
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    engine = {"vocab_size": 49_152}
    api = start_api(engine, model_path=smollm2_path, api_key=key, log_format="json", environment=environment)
    folder = tmp_path / "lightwell"
    wait_until(lambda: list(folder.glob("*.json")))
    (record,) = [record for record in map(json.loads, api.log.read_text().splitlines()) if "base_url" in record]
    assert record["message"] == f"tiny is ready, listening on {api.url}"
    assert record["base_url"] == f"{api.url}/v1"
    assert record["chat"] == f"lightwell chat --url {api.url}" + (" --api-key YOUR_KEY" if key else "")
    assert json.loads((folder / f"{api.process.pid}.json").read_text()) == {"url": api.url, "model": "tiny"}
    done = subprocess.run(
        ["sh", "-c", record["curl"].replace("YOUR_KEY", "".join(key))],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant", done.stdout
    assert "canary" not in api.log.read_text()
    api.process.terminate()
    assert api.wait(3) == 0
    assert list(folder.iterdir()) == []


def test_a_unix_socket(start_api: StartApi, tmp_path: Path) -> None:
    """The server is announced with it, the curl command works, and the file is removed at the end."""
    path = tmp_path / "lw.sock"
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    api = start_api(uds=str(path), log_format="json", wait_ready=False, environment=environment)
    wait_until(lambda: "base_url" in api.log.read_text(), 20)
    (record,) = [record for record in map(json.loads, api.log.read_text().splitlines()) if "base_url" in record]
    assert record["base_url"] == f"unix:{path}"
    done = subprocess.run(["sh", "-c", record["curl"]], capture_output=True, text=True, timeout=20, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant", done.stdout
    (file,) = (tmp_path / "lightwell").iterdir()
    assert json.loads(file.read_bytes())["url"] == f"unix:{path}"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://llm.example.org") as client:
        assert client.get("/v1/models").status_code == 200  # as a proxy passes the name on
    api.process.terminate()
    assert api.wait(3) == 0
    assert not path.exists()


def test_a_certificate(start_api: StartApi) -> None:
    files = {"ssl_certfile": str(TLS / "one.crt"), "ssl_keyfile": str(TLS / "one.key")}
    api = start_api(**files, log_format="json", wait_ready=False)
    url = api.url.replace("http:", "https:")
    wait_until(lambda: "base_url" in api.log.read_text(), 20)
    assert f'"base_url":"{url}/v1"' in api.log.read_text().replace(": ", ":")
    assert httpx.get(f"{url}/healthz", verify=ssl.create_default_context(cafile=TLS / "one.crt")).status_code == 200
    api.process.terminate()
    assert api.wait(3) == 0


def test_a_wrong_certificate_is_one_line(start_api: StartApi) -> None:
    files = {"ssl_certfile": str(TLS / "one.crt"), "ssl_keyfile": str(TLS / "two.key")}
    api = start_api(**files, wait_ready=False)
    assert api.wait(20) == 1
    (line,) = api.log.read_text().splitlines()
    assert line.endswith(f"--ssl-keyfile {files['ssl_keyfile']}: the private key does not belong to the certificate")


def test_a_port_in_use_is_one_line(model_folder: Path, address: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        lines = failed_start(tmp_path, port=port, address=address, model_path=model_folder)
    assert len(lines) == 1
    assert lines[0].endswith(
        f"cannot listen on 127.0.0.1 port {port}: Address already in use (--port 0 selects a free one)"
    )


def test_a_custom_chat_template(start_api: StartApi, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    api = start_api(chat_template=str(file))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hé"}, {"role": "user", "content": "b"}]}
    prompt = httpx.post(f"{api.url}/v1/chat/completions/render", json=body, timeout=30).json()["prompt"]
    assert prompt == "<Hé><b>"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    assert api.complete().json()["system_fingerprint"] == f"fp_fake-{digest}"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "No such file or directory"),
        (b"{% if %}", "The chat template does not compile"),
        (b"\xff", "invalid start byte"),
        (
            b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "seconds of processor time",
        ),
    ],
)
def test_an_invalid_chat_template(content: bytes | None, text: str, start_api: StartApi, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_bytes(content)
    api = start_api(chat_template=str(file), wait_ready=False)
    assert api.wait(60) == 1
    log = api.log.read_text()
    assert f"--chat-template {file}: " in log
    assert text in log
    assert "Traceback" not in log


def test_an_invalid_default_sampling_is_one_line(start_api: StartApi) -> None:
    api = start_api(default_sampling={"temperature": 5}, wait_ready=False)
    assert api.wait(20) == 1
    (line,) = api.log.read_text().splitlines()
    assert "--default-sampling: Invalid 'temperature': " in line
    assert "<= 2, but got 5" in line


def test_a_model_card_recommends_sampling(address: str, model_folder: Path) -> None:
    config = api_config(
        Settings(default_sampling={"alias": {"top_p": 0.5}}, model="alias"),
        EngineProcess(address),
        model_folder,
        card_sampling={"temperature": 0.2, "top_p": 0.9},
    )
    context = make_context(config)
    if context.models.default.chat_template is not None:
        context.models.default.chat_template.close()
    default = context.models.default.default_sampling
    assert default.values == {"top_p": 0.5, "temperature": 0.2}
    assert default.sources == {"top_p": "--default-sampling", "temperature": "model card"}


def test_a_missing_model_is_one_line(address: str, tmp_path: Path) -> None:
    lines = failed_start(tmp_path, port=0, address=address, model_path=tmp_path / "nowhere.gguf")
    assert len(lines) == 1
    assert "nowhere.gguf" in lines[0]


def failed_start(tmp_path: Path, *, port: int, address: str, model_path: Path) -> list[str]:
    config = api_config(Settings(port=port), EngineProcess(address), model_path)
    process = start_process(config, tmp_path / "log")
    assert process.wait(10) == 1
    return (tmp_path / "log").read_text().splitlines()


@pytest.mark.checklist("G09")
@pytest.mark.parametrize("environment", [{"PYTHONOPTIMIZE": "1"}, {"LC_ALL": "C", "PYTHONHASHSEED": "7"}])
def test_environments(start_api: StartApi, environment: dict[str, str]) -> None:
    api = start_api({"reply": list("Grüße 世界".encode())}, environment=environment)
    assert api.complete().json()["choices"][0]["text"] == "Grüße 世界"
    check_error(api.complete(n=0), 400)
    api.process.terminate()
    assert api.wait(2) == 0


@pytest.mark.checklist("F09")
def test_it_does_not_outlive_its_parent(model_folder: Path, address: str, tmp_path: Path) -> None:
    config = api_config(Settings(port=0, log_level="debug"), EngineProcess(address), model_folder)
    log = tmp_path / "log"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen({COMMAND!r}, stdin=subprocess.PIPE, stderr=open({str(log)!r}, 'wb'))\n"
        f"child.stdin.write({msgspec.json.encode(config)!r})\n"
        "child.stdin.close()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        wait_until(lambda: b"open for health probes" in log.read_bytes(), timeout=20)
        assert not select.select([pidfd], [], [], 0)[0]
        parent.kill()
        assert select.select([pidfd], [], [], 2)[0]
        os.close(pidfd)


@pytest.mark.checklist("B09")
def test_memory_and_sockets(start_api: StartApi, smollm2_path: Path) -> None:
    """With a real tokenizer, after some requests. Only the API's port is listening."""
    api = start_api({"vocab_size": 49152}, model_path=smollm2_path)
    for _ in range(20):
        assert api.complete(stream=True).status_code == 200
    process = psutil.Process(api.process.pid)
    assert process.memory_info().rss < MAX_RSS
    listening = [each for each in process.net_connections(kind="inet") if each.status == psutil.CONN_LISTEN]
    assert [each.laddr.ip for each in listening] == ["127.0.0.1"]


@pytest.mark.checklist("A17")
def test_many_unfinished_bodies_cost_no_more_than_their_budget(start_api: StartApi) -> None:
    """Of 100 bodies of 10 MB that never end. Probes are answered meanwhile, and later bodies still arrive."""
    budget = 64 << 20
    api = start_api(max_buffered_bytes=budget)
    process = psutil.Process(api.process.pid)
    before = process.memory_info().rss
    head = "POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 10485760\r\n\r\n"
    body = b'{"prompt": "' + b"x" * 10_000_000
    lags = []
    with httpx.Client(base_url=api.url) as client:
        for _ in range(2):  # the second time in the same memory
            with ExitStack() as stack:
                for _ in range(50):
                    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port_of(api))))
                    connection.sendall(head.encode() + body)
                    start = time.perf_counter()
                    assert client.get("/healthz").status_code == 200
                    lags.append(time.perf_counter() - start)
                    assert process.memory_info().rss - before < 1.5 * budget
                assert client.post("/tokenize", json={"prompt": "x" * 40_000}).status_code == 200
    assert sorted(lags)[50] < 0.1


def port_of(api: Api) -> int:
    return int(api.url.rsplit(":", 1)[1])


@pytest.mark.checklist("C18")
def test_a_long_text_does_not_delay_others(start_api: StartApi) -> None:
    """Probes are answered while the worst case is tokenized, a text in which each byte is a token."""
    api = start_api()
    body = json.dumps({"prompt": "a" * (1 << 20)}).encode()
    headers = {"content-type": "application/json"}
    request = Background(lambda: httpx.post(api.url + "/tokenize", content=body, headers=headers, timeout=30))
    lags = []
    with httpx.Client(base_url=api.url) as client:
        while not request.ended:
            start = time.perf_counter()
            client.get("/healthz")
            lags.append(time.perf_counter() - start)
    assert request.result().status_code == 200
    lags.sort()
    assert lags[int(len(lags) * 0.9)] < 0.05, lags[-5:]


def test_a_failure_of_the_running_server_is_logged_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, model_folder: Path, address: str
) -> None:
    async def fail(lifecycle: Lifecycle, sockets: list[socket.socket], address: str) -> int:
        for each in sockets:
            each.close()
        raise ValueError("a bug")

    monkeypatch.setattr(Lifecycle, "run", fail)
    config = api_config(Settings(port=0), EngineProcess(address), model_folder)
    assert run(config, lambda: None) == 1
    gc.unfreeze()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.name == "lightwell.api"
    assert record.exc_info is not None


def test_small_responses_are_not_delayed(start_api: StartApi) -> None:
    """Nagle's algorithm together with delayed acknowledgements would delay each by 40 ms."""
    api = start_api()
    with httpx.Client(base_url=api.url) as client:
        client.get("/healthz")
        start = time.perf_counter()
        for _ in range(20):
            client.get("/healthz")
        assert (time.perf_counter() - start) / 20 < 0.02


def test_bind() -> None:
    (first,) = bind("127.0.0.1", 0)
    with first:
        port = first.getsockname()[1]
        assert url(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(OSError, match=f"port {port}: Address already in use"):
            bind("127.0.0.1", port)
    with pytest.raises(OSError, match=r"cannot listen on no\.such\.host\.invalid"):
        bind("no.such.host.invalid", 0)
    sockets = bind("localhost", 0)
    assert len({each.getsockname()[1] for each in sockets}) == 1
    for each in sockets:
        each.close()


def test_all_addresses_are_those_of_ipv6_and_ipv4() -> None:
    *_, last = sockets = bind("::", 0)
    port = last.getsockname()[1]
    assert url(last) == f"http://0.0.0.0:{port}"
    assert [url(each) for each in sockets[:-1]] in ([f"http://[::]:{port}"], [])  # [] if there is no IPv6
    for each in sockets:
        each.close()


@pytest.mark.checklist("A16")
def test_the_file_limit_allows_connections() -> None:
    assert raise_file_limit() >= 16


def test_the_file_limit_is_shared_by_api_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one may hold the connections of all."""
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 5000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    assert raise_file_limit(4) == (5000 - SPARE_FILES) // 4
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1 << 20))
    assert raise_file_limit(4) == MAX_CONNECTIONS
    assert limits == [(5000, 5000), (4 * MAX_CONNECTIONS + SPARE_FILES, 1 << 20)]
