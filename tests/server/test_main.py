"""Tests of `python -m server.main` as a process: start, shutdown, and what clients see of them."""

import dataclasses
import gc
import hashlib
import json
import os
import re
import resource
import select
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from engine.shared.messages import LoadAdapter
from server.api_server import MAX_CONNECTIONS, SPARE_FILES, raise_file_limit
from server.main import Lifecycle, client_url, first_steps, make_context, run
from server.processes import supervisor_channel as messages
from server.processes.supervisor_channel import Channel, make_channel
from server.settings.process_configs import EngineProcess
from server.settings.table import Settings
from server.sockets import bind, url
from tests.support.api_process import COMMAND, SECONDS, Api, api_process
from tests.support.clients import write_adapter
from tests.support.fake_engine import FakeEngineConfig, fake_engine_process
from tests.support.paths import ROOT
from tests.support.serving import api_config, check_envelope, check_error, make_test_context, raw_request, wait_until

MAX_RSS = 150 << 20
TLS = ROOT / "tests/support/tls"
CERTIFICATE = {"ssl_certfile": str(TLS / "one.crt"), "ssl_keyfile": str(TLS / "one.key")}


StartApi = Callable[..., Api]
POOL = ThreadPoolExecutor()  # for requests that others wait for


@pytest.fixture
def start_api(address: str, model_folder: Path, tmp_path: Path) -> Iterator[StartApi]:
    """A function that starts an API process and waits for it: `start_api({engine settings}, **settings)`."""
    with ExitStack() as stack:

        def start(engine: dict[str, Any] | None = None, *, wait_ready: bool = True, **options: Any) -> Api:
            config, model_path = FakeEngineConfig(address=address, **(engine or {})), options.pop("model", model_folder)
            api = stack.enter_context(api_process(config, model_path, tmp_path, **options))
            if wait_ready:
                api.wait_until_ready()
            return api

        yield start


def last_error(response: httpx.Response) -> dict[str, Any]:
    """Return the error from the last event of a stream."""
    *_, error, done, end = response.content.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    return check_envelope(error.removeprefix(b"data: "))


def both_running(api: Api, **body: Any) -> "tuple[Future[httpx.Response], ...]":
    """Return a request without a stream and one with it, which run."""
    requests = tuple(POOL.submit(api.complete, stream=stream, **body) for stream in (False, True))
    wait_until(lambda: api.count("running") == 2)
    return requests


SLOW = {"endless": True, "step_seconds": 1.0}  # far slower than a test, until it is changed


# The end.


@pytest.fixture
def channel() -> Iterator[tuple[Channel, Channel]]:
    """The supervisor's end of a channel, and that of the API process."""
    own, other = make_channel()
    with closing(own), closing(other):
        yield own, other


def received(channel: Channel, before: list[messages.Message]) -> list[messages.Message]:
    """Append what has come to the messages that came before."""
    before.extend(channel.receive())
    return before


@pytest.mark.checklist("G01", "B09")
def test_an_idle_process_until_sigterm(
    start_api: StartApi, channel: tuple[Channel, Channel], smollm2_path: Path
) -> None:
    """It beats, and can write its stacks also if its event loop is stuck. Only the API's port is listening."""
    supervisor, api_end = channel
    api = start_api({"vocab_size": 49152}, model=smollm2_path, supervisor_fd=api_end.fileno())
    for stream in (False, *[True] * 20):
        assert api.complete(stream=stream).status_code == 200
    supervisor.receive()
    beats: list[messages.Message] = []
    wait_until(lambda: len(received(supervisor, beats)) >= 2)
    assert set(beats) == {messages.Heartbeat((os.getpid(),))}
    process = psutil.Process(api.process.pid)
    assert process.memory_info().rss < MAX_RSS
    listening = [each for each in process.net_connections(kind="inet") if each.status == psutil.CONN_LISTEN]
    assert [each.laddr.ip for each in listening] == ["127.0.0.1"]
    for signum in (messages.DUMP_SIGNAL, signal.SIGINT):  # Ctrl-C is the supervisor's
        api.process.send_signal(signum)
    wait_until(lambda: "most recent call first" in api.log)
    assert api.complete().status_code == 200
    assert api.end() == 0


@pytest.mark.checklist("G02")
def test_sigterm_lets_running_requests_finish(start_api: StartApi) -> None:
    api = start_api(SLOW)
    plain, stream = both_running(api, max_tokens=30)
    api.process.terminate()
    wait_until(lambda: api.get("/readyz").status_code == 503)
    refused = api.complete()
    check_error(refused, 503)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["connection"] == "close"
    api.engine.config.step_seconds = 0.0
    assert plain.result(SECONDS).json()["usage"]["completion_tokens"] == 30
    assert stream.result(SECONDS).text.endswith("data: [DONE]\n\n")
    assert "error" not in stream.result(SECONDS).text
    assert api.wait() == 0


