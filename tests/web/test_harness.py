"""The checks of a page notice what must not happen."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from tests.support.browser import PageWatch, check_accessibility
from tests.support.server_process import REQUEST_SECONDS, ServerProcess
from tests.support.serving import wait_until

INLINE = "const script = document.createElement('script'); script.textContent = '1'; document.body.append(script)"
MISSING = "fetch('assets/missing.js')"


@pytest.fixture
def watched(browser: Browser, real_server: ServerProcess) -> Iterator[tuple[Page, PageWatch]]:
    """The first page, and what has been noticed on it."""
    page = browser.new_page()
    page.set_default_timeout(1000 * REQUEST_SECONDS)
    watch = PageWatch(page)
    page.goto(real_server.url)
    yield page, watch
    page.close()


def wait_for_problem(page: Page, watch: PageWatch, problem: str) -> None:
    def is_noticed() -> bool:
        page.wait_for_timeout(10)
        return any(problem in each for each in watch.problems)

    wait_until(is_noticed, 60)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("console.error('oh')", "oh"),
        ("setTimeout(() => { throw new Error('oh') })", "uncaught: oh"),
        ("fetch('http://elsewhere.test/').catch(() => 0)", "policy: connect-src forbids http://elsewhere.test/"),
        ("setTimeout(() => location.assign('http://elsewhere.test/'))", "asked another host: http://elsewhere.test/"),
        (MISSING, "404"),
        (INLINE, "policy: script-src-elem forbids inline"),
    ],
)
def test_problems_are_noticed(watched: tuple[Page, PageWatch], script: str, problem: str) -> None:
    page, watch = watched
    page.evaluate(script)
    wait_for_problem(page, watch, problem)


def test_an_error_of_the_api_is_no_problem(watched: tuple[Page, PageWatch]) -> None:
    page, watch = watched
    page.evaluate("fetch('v1/nothing')")
    page.evaluate(MISSING)  # is reported after it, in the same way
    wait_for_problem(page, watch, "missing.js")
    assert len(watch.problems) == 1


def test_what_cannot_be_read_by_everybody_is_noticed(page: Page, real_server: ServerProcess) -> None:
    page.goto(real_server.url)
    page.get_by_role("heading", name="Chat", level=1).wait_for()
    check_accessibility(page)
    page.evaluate("document.body.append(document.createElement('input'))")
    with pytest.raises(AssertionError, match="label"):
        check_accessibility(page)
