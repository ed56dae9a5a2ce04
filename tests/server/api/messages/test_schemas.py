"""Request forms of `POST /v1/messages` that Anthropic's clients send: each takes effect or is rejected by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from anthropic.types import ContentBlockParam, MessageParam, ToolUnionParam, tool_result_block_param
from anthropic.types.beta import BetaContentBlockParam, BetaToolComputerUse20250124Param, BetaToolUnionParam
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter

from engine.shared.messages import FinishReason
from server.api.chat.request_builder import EXTENSIONS
from server.api.messages.client_tools import CLIENT_TOOLS
from server.api.messages.schemas import MessagesRequest
from server.api.messages.writer import STOP_REASONS
from server.schemas.request_fields import MAX_STOPS
from tests.server.api.messages.test_routes import ask, ask_events, ask_json, error_of
from tests.server.api.responses.test_schemas import types_of
from tests.server.api.test_every_field import ANTHROPIC, COUNT, SAMPLING, SCHEMA, WRONG, post, seen
from tests.server.conftest import StartServer
from tests.support.clients import MESSAGES, shared_server
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer
from tests.support.tiny_tokenizer_model import CHAT_TEMPLATE, chatml, write_tiny_model
from tests.support.tool_model import say, write_tool_model

Fields = dict[str, Any]

PARAM: TypeAdapter[Any] = TypeAdapter(MessageParam)
TOOLS: list[Any] = [{"name": "weather", "input_schema": SCHEMA}]


@pytest.fixture(scope="module")
def tiny(model_folder: Path) -> Iterator[RunningServer]:
    with shared_server(model_folder) as server:
        yield server


@pytest.fixture(scope="module")
def reasoning_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of a model with tools and reasoning."""
    folder = write_tool_model(tmp_path_factory.mktemp("model"), special_tags=True)
    with shared_server(folder, vocab_size=263) as server:
        say(server, "<think>Hm.</think>Hello, <|im_end|>world, hello, world!")
        yield server


# System messages.

LATE = "{% if message.role == 'system' and not loop.first %}"
# How a template treats a system message that is not the first -> the beginning of its loop.
TEMPLATES = {
    "writes": "",
    "refuses": LATE + "{{ raise_exception('No.') }}{% endif %}",
    "omits": LATE + "{% continue %}{% endif %}",
}
CONVERSATION = [("system", "A"), ("user", "B"), ("system", "C"), ("assistant", "D"), ("user", "E"), ("system", "F")]


@pytest.fixture(scope="module", params=TEMPLATES)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, RunningServer]]:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    template = CHAT_TEMPLATE.replace("messages %}", "messages %}" + TEMPLATES[request.param])
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with shared_server(folder) as server:
        yield request.param, server


def test_system_messages_of_a_conversation(model: tuple[str, RunningServer]) -> None:
    kind, server = model
    messages = [{"role": role, "content": content} for role, content in CONVERSATION]
    PARAM.validate_python(messages[2])
    merged = [("user", "B\nC"), ("assistant", "D"), ("user", "E\nF")]
    for system, first in ((..., "A"), ("S", "S\nA")):
        turns = [("system", first), *(CONVERSATION[1:] if kind == "writes" else merged)]
        ask_json(server.url, messages=messages, system=system)
        assert server.engine.submits[-1].prompt_token_ids == chatml(*turns)
        counted = ask(server.url, COUNT, messages=messages, system=system, max_tokens=...)
        assert counted.json() == {"input_tokens": len(chatml(*turns))}


def test_a_system_message_that_is_over(tiny: RunningServer) -> None:
    for clear_at, is_shown in (("next_user_message", False), ("never", True), (None, True)):
        over = {"role": "system", "content": "B", "clear_at": clear_at}
        last = {"role": "system", "content": "D", "clear_at": clear_at}
        messages = [{"role": "user", "content": "A"}, over, {"role": "user", "content": "C"}, last]
        ask_json(tiny.url, messages=messages)
        turns = [("user", "A"), ("system", "B"), ("user", "C")] if is_shown else [("user", "A\nC")]
        assert tiny.engine.submits[-1].prompt_token_ids == chatml(*turns, ("system", "D"))


