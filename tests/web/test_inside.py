"""The view that shows how a token is made, in the order of a textbook chapter."""

import re
from functools import partial
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.support.browser import check_accessibility
from tests.support.server_process import CHAT, READY_SECONDS, ServerProcess
from tests.support.serving import wait_until

PROMPT = "The capital of France is Paris, and the capital of Spain is"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
INSPECT = "**/lightwell/v1/inspect"
NUM_LAYERS, NUM_HEADS = 30, 9


def look_inside(page: Page, server: ServerProcess, prompt: str = PROMPT, num_tokens: int = 4) -> None:
    """Open the view, let the model write, and wait for what the engine says about the first token that it wrote."""
    page.goto(f"{server.url}/#/inside")
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in {"Tokens to write": num_tokens, "Temperature": 0}.items():
        box = page.get_by_label(f"{label}, exact")
        box.fill(str(value))
        box.blur()
    page.get_by_role("button", name="Look inside").click()
    wait_for_reading(page)


def wait_for_reading(page: Page) -> None:
    expect(page.locator(".chapter")).to_have_attribute("aria-busy", "false")


def section(page: Page, name: str) -> Locator:
    return page.get_by_role("region", name=re.compile(f"{name}$"))


def inspection(server: ServerProcess, **body: Any) -> Any:
    """Return the engine's answer to a question, once it has answered those of the page."""
    answers: list[httpx.Response] = []

    def is_answered() -> bool:
        answers.append(server.http.post("/lightwell/v1/inspect", json=body))
        return answers[-1].status_code != 429

    wait_until(is_answered, READY_SECONDS)
    assert answers[-1].status_code == 200, answers[-1].text
    return answers[-1].json()


def lens_cells(page: Page, layer: int) -> Locator:
    return page.get_by_role("grid").get_by_role("row").nth(layer + 1).get_by_role("gridcell")


def test_the_chapter_shows_what_the_engine_says(page: Page, real_server: ServerProcess) -> None:
    """On a narrow screen, too."""
    page.set_viewport_size({"width": 360, "height": 780})
    look_inside(page, real_server)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    check_accessibility(page)
    prompt = inspection(real_server, prompt=PROMPT, top=8)
    ids = page.get_by_role("list", name="Tokens and their ids").get_by_role("listitem")
    expect(ids).to_have_count(len(prompt["tokens"]) + 4)
    for token, shown in zip(prompt["tokens"], ids.all_text_contents(), strict=False):
        assert shown == token["token"].replace(" ", "␣") + str(token["token_id"])
    last = prompt["positions"][-1]["layers"]
    for layer in (0, 10, NUM_LAYERS - 1):
        expect(lens_cells(page, layer).last.locator("code")).to_have_text(visible(last[layer]["lens"][0]["token"]))
    likeliest = section(page, "LM head").get_by_role("listitem").locator("code")
    expect(likeliest).to_have_text([visible(each["token"]) for each in last[-1]["lens"]])
    expect(section(page, "Sampling")).to_contain_text("Computed again just now: ␣Madrid, the token that was sent.")
    expect(section(page, "Fed back").locator("mark")).to_have_text(" Madrid")


def visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎")


@pytest.mark.long
def test_a_head_shows_where_it_looks(page: Page, real_server: ServerProcess) -> None:
    look_inside(page, real_server)
    heads = page.get_by_role("radiogroup", name="Head").get_by_role("radio")
    expect(heads).to_have_count(NUM_HEADS)
    heads.nth(5).click()
    chart = page.get_by_role("img", name=re.compile("Attention of layer 16, head 6"))
    expect(chart).to_have_attribute("aria-label", re.compile(r"looks most at “.*”"))
    row = inspection(real_server, prompt=PROMPT, top=1, layer=15, head=5)["attention"]["rows"][-1]
    position = row.index(max(row))
    expect(chart).to_have_attribute("aria-label", re.compile(f"looks most at “[^”]*” at position {position}: "))


@pytest.mark.long
def test_layers_with_experts_and_a_state(page: Page, real_server: ServerProcess) -> None:
    def change(route: Route) -> None:
        response = route.fetch()
        answer = response.json() | {"num_experts": 16}
        for position in answer["positions"]:
            for layer in position["layers"]:
                layer["experts"] = [[3, 0.625], [11, 0.375]]
            position["layers"][NUM_LAYERS // 2] |= {"heads": [], "state": {"kept": 0.9, "written": 0.25}}
        route.fulfill(response=response, json=answer)

    page.route(INSPECT, change)
    look_inside(page, real_server)
    expect(section(page, "Layers")).to_contain_text("The MLP of this layer has 16 experts.")
    expect(section(page, "Layers").locator(".experts")).to_have_text("Expert 3 62.5 %Expert 11 37.5 %")
    expect(page.get_by_role("region", name="State").get_by_role("row").last).to_contain_text("Written25 %25 %")
    check_accessibility(page)
    page.unroute_all(behavior="wait")


@pytest.mark.long
def test_it_plays_to_the_end(page: Page, real_server: ServerProcess) -> None:
    look_inside(page, real_server, num_tokens=2)
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_role("slider", name="Position")).to_have_attribute("aria-valuetext", "After token 14 of 15")
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    expect(page.get_by_role("button", name="Next token")).to_be_disabled()


