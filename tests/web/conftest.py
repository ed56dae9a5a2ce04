"""Fixtures for tests of the page: Chromium, and a real server with a real model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.conftest import start_server  # noqa: F401  (a fixture)
from tests.support.browser import CHROMIUM, NO_CHROMIUM, PageWatch, running_browser
from tests.support.server_process import COMPLETIONS, MODEL, REQUEST_SECONDS, ServerProcess, shared_server

FLAGS = ("--max-num-seqs=64", "--max-model-len=2048", "--kv-cache-memory=256MiB", "--record-requests=64")
ACTION_SECONDS = 60.0  # bounds hangs only
FLAGS_OF_A_LONG_ANSWER = ("--max-model-len=8192", "--kv-cache-memory=256MiB", "--speculative=off")


@pytest.fixture(scope="session")
def real_server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """A server that the tests of all views share."""
    with shared_server(smollm2_path, *FLAGS) as server:
        yield server


# Not for the session: while Playwright runs, no other event loop can run in this thread, which other tests need.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    with running_browser() as browser:
        yield browser


@contextmanager
def long_answer(server: ServerProcess, **headers: str) -> Iterator[None]:
    """Stream an answer that is aborted after the block. The server needs `FLAGS_OF_A_LONG_ANSWER`."""
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", COMPLETIONS, json=body, headers=headers) as response:
        lines = response.iter_lines()  # the stream ends when nothing refers to it any more
        next(lines)
        yield


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page with nothing in its storage. The test fails if `PageWatch` has seen a problem on it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(1000 * ACTION_SECONDS)
    expect.set_options(timeout=1000 * ACTION_SECONDS)
    context.set_default_navigation_timeout(1000 * REQUEST_SECONDS)
    page = context.new_page()
    watch = PageWatch(page)
    yield page
    context.close()
    assert watch.problems == []