@pytest.mark.parametrize("role", ["ctx", "msg"])
def test_other_names_of_the_user(tiny: RunningServer, role: str) -> None:
    ask_json(tiny.url, messages=[{"role": role, "content": "A"}, {"role": "user", "content": "B"}])
    assert tiny.engine.submits[-1].prompt_token_ids == chatml(("user", "A\nB"))


# Hints, and fields without effect.


@pytest.mark.parametrize("effort", ["low", "medium", "high", "xhigh", "max"])
def test_effort_without_a_template_that_reads_it(tiny: RunningServer, effort: str) -> None:
    for path, max_tokens in ((ANTHROPIC, 5), (COUNT, ...)):
        response = ask(tiny.url, path, output_config={"effort": effort}, max_tokens=max_tokens)
        assert response.status_code == 200, response.text
        assert "x-lightwell-warnings" not in response.headers
    assert tiny.engine.submits[-1].prompt_token_ids == chatml(("user", "Hi"))


def test_effort_with_one_that_does(reasoning_server: RunningServer) -> None:
    ask_json(reasoning_server.url, output_config={"effort": "low"})
    tokenizer = reasoning_server.model.tokenizer
    prompt = tokenizer.decode(reasoning_server.engine.submits[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("<think>\n")


@pytest.mark.parametrize("kind", ["auto", "none"])
def test_a_choice_without_tools(tiny: RunningServer, kind: str) -> None:
    choices: list[Any] = [..., [], None]
    for tools in choices:
        ask_json(tiny.url, tools=tools, tool_choice={"type": kind, "disable_parallel_tool_use": True})


def test_many_stop_sequences(tiny: RunningServer) -> None:
    stops = [f"z{number}" for number in range(MAX_STOPS - 1)]
    answer = ask_json(tiny.url, stop_sequences=[*stops, "wor"])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "wor")
    _, message = error_of(ask(tiny.url, stop_sequences=[*stops, "a", "b"]), 400)
    assert message.startswith("Invalid 'stop_sequences': array too long. Expected an array with maximum length 64")


# Tools and blocks of Anthropic's.

SEARCH: Fields = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
COMPUTER: Fields = {"type": "computer_20250124", "name": "computer", "display_width_px": 1, "display_height_px": 1}


def test_tools_of_the_server_are_ignored_and_named(reasoning_server: RunningServer, start_server: StartServer) -> None:
    ask_json(reasoning_server.url, tools=TOOLS)
    expected = reasoning_server.engine.submits[-1].prompt_token_ids
    for tools in ([SEARCH, COMPUTER, *TOOLS], [*TOOLS, SEARCH, COMPUTER]):
        TypeAdapter(list[ToolUnionParam | BetaToolComputerUse20250124Param]).validate_python(tools)
        answer = ask(reasoning_server.url, tools=tools, mcp_servers=[{"type": "url", "url": "http://x", "name": "x"}])
        names = [f"tools[{tools.index(tool)}].{tool['type']}" for tool in (SEARCH, COMPUTER)]
        assert answer.headers["x-lightwell-warnings"] == f"ignored parameters: mcp_servers, {', '.join(names)}"
        assert reasoning_server.engine.submits[-1].prompt_token_ids == expected
    wrong = TOOLS[0] | {"input_schema": {"type": "array"}}
    _, message = error_of(ask(reasoning_server.url, tools=[SEARCH, *TOOLS, COMPUTER, wrong]), 400)
    assert message.startswith("Invalid 'tools[3].input_schema'")
    for choice in ({"type": "any"}, {"type": "tool", "name": "web_search"}):
        answer = ask(reasoning_server.url, tools=[SEARCH], tool_choice=choice)
        assert answer.status_code == 200
        assert answer.headers["x-lightwell-warnings"].endswith(f", tool_choice.{choice.get('name', 'any')}")
    error_of(ask(reasoning_server.url, tools=[SEARCH], tool_choice={"type": "tool", "name": "other"}), 400)
    _, message = error_of(ask(start_server(strict=True).url, tools=[SEARCH]), 400)
    assert message.endswith("tools[0].web_search_20250305")


CLIENT_NAMES = {"bash": "bash", "text": "str_replace_based_edit_tool", "memory": "memory"}


@pytest.mark.parametrize("kind", CLIENT_TOOLS)
def test_tools_of_the_client_get_their_schema(reasoning_server: RunningServer, kind: str) -> None:
    assert kind in types_of(BetaToolUnionParam)
    tool = {"type": kind, "name": CLIENT_NAMES[kind.split("_", maxsplit=1)[0]], "cache_control": {"type": "ephemeral"}}
    answer = ask(reasoning_server.url, tools=[tool], tool_choice={"type": "tool", "name": tool["name"]})
    assert (answer.status_code, "x-lightwell-warnings" in answer.headers) == (200, False), answer.text
    submit = reasoning_server.engine.submits[-1]
    prompt = reasoning_server.model.tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False)
    description, schema = CLIENT_TOOLS[kind]
    Draft202012Validator.check_schema(schema)
    assert f'{{"name": "{tool["name"]}", "description": "{description}"' in prompt
    for name in schema["properties"]:
        assert f'"{name}": {{"type"' in prompt
        assert name in str(submit.params.grammar)