def test_by_keyboard(page: Page, real_server: ServerProcess) -> None:
    look_inside(page, real_server)
    page.get_by_role("button", name="Next token").focus()
    page.keyboard.press("Enter")
    slider = page.get_by_role("slider", name="Position")
    expect(slider).to_have_attribute("aria-valuetext", "After token 14 of 17")
    page.keyboard.press("Tab")
    expect(slider).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(slider).to_have_attribute("aria-valuetext", "After token 13 of 17")
    page.get_by_role("gridcell", selected=True).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("gridcell", selected=True)).to_be_focused()
    expect(section(page, "Layers")).to_contain_text("Its guesses here layer 17")
    expect(slider).to_have_attribute("aria-valuetext", "After token 12 of 17")
    wait_for_reading(page)
    page.get_by_role("radio", checked=True).focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", checked=True)).to_be_focused()
    expect(page.get_by_role("img", name=re.compile("Attention of layer 17, head 2"))).to_be_visible()
    expect(section(page, "Sampling")).to_contain_text("Nothing is drawn here")  # but for a token of the prompt


@pytest.mark.long
def test_an_answer_is_opened_by_its_id(page: Page, real_server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 4, "temperature": 0}
    answer = real_server.answer(CHAT, body)
    page.goto(f"{real_server.url}/#/inside?id={answer['id']}")
    wait_for_reading(page)
    expect(section(page, "Sampling")).to_contain_text("the token that was sent")
    text = answer["choices"][0]["message"]["content"]
    assert text.startswith(section(page, "Fed back").locator("mark").text_content() or "nothing")
    page.goto(f"{real_server.url}/#/tokens?id={answer['id']}")
    tokens = page.get_by_role("listbox").get_by_role("option")
    expect(tokens.last).to_be_visible()
    assert "".join(tokens.all_text_contents()).replace("⏎\n", "\n").endswith(text)
    tokens.last.click()
    expect(page.get_by_text("the token that was sent")).to_be_visible()
    page.get_by_role("link", name="See the whole model at this position").click()
    expect(page.get_by_role("slider", name="Position")).to_have_attribute(
        "aria-valuetext", re.compile(r"After token (\d+) of \d+")
    )


@pytest.mark.long
def test_hostile_text_stays_text(page: Page, real_server: ServerProcess) -> None:
    look_inside(page, real_server, HOSTILE, num_tokens=1)
    expect(section(page, "Fed back")).to_contain_text(HOSTILE)
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "Inside · Lightwell"


def refuse(status: int, code: str, route: Route) -> None:
    route.fulfill(status=status, json={"error": {"message": "Because.", "code": code}})


@pytest.mark.long
def test_refusals_are_explained(page: Page, real_server: ServerProcess) -> None:
    for status, code, title, may_retry in (
        (403, "forbidden", "Looking inside is not allowed from here.", False),
        (404, "not_enabled", "Inspection is turned off.", False),
        (404, "tokens_not_kept", "There is nothing left to look at.", False),
        (503, "overloaded", "The memory is needed for answers just now.", True),
    ):
        page.route(INSPECT, partial(refuse, status, code))
        page.goto("about:blank")
        page.goto(f"{real_server.url}/#/inside")
        page.get_by_role("button", name="Look inside").click()
        expect(page.get_by_role("alert")).to_contain_text(f"{title} Because.")
        expect(page.get_by_role("button", name="Try again")).to_have_count(int(may_retry))
        page.unroute(INSPECT)
    page.get_by_role("button", name="Try again").click()
    wait_for_reading(page)
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.long
def test_a_busy_engine_is_asked_again(page: Page, real_server: ServerProcess) -> None:
    refusals: list[Route] = []

    def refuse_once(route: Route) -> None:
        if refusals:
            route.continue_()
            return
        refusals.append(route)
        route.fulfill(status=429, headers={"retry-after": "1"}, json={"error": {"message": "Busy.", "code": "x"}})

    page.route(INSPECT, refuse_once)
    look_inside(page, real_server, num_tokens=2)
    assert len(refusals) == 1
    expect(page.get_by_role("alert")).to_have_count(0)
