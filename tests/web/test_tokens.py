"""The view of tokens: probabilities, what could have been written instead, branches."""

import re
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.support.browser import check_accessibility
from tests.support.server_process import CHAT, COMPLETIONS, ServerProcess

PROMPT = "The cat sat on the"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script> &amp;'
LABELS = {"max_tokens": "Tokens to write", "temperature": "Temperature", "top_k": "Top-k", "seed": "Seed"}


def tokens_of(page: Page, branch: int = 1) -> Locator:
    return page.get_by_role("listbox", name=f"Tokens of branch {branch}").get_by_role("option")


def generate(page: Page, server: ServerProcess, prompt: str = PROMPT, **settings: float) -> None:
    """Open the view and let the model go on with a prompt."""
    page.goto(f"{server.url}/#/tokens")
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_text("Settings of the sampler").click()
    for name, value in settings.items():
        box = page.get_by_label(f"{LABELS[name]}, exact", exact=True)
        box.fill(str(value))
        box.blur()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("of them written")).to_be_visible()


def text_of(page: Page, branch: int = 1) -> str:
    return "".join(tokens_of(page, branch).all_text_contents()).replace("⏎\n", "\n")


def completion(server: ServerProcess, prompt: Any, **fields: Any) -> Any:
    return server.answer(COMPLETIONS, {"prompt": prompt} | fields)["choices"][0]


def test_tokens_have_the_probabilities_of_the_api(page: Page, real_server: ServerProcess) -> None:
    generate(page, real_server, max_tokens=8, temperature=0)
    choice = completion(real_server, PROMPT, max_tokens=8, temperature=0, echo=True, logprobs=1)
    assert text_of(page) == choice["text"]
    labels = [token.get_attribute("aria-label") for token in tokens_of(page).all()]
    assert labels[0] == "The, no probability"
    for label, logprob in zip(labels[1:], choice["logprobs"]["token_logprobs"][1:], strict=True):
        shown = re.search(r"(< )?([\d.]+) %$", label or "")
        assert shown is not None, label
        assert float(shown[2]) == pytest.approx(100 * 2.718281828**logprob, abs=0.11)


def test_an_alternative_begins_a_branch(page: Page, real_server: ServerProcess) -> None:
    generate(page, real_server, max_tokens=6, temperature=0)
    tokens_of(page).nth(6).click()
    alternatives = page.get_by_role("list", name="Alternatives").get_by_role("listitem")
    expect(alternatives).to_have_count(10)
    button = alternatives.nth(3).get_by_role("button")
    chosen = (button.locator("code").text_content() or "").replace("␣", " ").replace("⏎", "\n")
    with page.expect_request(lambda request: "stream" in (request.post_data or "")) as branch:
        button.click()
    expect(page.get_by_text("of them written")).to_have_count(2)
    body: Any = branch.value.post_data_json
    prompt_ids = body["prompt"]  # the same text may have other tokens
    text = completion(real_server, prompt_ids, max_tokens=6, temperature=0, echo=True)["text"]
    assert text_of(page, 2) == text
    assert text.startswith("".join(tokens_of(page).all_text_contents()[:6]) + chosen)
    page.get_by_role("button", name="Close branch 1").click()
    expect(page.get_by_role("listbox")).to_have_count(1)


def test_what_the_sampler_did_is_shown(page: Page, real_server: ServerProcess) -> None:
    page.set_viewport_size({"width": 360, "height": 780})
    generate(page, real_server, max_tokens=4, temperature=0.8, top_k=5, seed=1)
    chart = page.get_by_role("img", name="Surprise and entropy of 9 tokens.")
    expect(chart).to_have_attribute("aria-label", re.compile(r"on average, at most [\d.]+ at position \d+, “"))
    tokens_of(page).nth(6).click()
    stages = page.get_by_role("region", name="Stages of the sampler")
    expect(stages.get_by_role("row", name="Possible")).to_contain_text(re.compile(r"49,152.*49,152.*5"))
    written = (tokens_of(page).nth(6).text_content() or "").replace(" ", "␣").replace("⏎\n", "⏎")
    expect(page.get_by_text("Computed again just now")).to_contain_text(f"{written}, the token that was sent.")
    expect(page.get_by_role("region", name="Noise").get_by_role("row", name="wins")).to_contain_text(written)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    check_accessibility(page)


@pytest.mark.long
def test_by_keyboard(page: Page, real_server: ServerProcess) -> None:
    generate(page, real_server, max_tokens=6, temperature=0)
    tokens_of(page).last.focus()
    page.keyboard.press("Home")
    expect(tokens_of(page).first).to_be_focused()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    expect(tokens_of(page).nth(6)).to_be_focused()
    expect(tokens_of(page).nth(6)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Enter")
    expect(page.get_by_role("list", name="Alternatives").get_by_role("button").first).to_be_focused()
    page.keyboard.press("Escape")
    expect(tokens_of(page).nth(6)).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_text("of them written")).to_have_count(2)


@pytest.mark.long
def test_a_chat_is_shown_with_its_template(page: Page, real_server: ServerProcess) -> None:
    page.goto(f"{real_server.url}/#/tokens")
    page.get_by_label("Prompt").fill("Say hi")
    page.get_by_label("Message of a chat").check()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("of them written")).to_be_visible()
    messages = [{"role": "user", "content": "Say hi"}]
    assert text_of(page).startswith(real_server.answer(f"{CHAT}/render", {"messages": messages})["prompt"])


@pytest.mark.long
def test_hostile_text_stays_text(page: Page, real_server: ServerProcess) -> None:
    generate(page, real_server, HOSTILE, max_tokens=2, temperature=0)
    assert text_of(page).startswith(HOSTILE)
    assert page.locator("main img, main script").count() == 0
    page.goto("about:blank")
    generate(page, real_server, "\u202e", max_tokens=1, temperature=0)
    assert text_of(page).startswith("⟨e2 80⟩⟨ae⟩"), "parts of characters are shown as bytes"
    assert page.title() == "Tokens · Lightwell"


@pytest.mark.long
def test_a_refused_request_says_why(page: Page, real_server: ServerProcess) -> None:
    page.goto(f"{real_server.url}/#/tokens")
    page.get_by_label("Prompt").fill("word " * 3000)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("2048")


@pytest.mark.long
def test_an_answer_that_breaks_off_says_so(page: Page, real_server: ServerProcess) -> None:
    def cut(route: Route) -> None:
        if "stream" in (route.request.post_data or ""):
            route.fulfill(content_type="text/event-stream", body=": nothing comes\n\n")
        else:
            route.continue_()

    page.route("**/v1/completions", cut)
    page.goto(f"{real_server.url}/#/tokens")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("The answer broke off")