READ_BLOCKS = {"text", "document", "search_result", "compaction", "tool_use", "tool_result", "thinking"}
READ_BLOCKS |= {"redacted_thinking"}  # which is left out without a warning: it is unreadable for anyone
REFUSED_BLOCKS = {"image"}  # the model would be asked about what it cannot see
ALL_BLOCKS = types_of(ContentBlockParam) | types_of(BetaContentBlockParam) | types_of(tool_result_block_param.Content)


@pytest.mark.parametrize("kind", sorted(ALL_BLOCKS - READ_BLOCKS - REFUSED_BLOCKS))
def test_blocks_of_other_services_are_ignored_and_named(tiny: RunningServer, kind: str) -> None:
    block = {"type": kind, "id": "x", "content": [], "cache_control": {"type": "ephemeral"}}
    said = [{"type": "compaction", "content": "A"}, block, {"type": "text", "text": "B"}]
    result = {"type": "tool_result", "tool_use_id": "1", "content": [block], "is_error": True}
    found = {"type": "search_result", "title": "T", "source": "S", "content": [{"type": "text", "text": "C"}]}
    turns = [MESSAGES[0], {"role": "assistant", "content": said}, {"role": "user", "content": [block, result, found]}]
    answer = ask(tiny.url, messages=turns)
    names = f"messages[].content[].{kind}, messages[].content[].content[].{kind}"
    assert answer.headers["x-lightwell-warnings"] == f"ignored parameters: {names}"
    expected = chatml(("user", "Hi"), ("assistant", "A\nB"), ("tool", "Error: "), ("user", "Search result: T\nS\nC"))
    assert tiny.engine.submits[-1].prompt_token_ids == expected


# Length.


def test_a_context_that_is_too_long(tiny: RunningServer) -> None:
    num_prompt_tokens = len(chatml(("user", "x" * 2040)))
    for num_chars, message in (
        (3000, f"prompt is too long: {num_prompt_tokens + 960} tokens > 2048 maximum"),
        (2048 * 256, "prompt is too long: at least 2049 tokens > 2048 maximum"),
    ):
        for stream in (False, True):
            messages = [{"role": "user", "content": "x" * num_chars}]
            assert error_of(ask(tiny.url, messages=messages, stream=stream), 400) == ("invalid_request_error", message)


