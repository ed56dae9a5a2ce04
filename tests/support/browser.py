"""Chromium as the tests of the page use it, and what must not happen on a page."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from tests.support.paths import ROOT

WEB = ROOT / "tests/web"
MODULES = WEB / "node_modules"
OWN_HOSTS = ("127.0.0.1", "localhost")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_CHROMIUM = "needs Chromium: on Debian and Ubuntu, install the package chromium"
NO_MODULES = "needs npm: on Debian and Ubuntu, install the package npm, and run `make test`"

# Software rendering; the sandbox needs namespaces that root in a container does not have.
FLAGS = ["--disable-gpu", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.getuid() == 0 else [])]

REPORT_VIOLATIONS = """addEventListener("securitypolicyviolation", (event) =>
    console.error(`policy: ${event.violatedDirective} forbids ${event.blockedURI}`))"""


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Start Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class PageWatch:
    """Collects what must not happen on a page: errors, violations of its policy, requests to other hosts."""

    def __init__(self, page: Page) -> None:
        self.problems: list[str] = []
        page.context.add_init_script(REPORT_VIOLATIONS)
        page.on("console", self._on_message)
        page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        page.on("crash", lambda _: self.problems.append("the page crashed"))
        page.on("request", self._on_request)
        page.on("websocket", lambda socket: self.problems.append(f"opened {socket.url}"))

    def _on_message(self, message: ConsoleMessage) -> None:
        """Record an error. Answers of the API with a status of an error are none, but missing files are."""
        url = message.location["url"]
        is_answer = message.text.startswith("Failed to load resource") and "/assets/" not in url
        if message.type == "error" and not is_answer:
            self.problems.append(f"{message.text} ({url})")

    def _on_request(self, request: Request) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob") and url.hostname not in OWN_HOSTS:
            self.problems.append(f"asked another host: {request.url}")


def check_accessibility(page: Page) -> None:
    """Fail if axe-core has serious or critical findings on the page as it is shown now."""
    script = MODULES / "axe-core/axe.min.js"
    assert script.exists(), NO_MODULES
    page.evaluate(script.read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = page.evaluate("async () => (await axe.run()).violations")
    serious = [
        {"rule": each["id"], "help": each["help"], "nodes": [node["html"][:200] for node in each["nodes"][:5]]}
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == [], json.dumps(serious, indent=1)
