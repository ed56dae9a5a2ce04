"""Chat templates that fail, loop, eat memory or end their process harm only what they render."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.http.errors import EngineUnavailableError
from server.parts.hardening import template_processes as renderer
from server.parts.hardening.processes import _Process
from server.parts.hardening.template_processes import MAX_DATA_BYTES, MAX_SECONDS, TemplateProcesses
from server.parts.hardening.turns import STUCK_SECONDS
from server.text.templates.sandbox import ChatTemplateError, SandboxedTemplate, TemplateLimitError
from tests.server.api.test_admin import statuses
from tests.server.conftest import StartServer
from tests.support.clients import CHAT, ask
from tests.support.examples import num_examples
from tests.support.processes import template_processes, wait_for_end_of
from tests.support.serving import check_error, wait_until

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(x=['a' * 9999]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
HOSTILE = (
    f"{{% if text == 'loop' %}}{LOOP}{{% elif text == 'grow' %}}{GROW}{{% elif text == 'fail' %}}"
    "{{ raise_exception('no') }}{% endif %}{{ text }}"
)


@pytest.fixture(scope="module")
def hostile() -> Iterator[TemplateProcesses]:
    with closing(TemplateProcesses(HOSTILE)) as running:
        yield running


@pytest.fixture(scope="module")
def echo() -> Iterator[TemplateProcesses]:
    with closing(TemplateProcesses("{{ value | tojson }}{{ bos_token }}")) as running:
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


@pytest.mark.parametrize("source", ["{{ 'a' * 10**9 }}", "{{ 10**9 * [1] }}", "{{ 10 ** (10 ** 10) }}"])
def test_one_operation_is_limited_too(source: str) -> None:
    with pytest.raises((ChatTemplateError, TemplateLimitError)), closing(TemplateProcesses(source)) as running:
        running.render({})


@contextmanager
def suspended(renderer: TemplateProcesses) -> Iterator[psutil.Process]:
    """Stop the process that renders next, and let it go on at the end. Yield it."""
    process = psutil.Process(renderer._processes._idle[-1]._process.pid)
    process.suspend()
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def test_errors_are_those_of_the_sandbox(hostile: TemplateProcesses) -> None:
    with pytest.raises(ChatTemplateError) as expected:
        SandboxedTemplate(HOSTILE).render({"text": "fail"})
    with pytest.raises(ChatTemplateError, match=f"^{expected.value}$"):
        hostile.render({"text": "fail"})
    with pytest.raises(ChatTemplateError, match="does not compile"):
        TemplateProcesses("{% if %}")


def test_processes_that_are_killed_are_replaced(hostile: TemplateProcesses) -> None:
    for signum in (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM):
        hostile._processes._idle.extend(_Process(renderer.COMMAND, HOSTILE.encode()) for _ in range(2))
        for process in template_processes():
            process.send_signal(signum)
        for _ in range(3):
            assert hostile.render({"text": "a"}) == "a"


def test_a_process_that_hangs_is_replaced() -> None:
    with closing(TemplateProcesses("{{ text }}")) as running, suspended(running) as process:
        running._processes._idle[-1]._connection.settimeout(0.01)  # which is over before a stopped process answers
        assert running.render({"text": "a"}) == "a"
        wait_for_end_of(process.pid)


def test_no_process_can_live(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(TemplateProcesses("{{ text }}")) as running:
        monkeypatch.setattr(renderer, "COMMAND", ("false",))
        monkeypatch.setattr(running._processes, "_command", renderer.COMMAND)
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
    with closing(TemplateProcesses("{{ text }}")) as running:
        own = [process.pid for process in set(template_processes()) - before]
        assert own
    wait_for_end_of(*own)
    with pytest.raises(EngineUnavailableError):
        running.render({"text": "a"})


def test_a_process_ends_with_what_it_belongs_to() -> None:
    """The parent, even if it is killed, and the object."""
    code = "from server.parts.hardening.template_processes import *; t = TemplateProcesses('a'); print(1); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=os.getcwd()) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        (child,) = template_processes(psutil.Process(parent.pid))
        parent.kill()
        wait_for_end_of(child.pid)
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


@settings(max_examples=num_examples(40, 300), deadline=None)
@given(value=JSON, bos_token=st.text())
def test_variables_arrive_as_they_are(echo: TemplateProcesses, value: Any, bos_token: str) -> None:
    variables = {"value": value, "bos_token": bos_token}
    assert echo.render(variables) == SandboxedTemplate(echo.source).render(variables)


def test_any_size_arrives(echo: TemplateProcesses) -> None:
    for size in (0, 1, 65_535, 65_536, 8 << 20):
        assert echo.render({"value": 1, "bos_token": "ä" * size}) == "1" + "ä" * size


@pytest.mark.checklist("B10", "C20")
def test_others_are_served_beside_a_template_that_loops(start_server: StartServer, tmp_path: Path) -> None:
    source = HOSTILE.replace("text", "message.content")
    (tmp_path / "chat.jinja").write_text(f"{{% for message in messages %}}{source}{{% endfor %}}")
    server = start_server(chat_template=str(tmp_path / "chat.jinja"))
    template = server.model.chat_template
    assert template is not None
    running = template._renderer
    assert isinstance(running, TemplateProcesses)

    def post(content: str) -> httpx.Response:
        chat = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
        return httpx.post(server.url + "/v1/chat/completions", json=chat)

    with ThreadPoolExecutor(1) as pool:
        with suspended(running):
            looping = pool.submit(post, "loop")
            wait_until(lambda: not running._processes._idle)
            assert [post("a").status_code for _ in range(3)] == [200] * 3
            assert not looping.done()
        error = check_error(looping.result(), 400)
    assert (error["param"], "2 seconds of processor time" in error["message"]) == ("messages", True)


@pytest.mark.checklist("G05")
def test_work_on_texts_that_hangs(start_server: StartServer, threads: ThreadPoolExecutor) -> None:
    """Readiness comes back by itself, when there is progress again."""
    others = template_processes()
    server = start_server()
    processes = set(template_processes()) - set(others)
    for process in processes:
        process.suspend()
    answer = threads.submit(ask, server.url, CHAT)
    text_threads: Any = server.context.text_threads
    wait_until(lambda: text_threads._short_work)
    assert statuses(server) == (200, 200, 200)
    server.turn(STUCK_SECONDS + 1)
    assert statuses(server) == (503, 200, 503)
    for process in processes:
        process.resume()
    assert answer.result().status_code == 200
    assert statuses(server) == (200, 200, 200)
