"""The view Requests: the table, and what happened to one of them."""

import json
import re
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import StartServer
from tests.support.chrome_trace import check_trace
from tests.support.kv_cache_memory import kv_cache_flag
from tests.support.server_process import COMPLETIONS, ServerProcess
from tests.support.streams import Stream
from tests.web.conftest import FLAGS_OF_A_LONG_ANSWER, long_answer

STORY = "Once upon a time in a land far away there lived a king who had a castle by the sea. " * 8
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
UNITS = {"µs": 1e-6, "ms": 1e-3, "s": 1.0}


def complete(server: ServerProcess, prompt: str = STORY, **fields: Any) -> str:
    """Run a completion, and return its id."""
    body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, "temperature": 0} | fields
    return str(server.answer(COMPLETIONS, body)["id"])


def open_request(page: Page, server: ServerProcess, id: str) -> None:
    page.goto(f"{server.url}/#/requests/{urllib.parse.quote(id, safe='')}")
    expect(page.get_by_role("heading", name="Where its time went")).to_be_visible()


def seconds(text: str) -> float:
    number, unit = text.replace(",", "").split()
    return float(number) * UNITS[unit]


def row_of(page: Page, id: str) -> Any:
    return page.get_by_role("row").filter(has=page.locator(f'a[href="#/requests/{id}"]'))


def test_the_table_leads_to_a_request_and_back(page: Page, real_server: ServerProcess) -> None:
    id = complete(real_server)
    page.goto(f"{real_server.url}/#/requests")
    row = row_of(page, id)
    expect(row).to_contain_text("at its limit")
    row.get_by_role("link").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=id)).to_be_visible()
    page.get_by_role("link", name="All requests").click()
    expect(row_of(page, id)).to_be_visible()


@pytest.mark.long
def test_filters_and_order_are_in_the_url(page: Page, real_server: ServerProcess) -> None:
    for number in range(3):
        complete(real_server, max_tokens=1 + 4 * number)
    page.goto(f"{real_server.url}/#/requests")
    page.get_by_label("State").select_option("running")
    expect(page.get_by_text("None is recorded that fits the filters.")).to_be_visible()
    page.get_by_label("State").select_option("finished")
    page.get_by_role("button", name="Output").focus()
    for order in ("descending", "ascending"):
        page.keyboard.press("Enter")
        head = page.get_by_role("columnheader", name="Output")
        expect(head).to_have_attribute("aria-sort", order)
        index = head.evaluate("head => head.cellIndex")
        texts = page.locator("tbody tr").evaluate_all(f"rows => rows.map(row => row.cells[{index}].textContent)")
        values = [int(text.replace(",", "")) for text in texts]
        assert len(values) >= 3
        assert values == sorted(values, reverse=order == "descending")
    assert page.url.endswith("#/requests?state=finished&sort=-output")
    page.reload()
    expect(page.get_by_role("columnheader", name="Output")).to_have_attribute("aria-sort", "ascending")


def test_the_waterfall_adds_up(page: Page, real_server: ServerProcess) -> None:
    """What is written adds up to the wall time, and the segments fill the axis without a gap."""
    open_request(page, real_server, complete(real_server, max_tokens=40, cache_salt="waterfall"))
    rows = page.locator(".waterfall tbody tr")
    parts = [seconds(text) for text in rows.locator("td:nth-of-type(2)").all_inner_texts()]
    whole = seconds(page.locator(".waterfall tfoot td:nth-of-type(2)").inner_text())
    assert abs(sum(parts) - whole) < 0.01 * whole
    script = "all => all.map(each => [parseFloat(each.style.left), parseFloat(each.style.width)])"
    places: list[list[float]] = page.locator(".segment").evaluate_all(script)
    end = 0.0
    for start, width in sorted(places):
        assert abs(start - end) < 0.01
        end = start + width
    assert abs(end - 100) < 0.01


@pytest.mark.long
def test_a_preempted_request(page: Page, start_server: StartServer) -> None:
    server = start_server("--max-model-len=512", kv_cache_flag(12), "--speculative=off")
    streams = [Stream(server, {"prompt": "Light", "max_tokens": 330, "ignore_eos": True}) for _ in "ab"]
    for stream in streams:
        stream.result()
    choices = server.get("/lightwell/v1/requests").json()["data"]
    preempted = next(choice for choice in choices if choice["num_preemptions"])
    open_request(page, server, preempted["id"])
    row = page.get_by_role("row").filter(has_text="Preempted")
    assert seconds(row.locator("td").nth(1).inner_text()) > 0
    assert row.locator(".segment").count() == preempted["num_preemptions"]


