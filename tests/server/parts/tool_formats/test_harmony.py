"""Answers and prompts in the harmony format, compared with OpenAI's parser and renderer."""

import codecs
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import openai_harmony as oh
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_harmony import Role, StreamableParser, StreamState, TextContent

from engine.grammar.compiler import GrammarCompiler
from server import part_table
from server.parts.tool_formats.harmony import (
    HARMONY_FORMAT,
    MARKERS,
    MAX_HEADER_CHARS,
    HarmonyFormat,
    HarmonyParser,
    convert,
)
from server.text.templates.chat_template import ChatTemplate
from server.text.templates.sandbox import SandboxedTemplate
from server.text.templates.syntaxes import answer_syntax
from server.text.tokenizer import Tokenizer
from tests.server.constrained.test_tool_grammar import calling, grammar_of
from tests.support.clients import CHAT, ask, shared_server
from tests.support.grammars import allows
from tests.support.harmony import TEMPLATE, harmony_encoding, write_harmony_model
from tests.support.parsing import cut, joined_parts
from tests.support.serving import check_error
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID, write_tiny_model

TOOLS: dict[str, dict[str, Any]] = {"weather": {}, "time-2": {}}
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Bern"}<|call|>'
NEXT = "<|start|>assistant"

Parts = list[tuple[str, str]]


def parse(pieces: list[str], *, hidden: tuple[str, ...] = MARKERS, **fields: Any) -> Parts:
    return joined_parts(HarmonyParser(HarmonyFormat(tools=TOOLS, **fields), hidden=hidden), pieces)


def reference(token_ids: list[int]) -> Parts:
    """Return the parts of an answer as OpenAI's parser reads it."""
    found: Parts = []
    for message in harmony_encoding().parse_messages_from_completion_tokens(token_ids, Role.ASSISTANT):
        text = "".join(content.text for content in message.content if isinstance(content, TextContent))
        recipient = message.recipient or ""
        if recipient.startswith("functions."):
            found += [("call", recipient.removeprefix("functions.")), ("arguments", text.strip())]
        elif text:
            kind = "reasoning" if message.channel == "analysis" or recipient else "content"
            text = "\n\n" + text if kind in [earlier for earlier, _ in found] else text
            before = found.pop()[1] if found and found[-1][0] == kind else ""
            found.append((kind, before + text))
    return found


words = st.text(st.sampled_from('ab c\n{}<|"\\é東🙂'), max_size=12)
BUILTIN = [f"{c} to={t} code" for c in ("analysis", "commentary") for t in ("python", "browser.search", "container.x")]
plain = st.builds(
    lambda channel, text: (f"<|channel|>{channel}<|message|>", text),
    st.sampled_from(["analysis", "commentary", "final"]) | st.sampled_from(BUILTIN),
    words,
)
CHANNELS = ("<|channel|>commentary to=functions.{}", "<|channel|>analysis to=functions.{}")
HEADERS = (
    *(CHANNELS[0] + after + "<|message|>" for after in (" <|constrain|>json", "<|constrain|>json", " json", "")),
    CHANNELS[1] + " <|constrain|>json<|message|>",
    " to=functions.{}<|channel|>commentary json<|message|>",
    " to=functions.{}<|channel|>commentary <|constrain|>json<|message|>",
    " to=functions.{}<|message|>",
)
calls = st.builds(
    lambda header, name, arguments, space: (header.format(name), space + json.dumps(arguments) + space),
    st.sampled_from(HEADERS),
    st.sampled_from(sorted(TOOLS)),
    st.dictionaries(words, words | st.lists(words, max_size=2) | st.integers(), max_size=2),
    st.sampled_from(["", "\n", " "]),
)
answers = st.lists(plain | calls, min_size=1, max_size=6)


def write(messages: list[tuple[str, str]]) -> str:
    """Return the messages as the model writes them, without the token that ends the answer."""
    ends = ["<|call|>" if " to=" in header else "<|end|>" for header, _ in messages]
    return NEXT.join(header + body + end for (header, body), end in zip(messages, ends, strict=True))


