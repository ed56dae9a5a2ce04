"""Make the pictures of the page in docs/pictures, from a real server: `python -m tests.web.pictures`.

They show the default model at work, so two runs never make the same pictures.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from playwright.sync_api import Page

from tests.bench.serve import MODEL_NAME, running_server
from tests.support.browser import running_browser
from tests.support.paths import ROOT

FOLDER = ROOT / "docs/pictures"
SIZE = (1280, 860)
NUM_STREAMS = 12
SETTLED = 4_000  # ms after which a view has drawn what it asked for

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
QUESTION = {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": 40, "temperature": 0.8, "top_p": 0.9, "seed": 3}


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    with running_server([]) as (url, _), running_browser() as browser, ThreadPoolExecutor(NUM_STREAMS) as pool:
        answer = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=60).json()
        context = browser.new_context(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light")
        page = context.new_page()
        for name, path, prepare in views(answer["id"]):
            streams = [pool.submit(generate, url, number) for number in range(NUM_STREAMS if name == "engine" else 0)]
            page.goto(f"{url}/{path}")
            prepare(page)
            page.wait_for_timeout(SETTLED)
            page.screenshot(path=FOLDER / f"{name}.png")
            for stream in streams:
                stream.result()
    return 0


def views(id: str) -> list[tuple[str, str, Callable[[Page], None]]]:
    """Return the name of each picture, the address of what it shows, and what is done there first."""
    return [
        ("chat", "#/chat", ask),
        ("tokens", f"#/tokens?id={id}", lambda page: page.wait_for_timeout(SETTLED)),
        ("inside", f"#/inside?id={id}", show_layers),
        ("engine", "#/engine", lambda page: None),
        ("requests", f"#/requests/{id}", lambda page: None),
    ]


def ask(page: Page) -> None:
    box = page.get_by_role("textbox").last
    box.fill("Write two sentences about the sea.")
    box.press("Enter")


def show_layers(page: Page) -> None:
    page.wait_for_timeout(SETTLED)
    page.get_by_role("heading", name="Layers").evaluate("(heading) => heading.scrollIntoView()")


def generate(url: str, number: int) -> None:
    """Keep the engine busy while its picture is taken."""
    body: dict[str, Any] = {"model": MODEL_NAME, "prompt": f"Story {number}:", "max_tokens": 300 + 40 * number}
    httpx.post(f"{url}/v1/completions", json=body | {"ignore_eos": True}, timeout=300).raise_for_status()


if __name__ == "__main__":
    sys.exit(main())