def test_sigterm_lets_requests_of_workers_finish(start_api: StartApi) -> None:
    """All processes drain at once. The coordinator does not leave before the worker."""
    api = start_api(SLOW, num_workers=1)
    worker = psutil.Process(api.workers[0].pid)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 40, "stream": True}
    clients: list[httpx.Client] = []
    with ExitStack() as stack:

        def worker_has_connection() -> bool:
            stack.close()
            clients.append(stack.enter_context(httpx.Client(base_url=api.url, timeout=SECONDS)))
            clients[-1].get("/healthz")
            return bool(worker.net_connections("tcp"))

        wait_until(worker_has_connection)
        stream = POOL.submit(clients[-1].post, "/v1/completions", json=body)
        wait_until(lambda: api.count("running") == 1)
        for process in (api.process, *api.workers):
            process.terminate()
        wait_until(lambda: api.status("/readyz") != 200)
        api.engine.config.step_seconds = 0.0
        assert stream.result(SECONDS).text.endswith("data: [DONE]\n\n")
        assert "error" not in stream.result(SECONDS).text
        assert api.wait() == 0


def test_a_client_that_is_slow_to_close_is_no_failure(start_api: StartApi) -> None:
    """A TLS connection is closed once the client answers, which these do not. The coordinator waits for the worker."""
    api = start_api(num_workers=1, wait_ready=False, **CERTIFICATE)
    worker = psutil.Process(api.workers[0].pid)
    context = ssl._create_unverified_context()
    with ExitStack() as stack:

        def worker_has_connection() -> bool:
            with suppress(OSError):
                connection = context.wrap_socket(socket.create_connection(("127.0.0.1", api.port)))
                stack.enter_context(connection).sendall(raw_request("GET", "/readyz"))
                assert connection.recv(1000).startswith(b"HTTP/1.1 ")
            return bool(worker.net_connections("tcp"))

        wait_until(worker_has_connection)
        assert api.end() == 0
    assert "died" not in api.log


def test_requests_that_outlast_the_drain_timeout_fail(start_api: StartApi) -> None:
    api = start_api(SLOW, drain_timeout=0.5)
    plain, stream = both_running(api, max_tokens=2000)
    assert api.end() == 0
    check_error(plain.result(SECONDS), 503)
    assert last_error(stream.result(SECONDS))["type"] == "service_unavailable_error"


def test_draining_does_not_wait_for_adapters(start_api: StartApi, tmp_path: Path) -> None:
    api = start_api({"max_loras": 2, "ignores_adapters": True}, allow_runtime_lora_updating=True)
    body = {"lora_name": "go", "lora_path": str(write_adapter(tmp_path / "go"))}
    load = POOL.submit(api.post, "/v1/load_lora_adapter", **body)
    wait_until(lambda: any(isinstance(message, LoadAdapter) for message in api.engine.received))
    assert api.end() == 0
    assert "shutting down" in check_error(load.result(SECONDS), 503)["message"]


def test_draining_does_not_wait_for_downloads(start_api: StartApi) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:  # never responds
        endpoint = f"http://127.0.0.1:{hub.getsockname()[1]}"
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        api = start_api({"max_loras": 2}, environment=environment, allow_runtime_lora_updating=True)
        load = POOL.submit(api.post, "/v1/load_lora_adapter", lora_name="go", lora_path="org/go")
        hub.settimeout(SECONDS)
        with hub.accept()[0]:
            assert api.end() == 0
        assert "shutting down" in check_error(load.result(SECONDS), 503)["message"]


def test_a_second_sigterm_ends_it_at_once(start_api: StartApi) -> None:
    api = start_api(SLOW, drain_timeout=600.0)
    POOL.submit(api.complete, max_tokens=2000)
    wait_until(lambda: api.count("running") == 1)
    api.process.terminate()
    wait_until(lambda: api.get("/readyz").status_code == 503)
    assert api.end() == 1


@pytest.mark.checklist("G04")
@pytest.mark.parametrize("dies", [False, True], ids=["SIGTERM", "death of the engine"])
def test_an_end_while_the_engine_loads(start_api: StartApi, dies: bool) -> None:
    api = start_api({"never_ready": True}, dies=dies, wait_ready=False)
    wait_until(lambda: api.status("/healthz") == 200)
    assert "listening" not in api.log
    if dies:
        api.engine.kill()
        assert api.wait() == 1
    else:
        assert api.end() == 0