@given(answers, st.lists(st.integers(0, 400), max_size=12), st.booleans())
def test_parts_are_those_of_the_reference(messages: list[tuple[str, str]], cuts: list[int], has_end: bool) -> None:
    text = write(messages)
    text = text if has_end else text.rpartition("<|")[0]  # the engine does not return the token that ends the answer
    expected = reference(harmony_encoding().encode(text, allowed_special="all"))
    assert parse([text]) == parse(cut(text, cuts)) == parse([*text]) == expected


@given(answers)
def test_reasoning_begins_and_ends_with_the_token_of_the_reference(messages: list[tuple[str, str]]) -> None:
    token_ids = harmony_encoding().encode(write(messages), allowed_special="all")
    oracle = StreamableParser(harmony_encoding(), Role.ASSISTANT)
    parser = HarmonyParser(HarmonyFormat(tools=TOOLS))
    decoder = codecs.getincrementaldecoder("utf-8")()  # holds incomplete characters back for a later token
    for token_id in token_ids:
        oracle.process(token_id)
        parser.push(decoder.decode(bytes(harmony_encoding()._inner.decode_bytes([token_id]))))
        recipient = oracle.current_recipient or ""
        is_reasoning = oracle.current_channel == "analysis" or recipient != ""
        assert parser.is_reasoning == (
            oracle.state is StreamState.CONTENT and is_reasoning and not recipient.startswith("functions.")
        )


def test_settings_of_the_request() -> None:
    call = [("call", "weather"), ("arguments", '{"city": "Bern"}')]
    assert parse([CALL + NEXT + CALL], parallel_calls=False) == [*call, ("content", '{"city": "Bern"}')]
    assert parse(["lo<|return|>"], is_final=True) == [("content", "lo")]
    assert answer_syntax("<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>")
    assert not answer_syntax("<|im_start|>assistant\nThe <|channel|> of <|message|>")


SPACED = "<|channel|> analysis<|message|> Hm<|end|><|start|> assistant<|channel|> final<|message|>  a"


MALFORMED = [
    ("  to be", [("content", "  to be")]),
    ("t", [("content", "t")]),
    (f"{FINAL}a<|end|>b", [("content", "a\n\nb")]),
    (f"{FINAL}a<|end|>\n{NEXT}{FINAL}b", [("content", "a\n\nb")]),
    (f"{FINAL}a<|message|>b<|channel|>c", [("content", "abc")]),
    ("<|message|>a", [("content", "a")]),
    (NEXT + " Hello<|end|>", [("content", "Hello")]),
    ("<|channel|>commentary to=functions.weather <|constrain|>js", []),
    ("<|channel|>analysis<|mess", []),
    ("<|", [("content", "<|")]),
    ("<|channel|>commentary to=functions.weather json<|end|>", []),
    # What gpt-oss writes now and then.
    (f"<|channel|>commentary{ANALYSIS}Hm", [("reasoning", "Hm")]),
    (f"<|channel|>commentary to=assistant{ANALYSIS}Hm", [("reasoning", "Hm")]),
    ("<|channel|>final <|constrain|>json<|message|>{}", [("content", "{}")]),
    ("<|channel|>commentary to=weather<|message|>{}", [("call", "weather"), ("arguments", "{}")]),
    # With a space after each marker.
    (SPACED, [("reasoning", "Hm"), ("content", " a")]),
    ("<|start|> assistant<|channel|> final<|constrain|> json", []),
    # No calls of the request's tools.
    ("<|channel|>commentary to=functions.rain<|message|>{}", [("content", "{}")]),
    ("<|channel|>commentary to=functions.weather<|message|>Bern", [("content", "Bern")]),
    ("<|channel|>commentary to=functions.weather<|message|><|call|>", []),
    ("<|channel|>commentary to=python<|message|>1 + 1", [("reasoning", "1 + 1")]),
]


@pytest.mark.parametrize(("text", "parts"), MALFORMED)
def test_malformed_answers(text: str, parts: Parts) -> None:
    for pieces in ([text], [*text]):
        assert parse(pieces) == parts


