"""The page as a whole: its views have URLs, explain themselves, and can be read by everybody, in both themes.

That none asks another host or violates the page's policy is what the fixture `page` checks in every test.
"""

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import check_accessibility
from tests.support.server_process import MODEL, REQUEST_SECONDS, ServerProcess

# What each view shows when it has read all that it reads at first.
CONTENT = {
    "#/chat": [".start", f".chips :text-is('{MODEL}')"],
    "#/tokens": [":text-is('No text yet')"],
    "#/inside": [":text-is('Nothing computed yet')"],
    "#/engine": [".state.good:text-is('Live')", ".blocks .readout:text('held')", ".limits .nearness", ".queue h2 .num"],
    "#/requests": [".requests tbody tr"],
}
SIZES = {"phone": (360, 740), "desktop": (1280, 900), "large": (2560, 1440)}


def views(page: Page) -> list[str]:
    """Return the URLs of the views that the navigation links to."""
    links = page.get_by_role("navigation", name="Views").get_by_role("link")
    expect(links.first).to_be_visible()
    return [str(link.get_attribute("href")) for link in links.all()]


@pytest.mark.parametrize(
    ("theme", "size"), [("light", "phone"), ("dark", "desktop"), pytest.param("light", "large", marks=pytest.mark.long)]
)
def test_every_view(page: Page, real_server: ServerProcess, theme: str, size: str) -> None:
    """It has a title and an explanation, fits the screen, and has no serious finding of axe-core."""
    real_server.complete(max_tokens=5)
    width, height = SIZES[size]
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    page.goto(real_server.url)
    for view in views(page):
        page.goto(f"{real_server.url}/{view}")
        expect(page.locator(f'header nav a[href="{view}"]')).to_have_attribute("aria-current", "page")
        expect(page.locator("#state")).to_have_text("Ready")
        for selector in CONTENT[view]:
            expect(page.locator(selector).first).to_be_visible()
        expect(page.locator(".intro h1")).not_to_be_empty()
        expect(page.locator(".intro p")).to_have_text(re.compile(r"\w+ \w+ .*\."))
        expect(page).to_have_title(re.compile(r"\w · Lightwell$"))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        check_accessibility(page)


@pytest.mark.long
def test_one_request_can_be_read_by_everybody(page: Page, real_server: ServerProcess) -> None:
    id = real_server.complete(max_tokens=5).json()["id"]
    page.goto(f"{real_server.url}/#/requests/{id}")
    expect(page.get_by_role("heading", name="Where its time went")).to_be_visible()
    check_accessibility(page)
    page.get_by_role("link", name="See it in the schedule").click()
    expect(page.get_by_role("region", name=re.compile("^Choices of step"))).to_be_visible()
    check_accessibility(page)


@pytest.mark.long
def test_views_are_reached_by_keyboard(page: Page, real_server: ServerProcess) -> None:
    page.goto(f"{real_server.url}/#/requests")  # the chat focuses its message
    expect(page.locator(".intro h1")).to_be_visible()
    names = views(page)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    links = page.get_by_role("navigation", name="Views").get_by_role("link")
    for index, view in enumerate(names):
        links.nth(index).focus()
        page.keyboard.press("Enter")
        expect(links.nth(index)).to_have_attribute("aria-current", "page")
        expect(page).to_have_url(re.compile(re.escape(view)))
        expect(page.locator(".intro h1")).to_have_text(links.nth(index).inner_text())  # the chat takes the focus then


def test_a_view_that_does_not_exist(page: Page, real_server: ServerProcess) -> None:
    page.goto(f"{real_server.url}/#/nothing")
    expect(page.get_by_role("alert")).to_contain_text("no such view")


BROKEN_VIEW = """
import { html } from "../lib.js";
import { route } from "../router.js";
export const title = "Requests";
export const about = "Breaks for an id.";
export default () => {
  if (route.value.id) throw new Error("oh");
  return html`<p>All is well.</p>`;
};
"""


@pytest.mark.long
def test_a_view_that_failed_can_be_left(browser: Browser, real_server: ServerProcess) -> None:
    page = browser.new_page()
    page.set_default_timeout(1000 * REQUEST_SECONDS)
    page.route(
        "**/app/views/requests.js", lambda route: route.fulfill(content_type="text/javascript", body=BROKEN_VIEW)
    )
    page.goto(f"{real_server.url}/#/requests/1")
    page.get_by_text("This view failed: oh").wait_for()
    page.get_by_role("link", name="Requests").click()
    page.get_by_text("All is well.").wait_for()
    page.close()


@pytest.mark.long
def test_forgetting_the_key_drops_what_was_read_with_it(page: Page, real_server: ServerProcess) -> None:
    page.goto(real_server.url)
    page.evaluate("sessionStorage.setItem('lightwell-api-key', 'key'); window.before = true")
    page.get_by_role("button", name="Connection").click()
    with page.expect_navigation():
        page.get_by_role("button", name="Forget API key").click()
    assert page.evaluate("[sessionStorage.length, window.before ?? null]") == [0, None]


@pytest.mark.long
def test_a_server_that_does_not_answer(page: Page, real_server: ServerProcess) -> None:
    page.add_init_script("""AbortSignal.timeout = (ms) => {
      const controller = new AbortController();
      setTimeout(() => controller.abort(new DOMException("", "TimeoutError")), ms / 100);
      return controller.signal;
    }""")
    page.route("**/readyz", lambda _route: None)
    page.goto(real_server.url)
    expect(page.get_by_role("alert").first).to_contain_text("The server cannot be reached.")


@pytest.mark.long
def test_a_stream_that_falls_silent_is_opened_again(page: Page, real_server: ServerProcess) -> None:
    """Comments count as a sign of life."""
    page.clock.install(time=0)
    page.goto(real_server.url)
    page.clock.pause_at(1_000_000)
    page.evaluate("""async () => {
      const { follow } = await import("/assets/app/api.js");
      const original = window.fetch;
      window.streams = [];
      window.fetch = async (path, options) => {
        if (path !== "stream") return original(path, options);
        const start = (stream) => {
          streams.push(stream);
          options.signal.addEventListener("abort", () => stream.error(options.signal.reason));
        };
        return new Response(new ReadableStream({ start }));
      };
      follow("stream", () => {});
    }""")
    page.clock.run_for(40_000)
    page.evaluate("streams[0].enqueue(new TextEncoder().encode(': alive\\n\\n'))")
    page.clock.run_for(40_000)
    assert page.evaluate("streams.length") == 1
    page.clock.run_for(10_000)
    assert page.evaluate("streams.length") == 2
