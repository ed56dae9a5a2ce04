"""The pages for browsers, as HTTP clients and as Chromium see them."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.parts.page.part import STATIC
from tests.server.conftest import StartServer
from tests.support.browser import CHROMIUM, NO_CHROMIUM, running_browser
from tests.support.clients import shared_server
from tests.support.serving import RunningServer, check_error

PAGES = ("/", "/docs")
KEY = "sk-secret"
VENDOR = STATIC / "vendor"
OWN_FILES = sorted(
    path.relative_to(STATIC).as_posix()
    for path in STATIC.rglob("*.*")
    if path.suffix in (".css", ".html", ".js", ".svg") and VENDOR not in path.parents
)


@pytest.fixture(scope="module")
def guarded(model_folder: Path) -> Iterator[RunningServer]:
    with shared_server(model_folder, settings={"api_key": (KEY,)}) as server:
        yield server


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


def test_pages_and_their_files_are_public(guarded: RunningServer) -> None:
    for path in PAGES:
        page = httpx.get(guarded.url + path)
        assert page.status_code == 200
        files = re.findall(r'(?:src|href)="(assets/[^"]*)"', page.text)
        assert len(files) >= 3
        for each in files:
            response = httpx.get(f"{guarded.url}/{each}")
            assert (response.status_code, response.headers["x-content-type-options"]) == (200, "nosniff"), each
            again = httpx.get(f"{guarded.url}/{each}", headers={"if-none-match": response.headers["etag"]})
            assert (again.status_code, again.content) == (304, b""), each  # a current copy is not sent again
    check_error(httpx.get(f"{guarded.url}/openapi.json"), 401)
    for path in [*PAGES, "/assets/app/main.js", "/healthz"]:  # only reading needs no key
        check_error(httpx.post(guarded.url + path, content=b"x"), 401)


def test_modules_are_served_with_a_policy_that_allows_nothing_but_this_server(guarded: RunningServer) -> None:
    modules = imported(guarded, "/assets/app/main.js")
    assert {"/assets/app/views/chat.js", "/assets/vendor/preact.js", "/assets/key.js"} <= modules
    policy = httpx.get(guarded.url).headers["content-security-policy"]
    sources = {source for directive in policy.split("; ") for source in directive.split()[1:]}
    assert sources == {"'none'", "'self'", "data:"}
    assert "default-src 'none'" in policy
    for path in modules:
        assert httpx.get(guarded.url + path).headers["content-security-policy"] == policy


def test_head(server: RunningServer) -> None:
    """Clients of other servers probe `/` with HEAD."""
    for path in PAGES:
        assert httpx.head(server.url + path).status_code == 200
        check_error(httpx.post(server.url + path), 405)


def test_own_files_need_no_other_host_and_never_make_text_to_markup() -> None:
    """What models and users write is shown as text."""
    markup = r"\w*(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|InnerHTML|srcdoc)\w*"
    for file in OWN_FILES:
        text = (STATIC / file).read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert re.findall(rf"https?://[^\s\"'`$]+|{markup}", text) == [], file


def test_libraries_are_those_that_are_listed() -> None:
    packages = json.loads((VENDOR / "SOURCES.json").read_text(encoding="utf-8"))["packages"]
    hashes = {each["file"]: each["sha256"] for package in packages for each in package["files"]}
    listed = {*hashes, *(package["license_file"] for package in packages), "SOURCES.json"}
    assert {path.name for path in VENDOR.iterdir()} == listed
    for file, value in hashes.items():
        assert hashlib.sha256((VENDOR / file).read_bytes()).hexdigest() == value, file


def test_only_files_of_pages_are_served(guarded: RunningServer) -> None:
    for path in ("/assets/", "/assets/nothing.js", "/assets/..%2fpages.py", "/assets/%2e%2e/%2e%2e/v1/models"):
        check_error(httpx.get(guarded.url + path), 404)


@pytest.mark.checklist("B06")
def test_no_documentation(start_server: StartServer) -> None:
    server = start_server(enable_docs=False)
    for path in ("/docs", "/openapi.json"):
        check_error(httpx.get(server.url + path), 404)
    assert httpx.get(server.url).status_code == 200


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_documentation_in_chromium(server: RunningServer, guarded: RunningServer) -> None:
    with running_browser() as browser:
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.goto(f"{server.url}/docs")
        page.get_by_text("Create Chat Completion").first.wait_for()
        page.goto(f"{guarded.url}/docs")
        page.locator("#no-key").wait_for()


def test_the_prefix_alone_leads_to_the_page(start_server: StartServer) -> None:
    """With a slash, to which the page's paths are relative."""
    prefixed = start_server(root_path="/llm", api_key=("k",))
    headers = {"authorization": "Bearer k"}
    response = httpx.get(prefixed.url + "/llm", follow_redirects=True, headers=headers)
    assert (response.status_code, response.url.path) == (200, "/llm/")
    assert httpx.get(prefixed.url + "/llmx", headers=headers).status_code == 404