SOUP = [*MARKERS, "a", " ", "{", "}", '"', "to=", "functions.weather", "assistant", "analysis", "final", "json", "<|"]


@given(
    st.lists(st.sampled_from([*SOUP, "x" * 500]), max_size=15),
    st.lists(st.integers(0, 200), max_size=12),
    st.sampled_from([(), MARKERS]),
)
def test_every_split_gives_the_same(pieces: list[str], cuts: list[int], hidden: tuple[str, ...]) -> None:
    text = "".join(pieces)
    whole = parse([text], hidden=hidden)
    assert all(parse(each, hidden=hidden) == whole for each in (pieces, cut(text, cuts), [*text]))


def test_a_header_has_a_limit() -> None:
    for excess in (-1, 0, 1):
        text = "<|channel|>" + "x" * (MAX_HEADER_CHARS - 11 + excess) + "<|message|>abc"
        whole = parse([text], hidden=())
        assert whole == [("content", "abc" if excess <= 0 else text)]
        for position in range(MAX_HEADER_CHARS - 5, len(text)):
            assert parse([text[:position], text[position:]], hidden=()) == whole
    parser = HarmonyParser(HarmonyFormat())
    assert parser.push(text[:500]) == []
    assert parser.num_held == 500
    assert "".join(part.text for part in parser.push(text[500:])) == text
    assert parser.num_held == 0


def test_whether_an_answer_ends_with_calls() -> None:
    for text, ends in ((CALL, 1), (CALL[:-10], 0), (CALL[:-8], 1), (f"{FINAL}a", 0), (f"{CALL}{NEXT}{FINAL}a", 1)):
        parser = HarmonyParser(HarmonyFormat(tools=TOOLS))
        joined_parts(parser, [text])
        assert parser.ends_with_calls == bool(ends), text


# Grammars.


@pytest.fixture(scope="module", params=[(), MARKERS], ids=["plain", "special"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_model(write_tiny_model(tmp_path_factory.mktemp("grammar"), *request.param))


def test_headers_of_calls(model: Tokenizer) -> None:
    grammar = grammar_of(model, HARMONY_FORMAT, "required")
    for content_type in (" <|constrain|>json", "<|constrain|>json", " json", ""):
        for is_role_first in (False, True):
            text = calling("time", "{}", content_type, is_role_first)
            assert allows(model, grammar, text), text
            spaced = re.sub(r"(<\|(start|channel|message|constrain)\|>)", r"\1 ", f"{ANALYSIS}Hm.<|end|>{NEXT}{text}")
            assert allows(model, grammar, spaced), spaced


def test_answers_that_the_prompt_begins(model: Tokenizer) -> None:
    forced = grammar_of(model, HARMONY_FORMAT, "required", is_final=True)
    strict = grammar_of(model, HARMONY_FORMAT, strict=True, is_final=True)
    text = f"lo.<|end|>{NEXT}" + calling("time", "{}")
    assert allows(model, forced, text)
    assert not allows(model, forced, "lo.")
    assert all(allows(model, strict, each) for each in (text, "lo."))


def test_a_call_ends_with_a_token_that_ends_the_answer(model: Tokenizer) -> None:
    ends = sorted(model.special_ids_in(["<|call|>", "<|return|>"]).values()) or [END_OF_TEXT_ID]
    matcher = GrammarCompiler(model.to_json(), ends).compile(grammar_of(model, HARMONY_FORMAT, "required"))
    matcher.consume_tokens(model.encode(calling("time", "{}"), add_special_tokens=False))
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    assert [token_id for token_id in range(model.vocab_size) if mask >> token_id & 1] == ends


# Prompts of gpt-oss, compared with those that OpenAI's library renders.

PROPERTIES = {"city": {"type": "string", "description": "Where"}, "unit": {"type": "string", "enum": ["C", "F"]}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["city"]}
DESCRIBED: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "How it is", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "time", "description": "Now", "parameters": None}},
]


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(SandboxedTemplate(TEMPLATE.read_text()), bos_token=None, eos_token="<|return|>")