def test_more_tokens_than_fit(tiny: RunningServer, start_server: StartServer) -> None:
    num_prompt_tokens = len(chatml(("user", "Hi")))
    over = ask(tiny.url, max_tokens=64_000)
    rest = 2048 - num_prompt_tokens
    assert over.headers["x-lightwell-warnings"] == f"max_tokens capped at {rest}, the rest of the context"
    strict = start_server(strict=True)
    for server in (tiny, strict):
        unlimited = ask(server.url, max_tokens=-1)
        assert server.engine.submits[-1].params.max_tokens == rest
        assert "x-lightwell-warnings" not in unlimited.headers
    assert error_of(ask(strict.url, max_tokens=64_000), 400)[1] == (
        f"input length and `max_tokens` exceed context limit: {num_prompt_tokens} + 64000 > 2048, decrease input "
        "length or `max_tokens` and try again"
    )


# Stop reasons.


@pytest.mark.parametrize("reason", FinishReason)
def test_every_end_has_a_reason(server: RunningServer, fake_engine: FakeEngine, reason: FinishReason) -> None:
    fake_engine.config.last_reason = reason
    if reason in (FinishReason.ERROR, FinishReason.ABORT):  # here these mean that the engine failed
        assert error_of(ask(server.url), 500)[0] == "api_error"
        assert ask_events(server.url)[-1]["error"]["type"] == "api_error"
    else:
        assert ask_json(server.url)["stop_reason"] == STOP_REASONS[reason]
        assert ask_events(server.url)[-2]["delta"]["stop_reason"] == STOP_REASONS[reason]


# Extensions.

ACTING: Fields = {name: value for name, value in SAMPLING.items() if name in EXTENSIONS} | {
    "include_stop_str_in_output": ({"stop_sequences": ["wor"]}, True),
    "thinking_token_budget": 5,
    "chat_template_kwargs": {"enable_thinking": True},
}
# Effect not visible here: answers have no log probabilities, ids are for other requests, and nothing has to wait.
IDLE: dict[str, Any] = {"return_tokens_as_token_ids": True, "request_id": "mine", "queue_timeout": 30}
NAMES = sorted(EXTENSIONS - MessagesRequest.model_fields.keys())


@pytest.mark.parametrize("name", NAMES)
def test_every_extension_acts(reasoning_server: RunningServer, name: str) -> None:
    assert (name in ACTING) != (name in IDLE), "say how it acts, or that it cannot"
    others, value = given if isinstance(given := (ACTING | IDLE)[name], tuple) else ({}, given)
    without = {"model": "tiny", "max_tokens": 60, "messages": MESSAGES} | others
    # Without a pause several steps may arrive as one event.
    reasoning_server.engine.config.step_seconds = 0.005 if name == "stream_interval" else 0.0
    is_same = seen(reasoning_server, ANTHROPIC, without | {name: value}) == seen(reasoning_server, ANTHROPIC, without)
    assert is_same == (name in IDLE)


@pytest.mark.parametrize("name", NAMES)
def test_every_extension_refuses_what_is_wrong(reasoning_server: RunningServer, name: str) -> None:
    others = given[0] if isinstance(given := ACTING.get(name), tuple) else {}
    num_refused = 0
    for value in WRONG:
        body = {"model": "tiny", "max_tokens": 60, "messages": MESSAGES} | others | {name: value}
        answer = post(reasoning_server, ANTHROPIC, body)
        if answer.status_code != 200:
            assert name in error_of(answer, 400)[1]
            num_refused += 1
    assert num_refused >= 3


def test_options_of_the_template_are_counted(reasoning_server: RunningServer) -> None:
    fields: Fields = {"messages": MESSAGES, "max_tokens": ...}
    with_reasoning = ask(reasoning_server.url, COUNT, **fields, chat_template_kwargs={"enable_thinking": True}).json()
    assert with_reasoning["input_tokens"] == ask(reasoning_server.url, COUNT, **fields).json()["input_tokens"] + 2
    unread = ask(reasoning_server.url, COUNT, **fields, chat_template_kwargs={"wish": True})
    assert unread.headers["x-lightwell-warnings"] == "ignored parameters: chat_template_kwargs.wish"


# Nested values.

DOCUMENT: Fields = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "A"}}
PDF: Fields = {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}