def test_why_a_prefix_was_found_or_not(page: Page, real_server: ServerProcess) -> None:
    first = complete(real_server, cache_salt="why")
    open_request(page, real_server, complete(real_server, cache_salt="why"))
    expect(page.get_by_text(re.compile("That is all that can be reused"))).to_be_visible()
    other = STORY[:300] + "But the queen was never seen again. " * 4
    open_request(page, real_server, complete(real_server, prompt=other, cache_salt="why"))
    expect(
        page.get_by_text(re.compile(r"has another token at position \d+: here it is .+ \(token \d+\)"))
    ).to_be_visible()
    open_request(page, real_server, complete(real_server, prompt="Hi", cache_salt="why"))
    expect(page.get_by_text(re.compile("does not fill a block"))).to_be_visible()
    open_request(page, real_server, first)
    expect(page.get_by_text(re.compile("^0 of .* prompt tokens were cached"))).to_be_visible()


@pytest.mark.long
def test_a_chunk_is_shown_in_the_schedule(page: Page, real_server: ServerProcess) -> None:
    id = complete(real_server, prompt=STORY * 2, cache_salt="chunks")
    (choice,) = real_server.get(f"/lightwell/v1/requests/{id}").json()["choices"]
    step = choice["chunks"][-1]["step"]
    open_request(page, real_server, id)
    page.get_by_role("region", name="Chunks").get_by_role("link", name=str(step)).click()
    chosen = page.get_by_role("region", name=f"Choices of step {step}")
    expect(chosen.get_by_role("link", name=re.compile("^cmpl-")).first).to_have_attribute("href", f"#/requests/{id}")


@pytest.mark.long
def test_the_trace_can_be_saved(page: Page, real_server: ServerProcess) -> None:
    id = complete(real_server)
    open_request(page, real_server, id)
    with page.expect_download() as download:
        page.get_by_role("button", name="Trace for Perfetto").click()
    assert download.value.suggested_filename == f"{id}.trace.json"
    check_trace(json.loads(Path(download.value.path()).read_text(encoding="utf-8")))


def test_replay(page: Page, real_server: ServerProcess) -> None:
    open_request(page, real_server, complete(real_server, temperature=1))
    page.get_by_role("button", name="Run again and compare").click()
    expect(page.get_by_text("Bit-equal. All 12 tokens")).to_be_visible()


@pytest.mark.long
def test_a_living_request_is_followed_to_its_end(page: Page, start_server: StartServer) -> None:
    server = start_server(*FLAGS_OF_A_LONG_ANSWER)
    with long_answer(server, **{"x-request-id": "alive"}):
        open_request(page, server, "alive")
        expect(page.get_by_text("running", exact=True)).to_be_visible()
        expect(page.get_by_role("button", name="Run again and compare")).to_be_disabled()
    expect(page.get_by_text("aborted", exact=True)).to_be_visible()


@pytest.mark.long
def test_what_is_not_there(page: Page, start_server: StartServer) -> None:
    """Recordings that are not kept, and requests that are not known; the page says how to turn them on."""
    server = start_server()
    page.goto(f"{server.url}/#/requests")
    expect(page.get_by_text("No requests")).to_be_visible()
    open_request(page, server, complete(server))
    page.get_by_role("button", name="Run again and compare").click()
    expect(page.get_by_text("Requests are not recorded: start the server with --record-requests.")).to_be_visible()
    page.goto(f"{server.url}/#/requests/unknown")
    expect(page.get_by_text("This request is not recorded")).to_be_visible()


@pytest.mark.long
def test_with_keys(page: Page, start_server: StartServer) -> None:
    """A key sees its own requests; with that of an admin, they can be filtered by key."""
    server = start_server("--api-key=sk-a", "--api-key=sk-b", "--admin-key=sk-root")
    for key in ("sk-a", "sk-b"):
        headers = {"authorization": f"Bearer {key}"}
        assert server.http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}, headers=headers).is_success
    page.goto(f"{server.url}/#/requests")
    page.get_by_label("API key").fill("sk-root")
    page.keyboard.press("Enter")
    expect(page.locator("tbody tr")).to_have_count(2)
    page.get_by_label("Key", exact=True).select_option("key-2")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.goto("about:blank")
    page.goto(f"{server.url}/#/requests")
    expect(page.locator("tbody tr")).to_have_count(2)


@pytest.mark.long
def test_hostile_names_stay_text(page: Page, start_server: StartServer) -> None:
    """The names of models, and ids in the URL. Others cannot be hostile: the server allows no such characters."""
    server = start_server(f"--served-model-name={HOSTILE}")
    complete(server, model=HOSTILE)
    page.goto(f"{server.url}/#/requests")
    expect(page.get_by_label("Model").get_by_role("option", name=HOSTILE)).to_be_attached()
    page.get_by_label("Model").select_option(HOSTILE)
    page.goto(f"{server.url}/#/engine?step=1&request={urllib.parse.quote(HOSTILE)}")
    expect(page.get_by_role("region", name="Choices of step 1")).to_be_visible()
    for name in (HOSTILE, "../../v1/models", "a?b=c#d%2f"):
        page.goto(f"{server.url}/#/requests/{urllib.parse.quote(name, safe='')}")
        expect(page.get_by_text("This request is not recorded")).to_be_visible()
    assert page.locator("img[src=x]").count() == 0
    assert "taken" not in page.title()