def render(template: ChatTemplate, messages: list[dict[str, Any]], *, with_tools: bool, effort: str = "medium") -> str:
    converted, options = convert(messages, {"reasoning_effort": effort})
    return template.render(converted, tools=DESCRIBED if with_tools else None, template_kwargs=options)


def assistant_message(text: str, channel: str) -> oh.Message:
    return oh.Message.from_role_and_content(oh.Role.ASSISTANT, text).with_channel(channel)


def prompt_of(messages: Any, *, with_tools: bool, effort: str = "medium", drops_analysis: bool = False) -> str:
    """Return the prompt that OpenAI's library renders. Reasoning before the last answer is dropped here.

    With `drops_analysis` the library drops it, which it does only if no call follows the answer.
    """
    today = datetime.now().strftime("%Y-%m-%d")
    system = oh.SystemContent.new().with_reasoning_effort(oh.ReasoningEffort[effort.upper()])
    written = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system.with_conversation_start_date(today))]
    developer = oh.DeveloperContent.new()
    if messages[0]["role"] == "system":
        # The template ends the instructions with an empty line even if nothing follows.
        developer = developer.with_instructions(messages[0]["content"] + ("" if with_tools else "\n\n"))
    if with_tools:
        functions = [each["function"] for each in DESCRIBED]
        developer = developer.with_function_tools([oh.ToolDescription.new(**function) for function in functions])
    if developer.instructions or developer.tools:
        written.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer))
    finals = [i for i, each in enumerate(messages) if each["role"] == "assistant" and "tool_calls" not in each]
    last_final = max(finals, default=-1)
    for index, message in enumerate(messages):
        role, calls, reasoning = message["role"], message.get("tool_calls", []), message.get("reasoning_content")
        if role == "user":
            written.append(oh.Message.from_role_and_content(oh.Role.USER, message["content"]))
        if role == "assistant" and reasoning and (drops_analysis or index > last_final):
            written.append(assistant_message(reasoning, "analysis"))
        if role == "assistant" and not calls:
            written.append(assistant_message(message["content"], "final"))
        for call in calls:
            name = f"functions.{call['function']['name']}"
            text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            made = assistant_message(text, "commentary").with_recipient(name).with_content_type("json")
            results = [each for each in messages if each.get("tool_call_id") == call["id"]]
            written += [made, *(result_message(each, name) for each in results)]
    config = oh.RenderConversationConfig(auto_drop_analysis=drops_analysis)
    conversation = oh.Conversation.from_messages(written)
    token_ids = harmony_encoding().render_conversation_for_completion(conversation, oh.Role.ASSISTANT, config)
    return harmony_encoding().decode(token_ids)


def result_message(message: dict[str, Any], name: str) -> oh.Message:
    text = json.dumps(message["content"], ensure_ascii=False)  # as the template writes it
    result = oh.Message.from_author_and_content(oh.Author.new(oh.Role.TOOL, name), text)
    return result.with_channel("commentary").with_recipient("assistant")


some_words = st.text(st.sampled_from('ab {\n"<é東'), min_size=1, max_size=12)
reasonings = st.fixed_dictionaries({}, optional={"reasoning_content": some_words})
users = st.builds(lambda text: [{"role": "user", "content": text}], some_words)
finals = st.builds(lambda text, more: [{"role": "assistant", "content": text, **more}], some_words, reasonings)


def call_of(id: str, name: str, city: str = "Bern") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": {"city": city}}}