@pytest.mark.checklist("F02", "F05")
def test_death_of_the_engine(start_api: StartApi) -> None:
    api = start_api(SLOW, dies=True)
    plain, stream = both_running(api, max_tokens=2000)
    os.kill(api.engine.pid, signal.SIGKILL)
    check_error(plain.result(SECONDS), 503)
    assert last_error(stream.result(SECONDS))["code"] == "engine_unavailable"
    for path in ("/health", "/healthz"):
        check_error(api.get(path), 503)
    check_error(api.complete(), 503)
    assert api.wait() == 1
    assert "the engine died" in api.log


def test_restart_of_the_engine(start_api: StartApi, address: str, channel: tuple[Channel, Channel]) -> None:
    supervisor, api_end = channel
    api = start_api(SLOW | {"max_num_seqs": 1}, dies=True, supervisor_fd=api_end.fileno())
    pid = api.engine.pid
    beats: list[messages.Message] = []
    assert received(supervisor, beats)[0] == messages.Heartbeat()
    wait_until(lambda: received(supervisor, beats)[-1] == messages.Heartbeat((pid,)))
    process = psutil.Process(api.process.pid)
    num_fds = process.num_fds()
    running_stream = POOL.submit(api.complete, max_tokens=2000, stream=True)
    wait_until(lambda: api.count("running") == 1)
    waiting = POOL.submit(api.complete, max_tokens=5)
    wait_until(lambda: api.count("waiting") == 1)
    os.kill(pid, signal.SIGKILL)
    assert last_error(running_stream.result(SECONDS))["code"] == "engine_unavailable"
    for path in ("/health", "/readyz"):
        response = api.get(path)
        state = response.json()
        assert (response.status_code, state["status"], state["restarts"]) == (503, "restarting", 1)
        assert state["error"]["code"] == "engine_unavailable"
    assert api.get("/healthz").json() == {"status": "ok", "restarts": 1}
    with fake_engine_process(FakeEngineConfig(address=address, max_num_seqs=1)) as another:
        supervisor.send(messages.EngineStarted(0, another.pid))
        assert waiting.result(SECONDS).status_code == 200
        assert api.get("/readyz").json() == {"status": "ok", "restarts": 1}
        wait_until(lambda: messages.Heartbeat((another.pid,)) in supervisor.receive())
        wait_until(lambda: process.num_fds() <= num_fds)  # nothing of the engine that died is left
    last = POOL.submit(api.complete)
    wait_until(lambda: api.get("/health").status_code == 503)
    supervisor.send(messages.EngineGone(0, "five deaths"))
    assert api.wait() == 1
    check_error(last.result(SECONDS), 503)
    assert "the engine died: five deaths" in api.log


