"""The view Engine: what it draws of a real engine at work, with the mouse and without."""

import re
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.e2e.conftest import StartServer
from tests.support.server_process import ServerProcess
from tests.support.streams import Stream
from tests.web.conftest import FLAGS_OF_A_LONG_ANSWER, long_answer

PROMPT = "Once upon a time in a land far away there lived a king who had a castle by the sea. "


def open_engine(page: Page, server: ServerProcess, query: str = "") -> None:
    page.goto(f"{server.url}/#/engine{query}")
    expect(page.get_by_text("Live", exact=True)).to_be_visible()


def last_step(page: Page) -> int:
    return int(page.get_by_role("slider", name="Steps of the engine").get_attribute("aria-valuemax") or 0)


def steps_of(server: ServerProcess, id: str) -> list[dict[str, Any]]:
    steps = server.get("/lightwell/v1/steps?limit=1000").json()["data"]
    return [step for step in steps if any(row["id"] == id for row in step["rows"])]


def complete(server: ServerProcess, **fields: Any) -> str:
    """Run a completion, and return its id."""
    body = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True} | fields
    return str(server.answer("/v1/completions", body)["id"])


def test_a_step_chosen_by_keyboard(page: Page, real_server: ServerProcess) -> None:
    """It shows what the API says of that step, and leads to the request."""
    open_engine(page, real_server)
    id = complete(real_server)
    steps = steps_of(real_server, id)
    slider = page.get_by_role("slider", name="Steps of the engine")
    expect(slider).to_have_attribute("aria-valuemax", str(steps[-1]["id"]))
    slider.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    chosen = page.get_by_role("region", name=f"Choices of step {steps[-2]['id']}")
    row = chosen.get_by_role("row").nth(1)
    expect(row).to_contain_text("next token")
    expect(row.get_by_role("link")).to_have_attribute("href", f"#/requests/{id}")
    page.keyboard.press("Escape")
    expect(chosen).to_be_hidden()


@pytest.mark.long
def test_a_prompt_and_generated_tokens_are_told_apart_in_words(page: Page, real_server: ServerProcess) -> None:
    id = complete(real_server, prompt="Completely new: " + PROMPT, max_tokens=3)
    first = steps_of(real_server, id)[0]
    page.goto(f"{real_server.url}/#/engine?step={first['id']}&request={id}")
    row = page.get_by_role("region", name=f"Choices of step {first['id']}").get_by_role("row").nth(1)
    (computed,) = [row["num_tokens"] for row in first["rows"] if row["id"] == id]
    expect(row).to_contain_text(re.compile(rf"prompt\s*{computed}"))
    expect(page.get_by_role("button", name="Go on")).to_be_visible()
    page.goto(f"{real_server.url}/#/engine?step=99999999")
    expect(page.get_by_text("Step 99,999,999 is not recorded any more.")).to_be_visible()


def test_pause(page: Page, real_server: ServerProcess) -> None:
    open_engine(page, real_server)
    complete(real_server)
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_text("Paused", exact=True)).to_be_visible()
    before = last_step(page)
    id = complete(real_server)
    canvas = page.get_by_role("slider", name="Steps of the engine")
    canvas.click(position={"x": canvas.evaluate("canvas => canvas.clientWidth") - 3, "y": 60})
    expect(page.get_by_role("region", name=f"Choices of step {before}", exact=True)).to_be_visible()
    assert last_step(page) == before
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("slider", name="Steps of the engine")).to_have_attribute(
        "aria-valuemax", str(steps_of(real_server, id)[-1]["id"])
    )


@pytest.mark.long
def test_blocks_and_queue(page: Page, start_server: StartServer) -> None:
    server = start_server("--max-num-seqs=1", *FLAGS_OF_A_LONG_ANSWER)
    open_engine(page, server)
    expect(page.get_by_text("Nobody waits.")).to_be_visible()
    with long_answer(server):
        waiting = Stream(server, {"prompt": PROMPT, "max_tokens": 4})
        table = page.get_by_role("region", name="Choices in the queue")
        expect(table.get_by_role("row").nth(1)).to_contain_text("is next")
        expect(page.get_by_text(re.compile(r"^[1-9]\d* of [\d,]+ blocks are held"))).to_be_visible()
        grid = page.get_by_role("slider", name="Blocks of the KV cache")
        grid.focus()
        page.keyboard.press("Home")
        expect(grid).to_have_attribute("aria-valuetext", re.compile(r"^Block 0: "))
        page.keyboard.press("ArrowRight")
        expect(grid).to_have_attribute("aria-valuenow", "1")
        grid.blur()
    waiting.result()
    expect(page.get_by_text("Nobody waits.")).to_be_visible()
    expect(page.get_by_text(re.compile("^0 of .* blocks are held"))).to_be_visible()