def result_of(id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": text}


@st.composite
def call_turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Return a message with calls, and their results in any order."""
    ids = [draw(st.uuids()).hex for _ in range(draw(st.integers(1, 3)))]
    calls = [call_of(id, draw(st.sampled_from(["weather", "time"])), draw(some_words)) for id in ids]
    turn = {"role": "assistant", "content": None, "tool_calls": calls, **draw(reasonings)}
    return [turn, *draw(st.permutations([result_of(id, draw(some_words)) for id in ids]))]


systems = st.lists(st.builds(lambda text: [{"role": "system", "content": text}], some_words), max_size=1)
conversations = st.builds(
    lambda system, first, turns: [message for part in [*system, first, *turns] for message in part],
    systems,
    users,
    st.lists(users | finals | call_turns(), max_size=6),
)


@given(conversations, st.booleans(), st.sampled_from(["low", "medium", "high"]))
def test_prompts_are_those_of_the_reference(
    template: ChatTemplate, messages: Any, with_tools: bool, effort: str
) -> None:
    expected = prompt_of(messages, with_tools=with_tools, effort=effort)
    assert render(template, messages, with_tools=with_tools, effort=effort) == expected


TURN: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call_of("a", "weather")]},
    result_of("a", "sunny"),
]


def test_reasoning_is_kept_between_calls_and_dropped_after_the_answer(template: ChatTemplate) -> None:
    answered = [*TURN, {"role": "assistant", "content": "Sunny.", "reasoning_content": "So."}, TURN[0]]
    for messages, is_kept in ((TURN, True), (answered, False)):
        prompt = render(template, messages, with_tools=True)
        assert prompt == prompt_of(messages, with_tools=True, drops_analysis=True)
        assert ("Hm." in prompt) == is_kept
        assert "So." not in prompt


def test_content_before_a_call_becomes_reasoning(template: ChatTemplate) -> None:
    for content in ("Let me see.", [{"type": "text", "text": "Let me"}, {"type": "text", "text": "see."}]):
        turn = [TURN[0], {**TURN[1], "content": content}, TURN[2]]
        text = "Let me see." if isinstance(content, str) else "Let me\nsee."
        same = [TURN[0], {**TURN[1], "reasoning_content": f"Hm.\n\n{text}"}, TURN[2]]
        assert render(template, turn, with_tools=True) == prompt_of(same, with_tools=True)
        assert turn[1]["reasoning_content"] == "Hm."  # the request is not changed


def test_system_messages_are_joined(template: ChatTemplate) -> None:
    texts: list[Any] = ["Be brief.", [{"type": "text", "text": "Be kind."}], "Be exact."]
    first, second, third = ({"role": "system", "content": text} for text in texts)
    expected = prompt_of([{"role": "system", "content": "Be brief.\n\nBe kind.\n\nBe exact."}, *TURN], with_tools=True)
    assert render(template, [first, second, *TURN, third], with_tools=True) == expected


def test_results_without_ids_are_in_the_order_of_the_calls(template: ChatTemplate) -> None:
    calls, results = [call_of("a", "weather"), call_of("b", "time")], [result_of("a", "1"), result_of("b", "2")]
    turn = [TURN[0], {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    expected = prompt_of(turn, with_tools=False)
    for names in (("id",), ("tool_call_id",), ("id", "tool_call_id")):
        bare = [{key: value for key, value in each.items() if key not in names} for each in turn]
        if "id" in names:
            bare[1]["tool_calls"] = [{key: call[key] for key in ("type", "function")} for call in calls]
        assert render(template, bare, with_tools=False) == expected
    assert convert(results, {}) == (results, {})


def test_efforts(template: ChatTemplate) -> None:
    for effort, expected in (("none", "low"), ("minimal", "low"), ("high", "high"), ("max", "high")):
        assert f"\nReasoning: {expected}\n" in render(template, TURN, with_tools=False, effort=effort)


def test_a_server_without_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools are refused; without them, all of an answer is content."""
    monkeypatch.setattr(part_table, "has_part", lambda folder, name: False)
    part_table.why_missing.cache_clear()
    try:
        with shared_server(write_harmony_model(tmp_path), vocab_size=266) as server:
            for part, param, fields in (
                ("tool_formats", "tools", {"tools": DESCRIBED[:1]}),
                ("structural_tags", "response_format", {"response_format": {"type": "structural_tag"}}),
            ):
                error = check_error(ask(server.url, CHAT, **fields), 400)
                assert error["message"].startswith(f"This needs the part '{part}' (")
                assert (error["param"], error["code"]) == (param, "part_not_installed")
            assert ask(server.url, CHAT, tools=DESCRIBED[:1], tool_choice="none").status_code == 200
    finally:
        part_table.why_missing.cache_clear()
