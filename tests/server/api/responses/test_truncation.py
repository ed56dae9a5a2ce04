"""`truncation: auto` of `/v1/responses`: which messages are dropped from conversations that exceed the context."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.api.responses.test_routes import (
    MINIMAL,
    PATH,
    ask,
    ask_json,
    get,
    prompt_of,
)
from tests.support.clients import shared_server
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import chatml
from tests.support.tool_model import write_tool_model

LONG = "x" * 700  # the context has 2048 tokens


def user(text: str) -> tuple[str, str]:
    return "user", text


@pytest.mark.parametrize(
    ("turns", "kept"),
    [
        ([user("a"), ("assistant", "b"), user("c")], [0, 1, 2]),
        ([user(LONG), ("assistant", LONG), user(LONG)], [2]),
        ([user(LONG), ("assistant", "b"), user(LONG), ("assistant", "d"), user(LONG)], [2, 3, 4]),
        ([("system", "s"), user(LONG), ("developer", "t"), user(LONG), user(LONG)], [0, 2, 3, 4]),
        ([user(LONG * 1000), user("b")], [1]),
    ],
)
def test_the_oldest_turns_are_left_out(tiny: RunningServer, turns: list[tuple[str, str]], kept: list[int]) -> None:
    items = [{"role": role, "content": text} for role, text in turns]
    fields: dict[str, Any] = {"input": items, "instructions": "Brief.", "max_output_tokens": 20}
    answer = ask_json(tiny, truncation="auto", **fields)
    roles = {"developer": "system"}
    expected = chatml(("system", "Brief."), *((roles.get(*[turns[i][0]] * 2), turns[i][1]) for i in kept))
    assert prompt_of(tiny) == expected
    assert (answer["truncation"], answer["usage"]["input_tokens"]) == ("auto", len(expected))
    stored = get(tiny, f"{answer['id']}/input_items").json()["data"]
    assert len(stored) == len(turns)  # not truncated
    counted = httpx.post(f"{tiny.url}{PATH}/input_tokens", json=MINIMAL | {"truncation": "auto"} | fields)
    assert counted.json()["input_tokens"] == len(expected)
    if len(kept) < len(turns):
        assert check_error(ask(tiny, truncation="disabled", **fields), 400)["code"] == "context_length_exceeded"


def test_room_for_the_answer_counts(tiny: RunningServer) -> None:
    items = [{"role": "user", "content": text} for text in ("x" * 1000, "b")]
    assert len(prompt_for(tiny, items, 500)) > 1000
    assert prompt_for(tiny, items, 1500) == chatml(("user", "b"))
    for no_limit in (-1, 2048, 128_000):
        assert len(prompt_for(tiny, items, no_limit)) > 1000


def test_more_tokens_than_fit(tiny: RunningServer) -> None:
    rest = 2048 - len(chatml(("user", "Hi")))
    over = ask(tiny, max_output_tokens=128_000)
    assert over.headers["x-lightwell-warnings"] == f"max_output_tokens capped at {rest}, the rest of the context"
    unlimited = ask(tiny, max_output_tokens=-1)
    assert (unlimited.json()["max_output_tokens"], "x-lightwell-warnings" in unlimited.headers) == (None, False)
    assert tiny.engine.submits[-1].params.max_tokens == rest


def prompt_for(server: RunningServer, items: list[Any], max_output_tokens: int) -> list[int]:
    ask_json(server, input=items, truncation="auto", max_output_tokens=max_output_tokens)
    return prompt_of(server)


def test_calls_and_their_results_are_left_out_together(tools: RunningServer) -> None:
    call = {"type": "function_call", "name": "weather", "arguments": "{}"}
    items: list[dict[str, Any]] = [{"role": "user", "content": "Go"}]
    for number, output in enumerate((LONG, LONG, LONG, "last")):
        items += [call | {"call_id": f"call_{number}"}]
        items += [{"type": "function_call_output", "call_id": f"call_{number}", "output": output}]
    ask_json(tools, input=items, truncation="auto")
    text = tools.model.tokenizer.decode(prompt_of(tools), skip_special_tokens=False)
    assert (text.count("<tool_call>"), text.count("<|im_start|>tool\n")) == (3, 3)
    assert (text.count(LONG), "last" in text) == (2, True)


def test_a_template_that_wants_a_user_first(tmp_path: Path) -> None:
    """The kept part starts with a user message, although the last turn has many other messages."""
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('A user first!') }}{% endif %}"
    folder = write_tool_model(tmp_path, special_tags=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = strict + settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    items: list[dict[str, Any]] = [{"role": role, "content": LONG} for role in ("user", "assistant", "user")]
    items += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "Go"}]
    for number in range(6):
        call_id = f"call_{number}"
        items += [{"type": "function_call", "name": "weather", "arguments": "{}", "call_id": call_id}]
        items += [{"type": "function_call_output", "call_id": call_id, "output": "Rain"}]
    with shared_server(folder, vocab_size=263) as server:
        ask_json(server, input=items, truncation="auto", max_output_tokens=10)
        text = server.model.tokenizer.decode(prompt_of(server), skip_special_tokens=False)
    assert text.startswith(f"<|im_start|>user\n{LONG}<|im_end|>\n<|im_start|>assistant\nb")
    assert text.count("Rain") == 6


def test_a_single_message_that_is_too_long(tiny: RunningServer) -> None:
    for text in ("x" * 3000, "x" * 3_000_000):
        items = [{"role": "user", "content": "a"}, {"role": "user", "content": text}]
        error = check_error(ask(tiny, input=items, truncation="auto"), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
