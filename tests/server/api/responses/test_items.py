"""Output items of streamed and whole responses with log probabilities, reasoning and calls, for each finish reason."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine.shared.messages import FinishReason
from tests.server.api.responses.test_routes import ask, ask_events, ask_json
from tests.support.clients import shared_server
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error
from tests.support.tool_model import say, write_tool_model

TOOLS: list[Any] = [{"type": "function", "name": "weather"}, {"type": "function", "name": "time"}]
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
OTHER_CALL = '<tool_call>{"name": "time", "arguments": {"zone": 1}}</tool_call>'
LOGPROBS = ["message.output_text.logprobs"]

# Generated text, and the output as (item type, text).
OUTPUTS: list[tuple[str, list[tuple[str, str]]]] = [
    ("Hello", [("message", "Hello")]),
    (CALL, [("function_call", '{"city": "Paris"}')]),
    (f"{CALL}\n{OTHER_CALL}\n", [("function_call", '{"city": "Paris"}'), ("function_call", '{"zone": 1}')]),
    ("<think>\nHm.\n</think>\n\nHi", [("reasoning", "Hm."), ("message", "Hi")]),
    (f"<think>Hm.</think>{CALL}", [("reasoning", "Hm."), ("function_call", '{"city": "Paris"}')]),
    (
        f"<think>t < h</think>So <t: é <tool\n{CALL}",
        [("reasoning", "t < h"), ("message", "So <t: é <tool\n"), ("function_call", '{"city": "Paris"}')],
    ),
    (
        f"So{CALL}\nNow <<{OTHER_CALL}Then",
        [
            ("message", "So"),
            ("function_call", '{"city": "Paris"}'),
            ("message", "\nNow <<"),
            ("function_call", '{"zone": 1}'),
            ("message", "Then"),
        ],
    ),
    ("{<tool_cal", [("message", "{<tool_cal")]),
    ("<think>never ends", [("reasoning", "never ends")]),
]


@pytest.fixture(scope="module", params=[False, True], ids=["text-tags", "token-tags"])
def tools(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = write_tool_model(tmp_path_factory.mktemp("model"), special_tags=request.param)
    with shared_server(folder, vocab_size=263) as server:
        yield server


def item_text(item: dict[str, Any]) -> str:
    return str(item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in items]


@pytest.mark.parametrize("include", [None, LOGPROBS])
@pytest.mark.parametrize(("reply", "expected"), OUTPUTS)
def test_streamed_as_whole(
    tools: RunningServer, reply: str, expected: list[tuple[str, str]], include: list[str] | None
) -> None:
    say(tools, reply)
    fields: dict[str, Any] = {"tools": TOOLS, "include": include}
    whole = ask_json(tools, **fields)["output"]
    assert [(item["type"], item_text(item)) for item in whole] == expected
    for interval in (1, 2, 3, 5, 50):
        events = ask_events(tools, stream_interval=interval, **fields)
        output = events[-1]["response"]["output"]
        assert without_ids(output) == without_ids(whole)
        assert all(item["call_id"] for item in output if item["type"] == "function_call")
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        for item in output:
            if item["type"] == "message":
                of_item = [event for event in deltas if event["item_id"] == item["id"]]
                assert [each for event in of_item for each in event["logprobs"]] == item["content"][0]["logprobs"]
    for item in whole:
        if item["type"] == "message":
            tokens = [bytes(each["bytes"]) for each in item["content"][0]["logprobs"]]
            spoken = b"".join(tokens).removesuffix(b"<|endoftext|>").decode()
            assert spoken == (item_text(item) if include else "")


@pytest.mark.parametrize("reason", FinishReason)
def test_every_reason_to_end(server: RunningServer, fake_engine: FakeEngine, reason: FinishReason) -> None:
    fake_engine.config.last_reason = reason
    end, item_status = {
        FinishReason.STOP: ("completed", "completed"),
        FinishReason.REPETITION: ("completed", "completed"),
        FinishReason.LENGTH: ("incomplete", "incomplete"),
    }.get(reason, ("failed", None))
    last = ask_events(server)[-1]
    assert (last["type"], last["response"]["status"]) == (f"response.{end}", end)
    if end == "failed":
        check_error(ask(server), 500)
        return
    whole = ask_json(server)
    assert without_ids(last["response"]["output"]) == without_ids(whole["output"])
    assert (whole["status"], whole["output"][0]["status"]) == (end, item_status)