@pytest.mark.long
def test_after_a_restart_of_the_engine(page: Page, start_server: StartServer) -> None:
    server = start_server()
    open_engine(page, server)
    complete(server, max_tokens=40)
    server.engine.kill()
    id = complete(server, max_tokens=3)  # waits for the new engine
    last = steps_of(server, id)[-1]["id"]
    assert last < 40
    expect(page.get_by_role("slider", name="Steps of the engine")).to_have_attribute("aria-valuemax", str(last))


@pytest.mark.long
def test_after_a_restart_of_the_server(page: Page, start_server: StartServer) -> None:
    """The second server has a port of its own, since another process could have taken that of the first."""
    first = start_server()
    running = [first]

    def redirect(route: Route) -> None:
        if running:
            route.continue_(url=route.request.url.replace(first.url, running[0].url))
        else:
            route.abort("connectionrefused")

    page.route(f"{first.url}/**", redirect)
    open_engine(page, first)
    complete(first, max_tokens=40)
    running.clear()
    first.close()
    expect(page.get_by_text("The connection broke. Trying again …")).to_be_visible()
    second = start_server()
    running.append(second)
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    id = complete(second, max_tokens=3)
    slider = page.get_by_role("slider", name="Steps of the engine")
    expect(slider).to_have_attribute("aria-valuemax", str(steps_of(second, id)[-1]["id"]))


def test_what_is_remembered_is_bounded(page: Page, real_server: ServerProcess) -> None:
    """Also where steps are lost and numbers start again, as after a restart."""
    page.goto(real_server.url)
    script = """async () => {
        const { History } = await import("/assets/app/engine/history.js");
        const history = new History();
        const row = { prompt: 0, index: 0, key: null, position: 5, num_tokens: 1, kind: "generated",
            num_generated: 1, num_drafts: 0, num_accepted: 0 };
        const step = (id) => ({ id, started: id / 4, seconds: { forward: 0.2 }, num_running: 64, num_waiting: 0,
            num_blocks_used: 9, rows: Array.from({ length: 64 }, (_, each) => ({ ...row, id: `${id}-${each}` })) });
        const list = (engine, first, num_lost) => ({ engine, num_blocks: 10, num_lost, has_more: false,
            data: Array.from({ length: 100 }, (_, index) => step(first + index)) });
        for (let first = 1; first < 4000; first += 100) history.add(list("a", first, 3));
        const { steps, seconds, lastTokens, lanes } = history;
        const full = [steps.length, seconds.length, lastTokens.size, lanes.owned.size];
        const lost = history.numLost;
        history.add(list("b", 1, 0));
        return { full, lost, after: [history.steps.length, history.lastId, history.numLost] };
    }"""
    answer = page.evaluate(script)
    assert answer["full"] == [800, 150, 64, 64]
    assert answer["lost"] == 120
    assert answer["after"] == [100, 100, 0]


@pytest.mark.long
def test_rates_do_not_depend_on_the_clock_of_the_browser(page: Page, real_server: ServerProcess) -> None:
    """Only steps of a moment ago count as work of now, however many seconds ahead the server's `clock` is."""
    page.goto(real_server.url)
    script = """async (clock) => {
        const { History } = await import("/assets/app/engine/history.js");
        const busy = (age, isLive) => {
            const history = new History();
            const now = Math.floor(Date.now() / 1000) + clock;
            const step = { id: 1, started: now - age - 1, seconds: { forward: 1 }, rows: [], num_blocks_used: 0 };
            history.setClock(now + 0.5);
            history.add({ engine: "a", num_blocks: 10, num_lost: 0, data: [step] }, isLive);
            return history.recent(5).busy;
        };
        return [busy(1000, false), busy(2, false), busy(2, true)];
    }"""
    for clock in (0, 3600, -3600):
        assert page.evaluate(script, clock) == [0, 0.2, 0.2]
