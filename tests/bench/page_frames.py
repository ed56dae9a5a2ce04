"""Count the frames of the view Engine in a second: with recorded steps, and beside a running engine.

    python -m tests.bench.page_frames [--streams 64] [--seconds 20] [--width 1280] [--height 900]

The server, its streams and Chromium without a GPU share the processor. A server sends at most ten events in a second,
and the schedule is painted once for each; the recorded stream has sixty, each a step with a row for each stream.
"frames" is how often the browser could have painted anything at all: what remains of its time.
"""

import statistics
from pathlib import Path
from typing import Any

from playwright.sync_api import Page
from rich.console import Console
from rich.table import Table

from server.model_paths import resolve_model
from tests.bench.serve import parse
from tests.support.browser import running_browser
from tests.support.server_process import MODEL, ServerProcess, running_server
from tests.support.streams import start_streams

MILLISECONDS = 16  # between recorded events

# Replaces the events of the server with recorded steps, again and again, under new numbers.
REPLAY = """({ list, milliseconds }) => {
    const original = window.fetch;
    window.fetch = (path, options) => {
        if (!String(path).endsWith("/events")) return original(path, options);
        let id = list.data.at(-1).id;
        let next = 0;
        let timer = 0;
        const encoder = new TextEncoder();
        const send = (controller) => {
            const data = [{ ...list.data[next++ % list.data.length], id: ++id, started: Date.now() / 1000 }];
            controller.enqueue(encoder.encode(`id: ${id}\\ndata: ${JSON.stringify({ ...list, data })}\\n\\n`));
        };
        const body = new ReadableStream({
            start: (controller) => { timer = setInterval(send, milliseconds, controller); },
            cancel: () => clearInterval(timer),
        });
        return Promise.resolve(new Response(body));
    };
}"""

# Each painting of a canvas begins with `clearRect`.
COUNT = """(seconds) => new Promise((resolve) => {
    const counts = [];
    let paints = 0;
    let frames = 0;
    const countFrame = () => {
        frames += 1;
        if (counts.length < seconds) requestAnimationFrame(countFrame);
    };
    requestAnimationFrame(countFrame);
    const { prototype } = CanvasRenderingContext2D;
    const { clearRect } = prototype;
    prototype.clearRect = function (...area) {
        if (this.canvas.closest(".schedule")) paints += 1;
        return clearRect.apply(this, area);
    };
    const timer = setInterval(() => {
        counts.push([paints, frames]);
        paints = 0;
        frames = 0;
        if (counts.length < seconds) return;
        clearInterval(timer);
        prototype.clearRect = clearRect;
        resolve(counts);
    }, 1000);
})"""


def count_paints(page: Page, seconds: int) -> list[list[int]]:
    """Return how often the schedule was painted in each second, and the number of frames."""
    counts: list[list[int]] = page.evaluate(COUNT, seconds)
    return counts


def open_engine(page: Page, server: ServerProcess) -> None:
    page.goto(f"{server.url}/#/engine")
    page.get_by_text("Live", exact=True).wait_for(timeout=120_000)
    page.wait_for_timeout(3000)


def record(server: ServerProcess, num_streams: int) -> dict[str, Any]:
    """Return the steps that have a row for each stream."""
    steps: dict[str, Any] = server.get("/lightwell/v1/steps?limit=200").json()
    full = [step for step in steps["data"] if len(step["rows"]) >= num_streams]
    assert full
    return steps | {"data": full, "num_lost": 0}


def main() -> None:
    arguments = parse(
        "page_frames",
        __doc__,
        MODEL,
        streams=(64, "number"),
        seconds=(20, "of a count"),
        width=(1280, "of the page"),
        height=(900, "of the page"),
    )
    model: Path = resolve_model(arguments.model).path
    flags = (f"--max-num-seqs={arguments.streams}", "--kv-cache-memory=2GiB", "--max-model-len=4096")
    results: dict[str, list[list[int]]] = {}
    with running_browser() as browser:
        size = {"width": arguments.width, "height": arguments.height}
        with running_server(model, *flags) as server:
            streams = start_streams(server, arguments.streams, max_tokens=3000)
            page = browser.new_page(viewport=size)  # type: ignore[arg-type]
            open_engine(page, server)
            results["live, beside the engine"] = count_paints(page, arguments.seconds)
            page.close()
            recorded = record(server, len(streams))
        with running_server(model, *flags) as server:
            page = browser.new_page(viewport=size)  # type: ignore[arg-type]
            page.goto(server.url)
            page.evaluate(REPLAY, {"list": recorded, "milliseconds": MILLISECONDS})
            page.get_by_role("link", name="Engine").click()
            page.wait_for_timeout(3000)
            results["recorded, idle engine"] = count_paints(page, arguments.seconds)
            page.close()
    columns = ("median paints/s", "fewest paints/s", "median frames/s", "fewest frames/s")
    table = Table("", *columns, title=f"{arguments.streams} streams, {size}")
    for name, counts in results.items():
        paints, frames = zip(*counts, strict=True)
        figures = (statistics.median(paints), min(paints), statistics.median(frames), min(frames))
        table.add_row(name, *(f"{figure:g}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
