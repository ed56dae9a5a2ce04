"""Chat templates that loop, eat memory or end their process harm only the requests that they render."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.http.errors import EngineUnavailableError
from server.text.templates import chat_template, renderer
from server.text.templates.chat_template import ChatTemplate
from server.text.templates.process import MAX_DATA_BYTES, MAX_SECONDS
from server.text.templates.renderer import TemplateLimitError, TemplateProcesses
from server.text.templates.sandbox import ChatTemplateError, SandboxedTemplate
from tests.support.processes import template_processes, wait_for_end_of
from tests.support.serving import RunningServer, check_error, fresh_server

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(x=['a' * 9999]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
HOSTILE = (
    f"{{% if text == 'loop' %}}{LOOP}{{% elif text == 'grow' %}}{GROW}{{% elif text == 'fail' %}}"
    "{{ raise_exception('no') }}{% endif %}{{ text }}"
)


@contextmanager
def processes(source: str) -> Iterator[TemplateProcesses]:
    running = TemplateProcesses(source)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def hostile() -> Iterator[TemplateProcesses]:
    with processes(HOSTILE) as running:
        yield running


@pytest.fixture(scope="module")
def echo() -> Iterator[TemplateProcesses]:
    with processes("{{ value | tojson }}{{ bos_token }}") as running:
        yield running


@pytest.mark.checklist("B10")
def test_a_loop_is_stopped(hostile: TemplateProcesses) -> None:
    with pytest.raises(TemplateLimitError, match=f"more than {MAX_SECONDS:g} seconds of processor time"):
        hostile.render({"text": "loop"})
    assert hostile.render({"text": "a"}) == "a"


@pytest.mark.checklist("B10")
def test_memory_is_limited(hostile: TemplateProcesses) -> None:
    for _ in range(3):
        with pytest.raises(ChatTemplateError, match="too large"):
            hostile.render({"text": "grow"})
        assert hostile.render({"text": "a"}) == "a"
    assert all(process.memory_info().rss < MAX_DATA_BYTES + (100 << 20) for process in template_processes())


@pytest.mark.checklist("B10")
def test_others_are_rendered_beside_a_loop(hostile: TemplateProcesses) -> None:
    with ThreadPoolExecutor(1) as pool:
        looping = pool.submit(hostile.render, {"text": "loop"})
        for number in range(50):
            assert hostile.render({"text": str(number)}) == str(number)
        assert not looping.done()
        assert isinstance(looping.exception(), TemplateLimitError)


def test_errors_are_those_of_the_sandbox(hostile: TemplateProcesses) -> None:
    with pytest.raises(ChatTemplateError) as expected:
        SandboxedTemplate(HOSTILE).render({"text": "fail"})
    with pytest.raises(ChatTemplateError) as found:
        hostile.render({"text": "fail"})
    assert str(found.value) == str(expected.value)
    with pytest.raises(ChatTemplateError, match="does not compile"):
        TemplateProcesses("{% if %}")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_process_that_is_killed_is_replaced(hostile: TemplateProcesses, signum: int) -> None:
    for process in template_processes():
        process.send_signal(signum)
    assert hostile.render({"text": "a"}) == "a"


def test_several_idle_processes_are_killed() -> None:
    source = "{{ text }}"
    with processes(source) as running:
        running._idle.extend(renderer._Process(source) for _ in range(3))
        for process in template_processes():
            process.kill()
        for _ in range(5):
            assert running.render({"text": "a"}) == "a"


def test_a_process_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "MAX_WAITING_SECONDS", 5.0)
    before = set(template_processes())
    with processes("{{ text }}") as running:
        (process,) = set(template_processes()) - before
        process.suspend()
        assert running.render({"text": "a"}) == "a"
        wait_for_end_of(process.pid)


def test_no_process_can_live(monkeypatch: pytest.MonkeyPatch) -> None:
    with processes("{{ text }}") as running:
        monkeypatch.setattr(renderer, "COMMAND", ("false",))
        for process in template_processes():
            process.kill()
        for _ in range(2):
            with pytest.raises(EngineUnavailableError):
                running.render({"text": "a"})
        with pytest.raises(OSError, match="exit code 1"):
            TemplateProcesses("a")
        monkeypatch.undo()
        assert running.render({"text": "a"}) == "a"


def test_closing_ends_the_processes() -> None:
    before = set(template_processes())
    with processes("{{ text }}") as running:
        own = [process.pid for process in set(template_processes()) - before]
        assert own
    wait_for_end_of(*own)
    with pytest.raises(EngineUnavailableError):
        running.render({"text": "a"})


def test_a_process_ends_with_its_parent() -> None:
    """Even if the parent is killed."""
    code = "from server.text.templates.renderer import TemplateProcesses; t = TemplateProcesses('a'); print(1); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=os.getcwd()) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        (child,) = template_processes(psutil.Process(parent.pid))
        parent.kill()
        wait_for_end_of(child.pid)


def test_processes_end_with_what_they_belong_to() -> None:
    running = TemplateProcesses("a")
    assert running.render({}) == "a"
    (child,) = template_processes(psutil.Process())
    del running
    gc.collect()
    wait_for_end_of(child.pid)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300)
@given(value=JSON, bos_token=st.text())
def test_variables_arrive_as_they_are(echo: TemplateProcesses, value: Any, bos_token: str) -> None:
    variables = {"value": value, "bos_token": bos_token}
    assert echo.render(variables) == SandboxedTemplate(echo.source).render(variables)


def test_any_size_arrives(echo: TemplateProcesses) -> None:
    for size in (0, 1, 65_535, 65_536, 8 << 20):
        assert echo.render({"value": 1, "bos_token": "ä" * size}) == "1" + "ä" * size


def test_an_examination_that_takes_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_PROBING_SECONDS", 0.2)
    slow = "{% for i in range(99999) %}{% endfor %}" * 10
    with processes(slow) as running, pytest.raises(TemplateLimitError, match="to be examined"):
        ChatTemplate(running, bos_token=None, eos_token=None)


# Over real sockets.

REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "loop"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "loop"}], "max_tokens": 1},
    "/v1/responses": {"input": "loop"},
    "/tokenize": {"messages": [{"role": "user", "content": "loop"}]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "loop"}]},
    "/v1/chat/completions/render": {"messages": [{"role": "user", "content": "loop"}]},
    "/api/chat": {"messages": [{"role": "user", "content": "loop"}], "stream": False},
}


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose template loops if a message says so."""
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    source = HOSTILE.replace("text", "message.content")
    file.write_text(f"{{% for message in messages %}}{source}{{% endfor %}}")
    with fresh_server(model_folder, chat_template=str(file)) as server:
        yield server


@pytest.mark.checklist("C20")
@pytest.mark.parametrize("path", REQUESTS)
def test_a_request_for_which_the_template_loops(server: RunningServer, path: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        looping = pool.submit(httpx.post, server.url + path, json={"model": "tiny"} | REQUESTS[path], timeout=60)
        time.sleep(0.2)
        check_chat(server)
        assert not looping.done()
        response = looping.result()
    assert response.status_code == 400
    assert "2 seconds of processor time" in response.text
    if path == "/v1/chat/completions":
        assert check_error(response, 400)["param"] == "messages"
    check_chat(server)


def check_chat(server: RunningServer) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    assert httpx.post(server.url + "/v1/chat/completions", json=chat, timeout=60).status_code == 200
    assert (
        httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "a"}, timeout=60).status_code == 200
    )
