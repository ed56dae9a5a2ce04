"""The view Chat, as a person uses it."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.support.browser import check_accessibility
from tests.support.paths import ROOT
from tests.support.server_process import CHAT, MODEL, ServerProcess
from tests.support.serving import wait_until

PROMPT = "What is the capital of France?"
ENDLESS = {"ignore_eos": True, "max_completion_tokens": 1500}
GREEDY = {"temperature": 0, "max_completion_tokens": 24}
HOSTILE = """<img src=x onerror="document.title='hacked'"> <script>document.title='hacked'</script>
[link](javascript:document.title='hacked') ![picture](http://elsewhere.test/a.png) `<b>code</b>`

```html
</code></pre><script>document.title='hacked'</script>
```"""
TOOL = {"type": "function", "function": {"name": "<b>tool</b>", "parameters": {"type": "object", "properties": {}}}}


def open_chat(page: Page, server: ServerProcess, **settings: Any) -> None:
    """Open a new chat whose settings differ from the defaults."""
    page.add_init_script(f"localStorage.setItem('lightwell-chat-settings', JSON.stringify({json.dumps(settings)}))")
    page.goto(server.url)
    expect(box(page)).to_be_visible()
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()


def box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message", exact=True)


def send(page: Page, text: str = PROMPT) -> None:
    box(page).fill(text)
    box(page).press("Enter")


def answers(page: Page) -> Locator:
    return page.get_by_role("article", name="The model")


def wait_for_answer(page: Page, num: int = 1) -> Locator:
    """Return the answer that is the `num`th of the branch, when it is complete."""
    answer = answers(page).nth(num - 1)
    expect(answer).to_have_attribute("aria-busy", "false")
    return answer


def wait_for_tokens(page: Page) -> None:
    """Return when an answer is arriving, and its speed is shown."""
    expect(page.locator(".composer .stats")).to_contain_text("first after")


def stream(*deltas: dict[str, Any], is_complete: bool = True) -> str:
    """Return a stream of chunks as the server would send it."""
    chunks = [
        {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*events, "data: [DONE]\n\n" if is_complete else ""])


def answer_with(page: Page, body: str, status: int = 200, **headers: str) -> None:
    """Answer the requests of the page in place of the server."""
    kind = "text/event-stream" if status == 200 else "application/json"

    def fulfill(route: Route) -> None:
        route.fulfill(status=status, headers={"content-type": kind} | headers, body=body)

    page.route(f"**{CHAT}", fulfill)


def sent(page: Page, action: Any) -> dict[str, Any]:
    """Return the request that an action sends."""
    with page.expect_request(f"**{CHAT}") as request:
        action()
    body = request.value.post_data_json
    assert isinstance(body, dict)
    return body


def ask(server: ServerProcess, **fields: Any) -> str:
    body = {"messages": [{"role": "user", "content": PROMPT}]} | fields
    return str(server.answer(CHAT, body)["choices"][0]["message"]["content"])


def seconds(text: str) -> float:
    """Return the seconds of a duration as the page shows it."""
    number, unit = text.split(" ")
    return float(number) / {"ms": 1000, "s": 1}[unit]


def test_the_measures_of_an_answer(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server)
    texts = page.evaluate(
        """async () => {
            const { statsText } = await import('/assets/app/chat/stats.js');
            const { tokensPerSecond } = await import('/assets/app/chat/generate.js');
            const run = { first: 500, last: 2500, tokens: 81, tokensAtFirst: 1 };
            return [statsText(81, tokensPerSecond(run), 0.5), statsText(1, 0, null)];
        }"""
    )
    assert texts == ["81 tokens · 40.0 tokens/s · first after 500 ms", "1 token"]


def test_an_answer(page: Page, real_server: ServerProcess) -> None:
    """It is what the API answers, it is measured, and the conversation is kept."""
    parameters = GREEDY | {"max_completion_tokens": 80, "ignore_eos": True}  # more than arrive at once
    open_chat(page, real_server, parameters=parameters)
    send(page)
    answer = wait_for_answer(page)
    expect(answer.locator(".markdown")).to_contain_text(ask(real_server, **parameters).split("\n")[0])
    stats = re.compile(r"^80 tokens · (?:[\d.]+ tokens/s · )?first after (\S+ m?s) · (\S+ m?s) · 37 in the prompt")
    expect(answer.locator(".stats")).to_have_text(stats)
    found = stats.search(answer.locator(".stats").inner_text())
    assert found is not None
    # A browser on a busy machine may get all tokens at once: then there is no speed.
    assert "tokens/s" in found[0] or seconds(found[2]) - seconds(found[1]) < 0.03
    for link in answer.locator(".other-views a").all():
        assert "chatcmpl-" in (link.get_attribute("href") or "")
    expect(answer.locator(".other-views a")).to_have_text(["Tokens", "Inside", "Request"])
    expect(page).to_have_url(re.compile("#/chat/[0-9a-f]{18}$"))
    shown = answer.inner_text()
    page.reload()
    expect(answers(page)).to_have_text(re.compile(re.escape(shown.split("\n")[0])))
    expect(page.get_by_role("link", name=PROMPT)).to_have_attribute("aria-current", "page")


def test_stop_and_continue(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, parameters=ENDLESS)
    send(page)
    expect(answers(page).locator(".markdown")).to_contain_text(re.compile(r"\w"))
    wait_for_tokens(page)
    page.get_by_role("button", name="Stop").click()
    answer = wait_for_answer(page)
    expect(answer.locator(".stats")).to_contain_text("stopped")
    wait_until(lambda: real_server.is_idle, 60)
    text = page.evaluate(
        "JSON.parse(Object.entries(localStorage).find(([k]) => k.startsWith('lightwell-chat:'))[1]).messages[1].content"
    )
    body = sent(page, page.get_by_role("button", name="Continue").click)
    assert body["messages"][-1] == {"role": "assistant", "content": text}
    assert body["continue_final_message"] is True
    box(page).press("Escape")
    wait_for_answer(page)
    expect(answers(page)).to_have_count(1)


def test_branches(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, parameters=GREEDY | {"max_completion_tokens": 4})
    send(page)
    wait_for_answer(page)
    page.get_by_role("button", name="Answer again").click()
    answer = wait_for_answer(page)
    expect(answer).to_contain_text("2/2")
    expect(answer).to_be_focused()
    answer.get_by_role("button", name="Branch before").click()
    expect(answers(page)).to_contain_text("1/2")
    expect(answers(page)).to_be_focused()  # the button is disabled now
    page.get_by_role("article", name="You").hover()
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_role("textbox", name="Edit the message").fill("And of Spain?")
    body = sent(page, page.locator("form.editor").get_by_role("button", name="Send").click)
    assert body["messages"] == [{"role": "user", "content": "And of Spain?"}]
    wait_for_answer(page)
    page.get_by_role("article", name="You").get_by_role("button", name="Branch before").click()
    expect(page.get_by_role("article", name="You")).to_contain_text(PROMPT)
    expect(answers(page)).to_contain_text("2/2")
    answers(page).get_by_role("button", name="Edit").click()
    page.get_by_role("button", name="Cancel").click()
    expect(answers(page).get_by_role("button", name="Edit")).to_be_focused()
    page.keyboard.press("Enter")
    page.get_by_role("textbox", name="Edit the message").fill("Rome")
    page.get_by_role("button", name="Save").click()
    expect(answers(page).locator(".markdown")).to_have_text("Rome")
    expect(answers(page).locator(".other-views")).to_have_count(0)  # no request has written this
    body = sent(page, lambda: send(page, "Sure?"))
    assert [message["content"] for message in body["messages"]] == [PROMPT, "Rome", "Sure?"]


def test_settings_are_sent(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature, exact").fill("0.3")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Stop texts").fill("One\nTwo")
    page.get_by_text("Repetition", exact=True).click()
    page.get_by_role("slider", name="Presence penalty").fill("0.5")
    page.get_by_text("Words and order").click()
    page.get_by_label("Logit bias").fill('{"5": -1}')
    page.get_by_text("Other parameters").click()
    page.get_by_label("JSON", exact=True).fill('{"max_completion_tokens": 3}')
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("button", name="temperature 0.3")).to_be_visible()
    body = sent(page, lambda: send(page))
    assert body.pop("stream_options") == {"include_usage": True, "continuous_usage_stats": True}
    assert body == {
        "model": MODEL,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}],
        "temperature": 0.3,
        "seed": 7,
        "stop": ["One", "Two"],
        "presence_penalty": 0.5,
        "logit_bias": {"5": -1},
        "max_completion_tokens": 3,
        "stream": True,
    }
    expect(wait_for_answer(page).locator(".stats")).to_contain_text("3 tokens")


@pytest.mark.long
def test_each_control_is_a_parameter_of_the_api(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server)
    controls = page.evaluate("import('/assets/app/chat/parameters.js').then((module) => module.PARAMETERS)")
    schemas = real_server.get("/openapi.json").json()["components"]["schemas"]
    parameters = schemas["ChatCompletionRequest"]["properties"]
    assert len(controls) > 25
    for control in controls:
        (schema,) = [each for each in parameters[control["name"]]["anyOf"] if each.get("type") != "null"][:1]
        if "min" in control:
            assert control["min"] >= schema.get("minimum", schema.get("exclusiveMinimum")), control
        if "max" in control:
            assert control["max"] <= schema["maximum"], control


@pytest.mark.long
def test_json_that_matches_a_schema(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, parameters={"temperature": 0, "max_completion_tokens": 100})
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("Format of the answer").click()
    page.get_by_label("Format", exact=True).select_option("json_schema")
    schema = {"type": "object", "properties": {"capital": {"enum": ["Paris", "Rome"]}}, "required": ["capital"]}
    page.get_by_label("JSON schema").fill("{")
    expect(page.get_by_text("cannot be read as JSON")).to_be_visible()
    page.get_by_label("JSON schema").fill(json.dumps(schema))
    page.get_by_role("button", name="Close").click()
    send(page)
    text = wait_for_answer(page).locator(".markdown").inner_text()
    assert json.loads(text)["capital"] in ("Paris", "Rome")


def test_tools(page: Page, real_server: ServerProcess) -> None:
    tool = {"name": "look_up", "parameters": {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"]}}
    parameters = {"temperature": 0, "max_completion_tokens": 100, "parallel_tool_calls": False}
    tools = json.dumps([{"type": "function", "function": tool}])
    open_chat(page, real_server, parameters=parameters, tools=tools, toolChoice="required")
    send(page)
    answer = wait_for_answer(page)
    expect(answer).to_contain_text("Call of look_up")
    answer.get_by_label("Result of look_up").fill("42")
    body = sent(page, answer.get_by_role("button", name="Send the results").click)
    (call,) = body["messages"][1]["tool_calls"]
    assert call["function"]["name"] == "look_up"
    assert json.loads(call["function"]["arguments"]) == {"n": 1}
    assert body["messages"][2] == {"role": "tool", "tool_call_id": call["id"], "content": "42"}
    wait_for_answer(page, 2)


@pytest.mark.long
def test_thinking_is_folded_away(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server)
    thoughts = [{"reasoning_content": text} for text in ("Hm, ", "let me see.")]
    answer_with(page, stream(*thoughts, {"content": "Paris."}))
    send(page)
    answer = wait_for_answer(page)
    expect(answer.get_by_text("Paris.")).to_be_visible()
    expect(answer.get_by_text("Hm, let me see.")).to_be_hidden()
    answer.get_by_text("Thought").click()
    expect(answer.get_by_text("Hm, let me see.")).to_be_visible()


def test_refusals_are_shown(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, parameters=GREEDY)
    answer_with(page, json.dumps({"error": {"message": "No room."}}), 429, **{"retry-after": "7"})
    send(page)
    expect(page.get_by_role("alert")).to_contain_text("No room. Try again in 7 s.")
    page.unroute(f"**{CHAT}")
    page.get_by_role("button", name="Try again").click()
    wait_for_answer(page)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_stream_that_breaks(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, parameters=None)  # damaged settings are dropped
    answer_with(page, stream({"content": "Once upon "}, is_complete=False))
    send(page)
    expect(page.get_by_role("alert")).to_contain_text("ended before it was complete")
    expect(answers(page)).to_contain_text("Once upon")
    expect(page.get_by_role("button", name="Continue")).to_be_visible()


@pytest.mark.long
def test_the_engine_dies_while_it_answers(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, parameters=ENDLESS)
    send(page)
    wait_for_tokens(page)
    real_server.engine.kill()
    expect(page.get_by_role("alert").filter(has_text="Try again")).to_be_visible()
    expect(answers(page).locator(".markdown")).to_contain_text(re.compile(r"\w"))
    real_server.wait_until_ready()
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    wait_for_tokens(page)
    box(page).press("Escape")
    wait_for_answer(page)


def test_text_of_others_stays_text(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, system=HOSTILE, tools=json.dumps([TOOL]))
    call = {"index": 0, "id": "1", "function": {"name": "<b>tool</b>", "arguments": HOSTILE}}
    answer_with(page, stream({"reasoning_content": HOSTILE}, {"content": HOSTILE}, {"tool_calls": [call]}))
    send(page, HOSTILE)
    answer = wait_for_answer(page)
    answer.get_by_text("Thought").click()
    page.get_by_role("button", name="Use it from a program").click()
    thread = page.locator("#app")
    for tag in ("script", "b", "img[src=x]", "a[href^=javascript]", "img[src*=elsewhere]"):
        expect(thread.locator(tag)).to_have_count(0)
    expect(answer.locator(".thoughts")).to_contain_text("<script>document.title='hacked'</script>")
    expect(answer.locator(".markdown")).to_contain_text("[link](javascript:document.title='hacked')")
    expect(answer).to_contain_text("Call of <b>tool</b>")
    assert page.title() == "Chat · Lightwell"


def test_conversations_are_kept(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, parameters=GREEDY | {"max_completion_tokens": 2})
    for text in ("First", "Second"):
        page.get_by_role("link", name="New chat").click()
        expect(answers(page)).to_have_count(0)  # the box of the last chat is gone
        send(page, text)
        wait_for_answer(page)
    names = page.get_by_role("navigation", name="Conversations").get_by_role("listitem")
    expect(names).to_have_text(["Second", "First"])
    newest = names.first
    with page.expect_download() as download:
        newest.get_by_role("button", name="Export as JSON").click()
    exported = json.loads(download.value.path().read_text())
    assert [message["role"] for message in exported["messages"]] == ["user", "assistant"]
    page.get_by_label("Import conversations").first.set_input_files(download.value.path())
    expect(names).to_have_text(["Second", "Second", "First"])
    first, second = exported["messages"]
    wrong_files: list[dict[str, Any]] = [
        {},
        exported | {"settings": {}},
        exported | {"settings": exported["settings"] | {"parameters": None}},
        exported | {"messages": [{"id": "1", "role": "user", "content": 1}]},
        exported | {"messages": [first | {"parent": second["id"]}, second]},
        exported | {"messages": [first, second | {"id": first["id"]}]},
        exported | {"messages": [first, second | {"answer": second["answer"] | {"first": "now"}}]},
        exported | {"tip": "nothing"},
    ]
    for wrong in wrong_files:
        file: Any = {"name": "a.json", "mimeType": "application/json", "buffer": json.dumps(wrong).encode()}
        page.get_by_label("Import conversations").first.set_input_files(file)
        expect(page.get_by_role("alert")).to_contain_text("a.json is no conversation")
    newest.get_by_role("button", name="Rename").click()
    page.get_by_role("textbox", name="Title").fill("Another name")
    page.get_by_role("button", name="Rename", exact=True).last.click()
    expect(names).to_have_text(["Another name", "Second", "First"])
    newest.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(names).to_have_text(["Second", "First"])
    expect(answers(page)).to_have_count(0)
    page.get_by_role("link", name="First").click()
    expect(answers(page)).to_have_count(1)


@pytest.mark.long
def test_the_oldest_conversations_make_room(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, parameters={"max_completion_tokens": 1})
    page.evaluate("""async () => {
      const { NO_SETTINGS: settings } = await import("/assets/app/chat/settings_store.js");
      for (let i = 0; i < 250; i += 1) {
        const messages = [{ id: `m${i}`, parent: null, role: "user", content: "x".repeat(i < 200 ? 10 : 15000) }];
        const conversation = { id: `c${i}`, title: "T", updated: i, settings, messages, tip: null };
        localStorage.setItem(`lightwell-chat:c${i}`, JSON.stringify(conversation));
      }
    }""")
    page.reload()
    send(page)
    wait_for_answer(page)
    kept = page.evaluate("Object.keys(localStorage).filter((name) => name.startsWith('lightwell-chat:'))")
    assert len(kept) == 200
    assert {"lightwell-chat:c249", "lightwell-chat:c51"} <= set(kept)
    assert "lightwell-chat:c50" not in kept


@pytest.mark.long
def test_a_conversation_that_is_too_large_drops_no_other(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, parameters={"max_completion_tokens": 1})
    send(page)
    wait_for_answer(page)
    page.evaluate("""async () => {
      const { addMessage, create } = await import("/assets/app/chat/store.js");
      addMessage(create("Much").id, { parent: null, role: "user", content: "x".repeat(4e6) });
    }""")
    expect(page.get_by_role("link", name="Much")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("no room to keep the conversation")
    other_tab = page.context.new_page()
    other_tab.goto(real_server.url)
    id = other_tab.evaluate("import('/assets/app/chat/store.js').then(({ create }) => create('Another tab').id)")
    expect(page.get_by_role("link", name="Another tab")).to_be_visible()
    other_tab.evaluate("(id) => import('/assets/app/chat/store.js').then(({ remove }) => remove(id))", id)
    expect(page.get_by_role("link", name="Another tab")).to_have_count(0)
    expect(page.get_by_role("link", name="Much")).to_be_visible()
    other_tab.close()
    page.reload()
    expect(page.get_by_role("link", name=PROMPT)).to_be_visible()


@pytest.mark.long
def test_text_files(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, parameters={"max_completion_tokens": 1})
    box(page).fill("Explain this.")
    texts = {"a.py": b"x = 1\n", "b.md": b"```\n", "c.bin": b"\0\xff"}
    files: Any = [{"name": name, "mimeType": "text/plain", "buffer": text} for name, text in texts.items()]
    page.get_by_label("Add text files").first.set_input_files(files)
    expect(page.get_by_role("alert")).to_have_text("c.bin is not a text in UTF-8.")
    expect(box(page)).to_have_value("Explain this.\n\na.py\n```\nx = 1\n```\n\nb.md\n````\n```\n````")
    body = sent(page, lambda: box(page).press("Enter"))
    assert body["messages"][0]["content"].startswith("Explain this.")


def program(page: Page, language: str) -> str:
    page.get_by_role("button", name="Use it from a program").click()
    page.get_by_role("radio", name=language).check()
    return page.get_by_role("dialog").locator("pre").inner_text()


@pytest.mark.long
@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_programs_get_the_same_answer(page: Page, real_server: ServerProcess, language: str) -> None:
    settings = {"temperature": 0, "max_completion_tokens": 12, "min_p": 0.1, "stop": ["#'\"\\"]}
    open_chat(page, real_server, parameters=settings, system='Don\'t say "hello".')
    send(page)
    wait_for_answer(page)
    text = program(page, language)
    system = {"role": "system", "content": 'Don\'t say "hello".'}
    expected = ask(real_server, **settings, messages=[system, {"role": "user", "content": PROMPT}])
    folder = ROOT / "tests/conformance"
    if language == "JavaScript" and not (folder / "node_modules/openai").exists():
        pytest.skip("needs the package openai of npm")
    shells = {
        "curl": ("bash", "-c"),
        "Python": (sys.executable, "-c"),
        "JavaScript": ("node", "--input-type=module", "-e"),
    }
    process = subprocess.run([*shells[language], text], capture_output=True, text=True, check=True, cwd=folder)
    found = json.loads(process.stdout)["choices"][0]["message"]["content"] if language == "curl" else process.stdout
    assert found.strip() == expected.strip()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Use it from a program")).to_be_focused()


def test_the_key(page: Page, real_server: ServerProcess) -> None:
    """A key that the server no longer accepts is asked for, and the conversation is there afterwards."""
    open_chat(page, real_server)
    answer_with(page, json.dumps({"error": {"message": "Invalid API key."}}), 401)
    page.evaluate("sessionStorage.setItem('lightwell-api-key', 'old')")
    send(page)
    expect(page.get_by_text("The server does not accept this key.")).to_be_visible()
    page.get_by_label("API key").fill("ключ")
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_text("A key has only letters, digits and punctuation")).to_be_visible()
    page.get_by_label("API key").fill("new")
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Invalid API key.")
    with page.expect_request(f"**{CHAT}") as request:
        page.get_by_role("button", name="Try again").click()
    assert request.value.headers["authorization"] == "Bearer new"


@pytest.mark.long
def test_blocked_storage(page: Page, real_server: ServerProcess) -> None:
    """The key and the conversation last until the page is closed."""
    for name in ("localStorage", "sessionStorage"):
        page.add_init_script(f"Object.defineProperty(window, '{name}', {{ get() {{ throw new Error('blocked'); }} }})")
    page.goto(real_server.url)
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
    answer_with(page, json.dumps({"error": {"message": "No key."}}), 401)
    send(page)
    page.get_by_label("API key").fill("new")
    page.get_by_label("API key").press("Enter")
    with page.expect_request(f"**{CHAT}") as request:
        page.get_by_role("button", name="Try again").click()
    assert request.value.headers["authorization"] == "Bearer new"


@pytest.mark.long
def test_a_model_that_is_gone(page: Page, real_server: ServerProcess) -> None:
    """The models are read again."""
    open_chat(page, real_server)
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "another"}]}))
    answer_with(page, json.dumps({"error": {"message": "Gone.", "code": "model_not_found"}}), 404)
    send(page)
    expect(page.locator(".chips")).to_contain_text("another")


def test_keyboard_only(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server, parameters=ENDLESS)
    expect(box(page)).to_be_focused()
    page.keyboard.type("Tell me")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a story")
    body = sent(page, lambda: page.keyboard.press("Enter"))
    assert body["messages"][0]["content"] == "Tell me\na story"
    wait_for_tokens(page)
    page.keyboard.press("Escape")
    wait_for_answer(page)
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "Answer again, in a new branch":
            break
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("2/2")
    box(page).press("Escape")
    wait_for_answer(page)


@pytest.mark.long
@pytest.mark.parametrize(("theme", "width"), [("light", 360), ("dark", 1280), ("light", 2560)])
def test_everybody_can_read_it(page: Page, real_server: ServerProcess, theme: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=theme)
    open_chat(page, real_server, tools=json.dumps([TOOL]))
    check_accessibility(page)
    call = {"index": 0, "id": "1", "function": {"name": "tool", "arguments": "{}"}}
    text = "# Title\n\n1. one\n   - two\n\n> quote\n\n|a|b|\n|-|-|\n|1|2|\n\n```python\n" + "x = 1; " * 40
    text += "\n```\n" + "w" * 300
    answer_with(page, stream({"reasoning_content": "Hm"}, {"content": text}, {"tool_calls": [call]}))
    send(page)
    wait_for_answer(page)
    check_accessibility(page)
    if width < 2560:
        page.get_by_role("button", name="Settings").click()
    page.get_by_text("Which tokens may be chosen").click()
    check_accessibility(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_markdown(page: Page, real_server: ServerProcess) -> None:
    open_chat(page, real_server)
    blocks = page.evaluate(
        """import("/assets/app/chat/markdown_parser.js").then(({ parseBlocks }) =>
          parseBlocks("# A\\n\\n- x\\n  - y\\n\\n2) z\\n\\n~~~c\\n#\\n"))"""
    )
    paragraph = {"type": "paragraph"}
    inner = {"type": "list", "isOrdered": False, "start": 1, "items": [[paragraph | {"text": "y"}]]}
    assert blocks == [
        {"type": "heading", "level": 1, "text": "A"},
        {"type": "list", "isOrdered": False, "start": 1, "items": [[paragraph | {"text": "x"}, inner]]},
        {"type": "list", "isOrdered": True, "start": 2, "items": [[paragraph | {"text": "z"}]]},
        {"type": "code", "language": "c", "text": "#\n"},
    ]
    inline = page.evaluate(
        "import('/assets/app/chat/markdown_parser.js').then(({ parseInline }) =>"
        " parseInline('a **b *c*** `d` my_var_x 2*3*4 [e](https://e.test/(x)) [f](data:x)'))"
    )
    found = "|".join(f"{each['type']} {each['text']}" for each in inline)
    expected = "text a |strong b *c*|text  |code d|text  my_var_x 2|emphasis 3|text 4 |link e|text  |text [f](data:x)"
    assert found == expected
    assert [each["url"] for each in inline if "url" in each] == ["https://e.test/(x)"]


@pytest.mark.long
def test_nothing_moves_while_an_answer_arrives(page: Page, real_server: ServerProcess) -> None:
    """Only the answer itself grows."""
    open_chat(page, real_server, parameters={"ignore_eos": True, "max_completion_tokens": 60})
    page.evaluate("""() => {
      window.shift = 0;
      const add = (list) => list.getEntries().forEach((entry) => { if (!entry.hadRecentInput) shift += entry.value; });
      new PerformanceObserver(add).observe({ type: "layout-shift" });
    }""")
    send(page)
    wait_for_answer(page)
    assert page.evaluate("shift") < 0.05


# A beginning, a part that is repeated, and an end.
SLOW = [
    *[("", part, "") for part in ("**a ", "*a ", "`", "[", "[a](", "_a ", "> ", "- ", "|-\n", "a\n", "- a\n", "~~~\n")],
    *[("", part, "") for part in ("https://", " ", "a ", "#", "~", "|")],
    *[(beginning, " ", "a\ra`") for beginning in ("a", "# ", "~~~", "- ", "> ", "a|b\n-", "a|b\n")],
    ("~~~", "~", "`"),
    ("# ", "# ", "a"),
]


@pytest.mark.long
def test_markdown_that_is_made_to_be_slow(page: Page, real_server: ServerProcess) -> None:
    """A text that is 16 times as long takes about 16 times as long to read, not 256 times."""
    page.goto(f"{real_server.url}/#/tokens")
    script = """async ([beginning, part, end]) => {
      const { parseBlocks, parseInline } = await import("/assets/app/chat/markdown_parser.js");
      const read = (blocks) => blocks.forEach(readBlock);
      const readBlock = ({ text = "", blocks = [], items = [] }) => {
        parseInline(text);
        read(blocks);
        items.forEach(read);
      };
      return [4000, 64000].map((count) => {
        const start = performance.now();
        read(parseBlocks(beginning + part.repeat(count) + end));
        return (performance.now() - start) / 1000;
      });
    }"""
    for text in SLOW:
        short, long = page.evaluate(script, list(text))
        assert long < 64 * short + 1, text