@pytest.mark.checklist("F09")
def test_it_does_not_outlive_its_parent(model_folder: Path, address: str, tmp_path: Path) -> None:
    config = api_config(Settings(port=0, log_level="debug"), EngineProcess(address), model_folder)
    log = tmp_path / "log"
    (tmp_path / "config").write_bytes(msgspec.json.encode(config))
    code = f"""
import subprocess, time
child = subprocess.Popen({COMMAND}, stdin=open("{tmp_path}/config"), stderr=open("{log}", "wb"))
print(child.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        wait_until(lambda: b"open for health probes" in log.read_bytes())
        assert not select.select([pidfd], [], [], 0)[0]
        parent.kill()
        assert select.select([pidfd], [], [], SECONDS)[0]
        os.close(pidfd)


# The start.


@pytest.mark.checklist("B07", "G09")
@pytest.mark.parametrize("log_format", ["human", "json"])
def test_logs_contain_no_prompt_and_no_key(start_api: StartApi, tmp_path: Path, log_format: str) -> None:
    """The curl command works with the key, and the file for `lightwell chat` lasts as long as the server.

    The environment is an unusual one.
    """
    environment = {"XDG_RUNTIME_DIR": str(tmp_path), "PYTHONOPTIMIZE": "1", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    settings = {"api_key": ("key-canary",), "log_level": "debug", "log_format": log_format}
    api = start_api({"reply": list("reply-canary Grüße 世界".encode())}, environment=environment, **settings)
    headers = {"authorization": "Bearer key-canary", "content-type": "application/json"}
    for stream in (False, True):
        body = {"model": "tiny", "prompt": "prompt-canary", "stream": stream, "max_tokens": 40, "user": "user-canary"}
        response = httpx.post(api.url + "/v1/completions", json=body, headers=headers)
        assert stream or response.json()["choices"][0]["text"] == "reply-canary Grüße 世界"
    for content in (b"\x00canary", b'{"model": "tiny", "prompt": "canary", "n": 0}'):
        check_error(httpx.post(api.url + "/v1/completions", content=content, headers=headers), 400)
    check_error(httpx.get(api.url + "/v1/models", headers={"authorization": "Bearer other-canary"}), 401)
    folder = tmp_path / "lightwell"
    wait_until(lambda: list(folder.glob("*.json")))
    assert json.loads((folder / f"{api.process.pid}.json").read_text()) == {"url": api.url, "model": "tiny"}
    if log_format == "json":
        record = api.announced
        assert record["message"] == f"tiny is ready, listening on {api.url}"
        assert record["base_url"] == f"{api.url}/v1"
        assert record["chat"] == f"lightwell chat --url {api.url} --api-key YOUR_KEY"
        assert_curl_works(record["curl"].replace("YOUR_KEY", "key-canary"))
    assert api.end() == 0
    assert list(folder.iterdir()) == []
    assert "/v1/completions" in api.log
    assert "canary" not in api.log
    if log_format == "json":
        assert all(json.loads(line)["level"] for line in api.log.splitlines())


def test_a_hangup_changes_the_keys(start_api: StartApi, tmp_path: Path) -> None:
    """The supervisor starts the process with the signal blocked."""
    file = tmp_path / "keys.yaml"
    first, second = (f"alice: {{keys: {hashlib.sha256(key).hexdigest()}}}" for key in (b"first", b"second"))
    file.write_text(first)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    try:
        api = start_api(api_keys_file=str(file))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def statuses() -> list[int]:
        headers = [{"authorization": f"Bearer {key}"} for key in ("first", "second")]
        return [httpx.get(f"{api.url}/v1/models", headers=each).status_code for each in headers]

    assert statuses() == [200, 401]
    file.write_text(second)
    api.process.send_signal(signal.SIGHUP)
    wait_until(lambda: statuses() == [401, 200])


def assert_curl_works(command: str) -> None:
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant", done.stdout


def test_a_unix_socket(start_api: StartApi, tmp_path: Path) -> None:
    """The server is announced with it, the curl command works, and the file is removed at the end."""
    path = tmp_path / "l w.sock"
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    api = start_api(uds=str(path), log_format="json", wait_ready=False, environment=environment)
    assert api.announced["base_url"] == f"unix:{path}"
    assert "chat" not in api.announced
    assert_curl_works(api.announced["curl"])
    (file,) = (tmp_path / "lightwell").iterdir()
    assert json.loads(file.read_bytes())["url"] == f"unix:{path}"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://llm.example.org") as client:
        assert client.get("/v1/models").status_code == 200  # as a proxy passes the name on
    assert api.end() == 0
    assert not path.exists()


def test_a_certificate_and_a_chat_template(start_api: StartApi, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    api = start_api(**CERTIFICATE, chat_template=str(file), log_format="json", wait_ready=False)
    https = api.url.replace("http:", "https:")
    assert api.announced["base_url"] == f"{https}/v1"
    with httpx.Client(base_url=https, verify=ssl.create_default_context(cafile=TLS / "one.crt")) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hé"}, {"role": "user", "content": "b"}]}
        assert client.post("/v1/chat/completions/render", json=body).json()["prompt"] == "<Hé><b>"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}).json()
        assert answer["system_fingerprint"] == f"fp_fake-{digest}"
    assert api.end() == 0


ENDLESS_TEMPLATE = b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_what_no_server_starts_with(
    caplog: pytest.LogCaptureFixture, model_folder: Path, address: str, tmp_path: Path
) -> None:
    cases: list[tuple[dict[str, Any], bytes, str]] = [
        (CERTIFICATE | {"ssl_keyfile": str(TLS / "two.key")}, b"", "the private key does not belong to the certifi"),
        ({"default_sampling": {"temperature": 5}}, b"", "--default-sampling: Invalid 'temperature': .*<= 2, but got 5"),
        ({"model": "/nowhere.gguf"}, b"", r"/nowhere\.gguf"),
        ({"chat_template": f"{tmp_path}/T.gone"}, b"", r"--chat-template .*T\.gone: .*No such file or directory"),
        ({"chat_template": f"{tmp_path}/T"}, b"{% if %}", "--chat-template .*: The chat template does not compile"),
        ({"chat_template": f"{tmp_path}/T"}, b"\xff", "--chat-template .*: .*invalid start byte"),
        ({"chat_template": f"{tmp_path}/T"}, ENDLESS_TEMPLATE, "--chat-template .*: .*seconds of processor time"),
    ]
    for settings, template, message in cases:
        caplog.clear()
        (tmp_path / "T").write_bytes(template)
        path = Path(settings.get("model", model_folder))
        assert run(api_config(Settings(port=0, **settings), EngineProcess(address), path), lambda: None) == 1
        (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert re.search(message, record.message)
        assert record.exc_info is None


def test_a_failure_of_the_running_server_is_logged_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, model_folder: Path, address: str
) -> None:
    async def fail(lifecycle: Lifecycle, sockets: list[socket.socket], address: str) -> int:
        for each in sockets:
            each.close()
        raise ValueError("a bug")

    monkeypatch.setattr(Lifecycle, "run", fail)
    assert run(api_config(Settings(port=0), EngineProcess(address), model_folder), lambda: None) == 1
    gc.unfreeze()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.name == "lightwell.api"
    assert record.exc_info is not None


def test_a_model_card_recommends_sampling(address: str, model_folder: Path) -> None:
    settings, card = Settings(default_sampling={"m": {"top_p": 0.5}}, model="m"), {"temperature": 0.2, "top_p": 0.9}
    config = api_config(settings, EngineProcess(address), model_folder, card_sampling=card)
    model = make_context(config).models.default
    if model.chat_template is not None:
        model.chat_template.close()
    assert model.default_sampling.values == {"top_p": 0.5, "temperature": 0.2}
    assert model.default_sampling.sources == {"top_p": "--default-sampling", "temperature": "model card"}


# Large requests.


@pytest.mark.checklist("A17")
def test_many_unfinished_bodies_cost_no_more_than_their_budget(start_api: StartApi) -> None:
    """Of 100 bodies of 10 MB that never end. Probes are answered meanwhile, and later bodies still arrive."""
    budget = 64 << 20
    api = start_api(max_buffered_bytes=budget)
    process = psutil.Process(api.process.pid)
    before = process.memory_info().rss
    head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
    body = b'{"prompt": "' + b"x" * 10_000_000
    with httpx.Client(base_url=api.url, timeout=SECONDS) as client:
        for _ in range(2):  # the second time in the same memory
            with ExitStack() as stack:
                for _ in range(50):
                    connection = stack.enter_context(socket.create_connection(("127.0.0.1", api.port)))
                    connection.sendall(head.format(10 << 20).encode() + body)
                    assert client.get("/healthz").status_code == 200
                    assert process.memory_info().rss - before < 1.5 * budget
                assert client.post("/v1/completions", json={"prompt": "x" * 40_000}).status_code == 400


# Sockets and limits.


def test_bind() -> None:
    (first,) = bind("127.0.0.1", 0)
    with first:
        port = first.getsockname()[1]
        assert url(first) == f"http://127.0.0.1:{port}"
        message = rf"^cannot listen on 127.0.0.1 port {port}: Address already in use \(--port 0 selects a free one\)"
        with pytest.raises(OSError, match=message):
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
def test_the_file_limit_allows_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is shared by several API processes, of which the first one may hold the connections of all."""
    assert raise_file_limit() >= 16
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 5000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    assert raise_file_limit(4) == (5000 - SPARE_FILES) // 4
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1 << 20))
    assert raise_file_limit(4) == MAX_CONNECTIONS
    assert limits == [(5000, 5000), (4 * MAX_CONNECTIONS + SPARE_FILES, 1 << 20)]


def test_clients_cannot_call_a_wildcard() -> None:
    for listening, shown in (
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://0.0.0.0:8000", "http://127.0.0.1:8000"),
        ("http://[::]:1", "http://[::1]:1"),
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000"),
    ):
        assert client_url(listening) == shown, listening


def test_what_is_shown_depends_on_the_port_and_the_chat_template(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    context = make_test_context("ipc:///nowhere", model_folder, chat_template=str(tmp_path / "chat.jinja"))
    model = context.models.default
    assert model.chat_template is not None
    model.chat_template.close()
    assert first_steps(context, "http://127.0.0.1:8000")["chat"] == "lightwell chat"  # the default port
    assert first_steps(context, "http://127.0.0.1:1")["chat"] == "lightwell chat --url http://127.0.0.1:1"
    context.models.slots[0].served = dataclasses.replace(model, chat_template=None)
    steps = first_steps(context, "http://127.0.0.1:8000")
    assert "chat" not in steps
    assert "/v1/completions -H" in str(steps["curl"])
