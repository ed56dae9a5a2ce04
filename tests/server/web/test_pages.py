"""The pages for browsers, as HTTP clients and as Chromium see them."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from playwright.sync_api import Page

from server.web.pages import STATIC
from tests.server.conftest import StartServer
from tests.support.browser import CHROMIUM, NO_CHROMIUM, running_browser
from tests.support.serving import RunningServer, check_error

PAGES = ("/", "/docs")
KEY = "sk-secret"
VENDOR = STATIC / "vendor"
OWN_FILES = sorted(
    path.relative_to(STATIC).as_posix()
    for path in STATIC.rglob("*.*")
    if path.suffix in (".css", ".html", ".js", ".svg") and VENDOR not in path.parents
)


@pytest.fixture
def guarded(start_server: StartServer) -> RunningServer:
    return start_server(api_key=(KEY,))


def imported(server: RunningServer, path: str) -> set[str]:
    """Return the paths of a script and of all that it imports, from the server."""
    found, rest = set[str](), [path]
    while rest:
        found.add(path := rest.pop())
        response = httpx.get(server.url + path)
        assert response.headers["content-type"].startswith("text/javascript"), path
        names = re.findall(r"""(?:from|import) ?\(?"(\.[^"]+)""", response.text)
        rest += {str(httpx.URL(server.url + path).join(name).path) for name in names} - found
    return found


def linked(page: str) -> list[str]:
    """Return the files that a page loads, relative to it."""
    return re.findall(r'(?:src|href)="(assets/[^"]*)"', page)


@pytest.mark.parametrize("path", PAGES)
def test_pages_and_their_files_are_public(guarded: RunningServer, path: str) -> None:
    page = httpx.get(guarded.url + path)
    assert page.status_code == 200
    assert len(linked(page.text)) >= 3
    for each in linked(page.text):
        response = httpx.get(f"{guarded.url}/{each}")
        assert (response.status_code, response.headers["x-content-type-options"]) == (200, "nosniff"), each
    check_error(httpx.get(f"{guarded.url}/openapi.json"), 401)


def test_modules_are_served_from_subfolders_with_the_policy(guarded: RunningServer) -> None:
    modules = imported(guarded, "/assets/app/main.js")
    assert {"/assets/app/views/chat.js", "/assets/vendor/preact.js", "/assets/key.js"} <= modules
    policy = httpx.get(guarded.url).headers["content-security-policy"]
    for path in modules:
        assert httpx.get(guarded.url + path).headers["content-security-policy"] == policy


@pytest.mark.parametrize("path", PAGES)
def test_head(server: RunningServer, path: str) -> None:
    """Clients of other servers probe `/` with HEAD."""
    assert httpx.head(server.url + path).status_code == 200
    check_error(httpx.post(server.url + path), 405)


@pytest.mark.parametrize("path", [*PAGES, "/assets/app/main.js", "/healthz"])
def test_only_reading_needs_no_key(guarded: RunningServer, path: str) -> None:
    check_error(httpx.post(guarded.url + path, content=b"x"), 401)


def test_the_policy_allows_nothing_but_this_server(server: RunningServer) -> None:
    policy = httpx.get(server.url).headers["content-security-policy"]
    sources = {source for directive in policy.split("; ") for source in directive.split()[1:]}
    assert sources == {"'none'", "'self'", "data:"}
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("file", OWN_FILES)
def test_files_need_no_other_host(file: str) -> None:
    text = (STATIC / file).read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert re.findall(r"https?://[^\s\"'`$]+", text) == []


@pytest.mark.parametrize("file", [file for file in OWN_FILES if file.endswith((".js", ".html"))])
def test_text_never_becomes_markup(file: str) -> None:
    """What models and users write is shown as text."""
    text = (STATIC / file).read_text(encoding="utf-8")
    assert re.findall(r"\w*(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|InnerHTML|srcdoc)\w*", text) == []


def test_libraries_are_those_that_are_listed() -> None:
    packages = json.loads((VENDOR / "SOURCES.json").read_text(encoding="utf-8"))["packages"]
    hashes = {each["file"]: each["sha256"] for package in packages for each in package["files"]}
    listed = {*hashes, *(package["license_file"] for package in packages), "SOURCES.json"}
    assert {path.name for path in VENDOR.iterdir()} == listed
    for file, value in hashes.items():
        assert hashlib.sha256((VENDOR / file).read_bytes()).hexdigest() == value, file


def test_a_current_copy_is_not_sent_again(server: RunningServer) -> None:
    url = f"{server.url}/assets/swagger-ui.css"
    first = httpx.get(url)
    second = httpx.get(url, headers={"if-none-match": first.headers["etag"]})
    assert (second.status_code, second.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/assets/", "/assets/nothing.js", "/assets/..%2fpages.py", "/assets/%2e%2e/%2e%2e/v1/models"]
)
def test_only_files_of_pages_are_served(guarded: RunningServer, path: str) -> None:
    check_error(httpx.get(guarded.url + path), 404)


@pytest.mark.checklist("B06")
def test_no_documentation(start_server: StartServer) -> None:
    server = start_server(enable_docs=False)
    for path in ("/docs", "/openapi.json"):
        check_error(httpx.get(server.url + path), 404)
    assert httpx.get(server.url).status_code == 200


@contextmanager
def opened(url: str) -> Iterator[Page]:
    with running_browser() as browser:
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.goto(url)
        yield page


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_in_chromium(server: RunningServer) -> None:
    with opened(server.url) as page:
        page.locator("#state:text-is('Ready')").wait_for()
        page.get_by_role("heading", name="Chat", level=1).wait_for()
        page.goto(f"{server.url}/docs")
        page.get_by_text("Create Chat Completion").first.wait_for()


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_chromium_asks_for_the_key(guarded: RunningServer) -> None:
    with opened(guarded.url) as page:
        page.locator("#key-form").wait_for()
        assert page.locator("h1").count() == 0
        page.goto(f"{guarded.url}/docs")
        page.locator("#no-key").wait_for()
