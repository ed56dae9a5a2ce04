"""The checks of a page notice what must not happen."""

import pytest
from playwright.sync_api import Browser, Page

from tests.support.browser import PageWatch, check_accessibility
from tests.support.server_process import ServerProcess
from tests.support.serving import wait_until

INLINE = "const script = document.createElement('script'); script.textContent = '1'; document.body.append(script)"


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("console.error('oh')", "oh"),
        ("setTimeout(() => { throw new Error('oh') })", "uncaught: oh"),
        ("fetch('http://elsewhere.test/').catch(() => 0)", "policy: connect-src forbids http://elsewhere.test/"),
        ("setTimeout(() => location.assign('http://elsewhere.test/'))", "asked another host: http://elsewhere.test/"),
        ("fetch('assets/missing.js')", "404"),
        (INLINE, "policy: script-src-elem forbids inline"),
    ],
)
def test_problems_are_noticed(browser: Browser, real_server: ServerProcess, script: str, problem: str) -> None:
    page = browser.new_page()
    watch = PageWatch(page)
    page.goto(real_server.url)
    page.evaluate(script)

    def is_noticed() -> bool:
        page.wait_for_timeout(10)
        return any(problem in each for each in watch.problems)

    wait_until(is_noticed, 10)
    page.close()


def test_an_error_of_the_api_is_no_problem(browser: Browser, real_server: ServerProcess) -> None:
    page = browser.new_page()
    watch = PageWatch(page)
    page.goto(real_server.url)
    page.evaluate("fetch('v1/nothing')")
    page.wait_for_timeout(200)
    assert watch.problems == []
    page.close()


def test_what_cannot_be_read_by_everybody_is_noticed(page: Page, real_server: ServerProcess) -> None:
    page.goto(real_server.url)
    check_accessibility(page)
    page.evaluate("document.body.append(document.createElement('input'))")
    with pytest.raises(AssertionError, match="label"):
        check_accessibility(page)