def asking(block: Fields) -> Fields:
    return {"messages": [{"role": "user", "content": [block]}]}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("output_config.effort", {"output_config": {"effort": "much"}}),
        ("output_config.effort", {"output_config": {"effort": 5}}),
        ("output_config.effort", {"output_config": {"effort": "none"}}),
        ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 0}}),
        ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 1.5}}),
        ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": "5"}}),
        ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": True}}),
        ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": None}}),
        ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 101}}),
        ("thinking.display", {"thinking": {"type": "adaptive", "display": "full"}}),
        ("thinking.display", {"thinking": {"type": "adaptive", "display": True}}),
        ("tool_choice.disable_parallel_tool_use", {"tool_choice": {"type": "auto", "disable_parallel_tool_use": "no"}}),
        ("tool_choice.disable_parallel_tool_use", {"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}),
        ("tools[0].strict", {"tools": [TOOLS[0] | {"strict": "yes"}]}),
        ("tools[0].strict", {"tools": [TOOLS[0] | {"strict": 1}]}),
        ("messages[0].clear_at", {"messages": [{"role": "system", "content": "A", "clear_at": "soon"}]}),
        ("messages[0].content[0].source.type", asking(DOCUMENT | {"source": PDF})),
        ("messages[0].content[0].source.type", asking(DOCUMENT | {"source": {"type": "url", "url": "http://x"}})),
        ("messages[0].content[0].source.media_type", asking(DOCUMENT | {"source": PDF | {"type": "text"}})),
        ("messages[0].content[0].source", asking({"type": "document"})),
        ("messages[0].content[0].title", asking(DOCUMENT | {"title": 5})),
        ("messages[0].content[0].context", asking(DOCUMENT | {"context": ["A"]})),
    ],
)
def test_wrong_values_within_objects(tiny: RunningServer, path: str, fields: Fields) -> None:
    for stream in (False, True):
        kind, message = error_of(ask(tiny.url, **fields, stream=stream), 400)
        assert (kind, path in message) == ("invalid_request_error", True), message


# The official client.


def test_the_official_client(tiny: RunningServer) -> None:
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [DOCUMENT | {"title": "T"}]},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such city", "is_error": True},
    ]
    calls: list[Any] = [
        {"type": "tool_use", "id": f"toolu_{number}", "name": "weather", "input": {"city": "Paris"}}
        for number in (1, 2)
    ]
    fields: Fields = {
        "model": "tiny",
        "max_tokens": 50,
        "messages": [
            {"role": "user", "content": [DOCUMENT, {"type": "text", "text": "So?"}]},
            {"role": "assistant", "content": calls},
            {"role": "user", "content": results},
            {"role": "system", "content": "Be brief."},
        ],
        "stop_sequences": ["1", "2", "3", "4", "wor"],
        "thinking": {"type": "enabled", "budget_tokens": 49},
        "output_config": {"effort": "max"},
        "tools": TOOLS,
        "tool_choice": {"type": "auto"},
    }
    options: Fields = {"api_key": "none", "max_retries": 0, "_strict_response_validation": True}
    with Anthropic(base_url=tiny.url, **options) as client:
        message = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            streamed = stream.get_final_message()
        assert message.content[0].text == streamed.content[0].text == "Hello, "  # type: ignore[union-attr]
        assert message.stop_sequence == streamed.stop_sequence == "wor"
        prompt = tiny.model.tokenizer.decode(tiny.engine.submits[-1].prompt_token_ids, skip_special_tokens=False)
        shown = ("user\nA\nSo?", "tool\nDocument: T\nA", "tool\nError: no such city", "system\nBe brief.")
        places = [prompt.find(f"<|im_start|>{turn}<|im_end|>") for turn in shown]
        assert -1 not in places
        assert places == sorted(places)
        with pytest.raises(anthropic.BadRequestError, match=r"`max_tokens` must be greater than") as refused:
            client.messages.create(**(fields | {"max_tokens": 49}))
        assert client.messages.create(**(fields | {"max_tokens": -1})).stop_sequence == "wor"
        assert (refused.value.type, refused.value.request_id is not None) == ("invalid_request_error", True)
