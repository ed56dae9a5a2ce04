"""Prompts of gpt-oss, compared with those that OpenAI's library renders."""

import json
from datetime import datetime
from typing import Any

import openai_harmony as oh
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.templates.chat_template import ChatTemplate
from server.text.templates.harmony_prompt import harmony_messages, harmony_options
from server.text.templates.sandbox import SandboxedTemplate
from tests.support.harmony import TEMPLATE, harmony_encoding

PROPERTIES = {"city": {"type": "string", "description": "Where"}, "unit": {"type": "string", "enum": ["C", "F"]}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "How it is", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "time", "description": "Now", "parameters": None}},
]


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(SandboxedTemplate(TEMPLATE.read_text()), bos_token=None, eos_token="<|return|>")


def render(template: ChatTemplate, messages: list[dict[str, Any]], *, with_tools: bool, effort: str = "medium") -> str:
    return template.render(
        harmony_messages(messages),
        tools=TOOLS if with_tools else None,
        template_kwargs=harmony_options({"reasoning_effort": effort}),
    )


def assistant_message(text: str, channel: str) -> oh.Message:
    return oh.Message.from_role_and_content(oh.Role.ASSISTANT, text).with_channel(channel)


def reference(messages: Any, *, with_tools: bool, effort: str = "medium", drops_analysis: bool = False) -> str:
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
        functions = [each["function"] for each in TOOLS]
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


words = st.text(st.sampled_from('ab {\n"<é東'), min_size=1, max_size=12)
reasonings = st.fixed_dictionaries({}, optional={"reasoning_content": words})
users = st.builds(lambda text: [{"role": "user", "content": text}], words)
finals = st.builds(lambda text, more: [{"role": "assistant", "content": text, **more}], words, reasonings)


def call_of(id: str, name: str, city: str = "Bern") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": {"city": city}}}


def result_of(id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": text}


@st.composite
def call_turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Return a message with calls, and their results in any order."""
    ids = [draw(st.uuids()).hex for _ in range(draw(st.integers(1, 3)))]
    calls = [call_of(id, draw(st.sampled_from(["weather", "time"])), draw(words)) for id in ids]
    turn = {"role": "assistant", "content": None, "tool_calls": calls, **draw(reasonings)}
    return [turn, *draw(st.permutations([result_of(id, draw(words)) for id in ids]))]


systems = st.lists(st.builds(lambda text: [{"role": "system", "content": text}], words), max_size=1)
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
    expected = reference(messages, with_tools=with_tools, effort=effort)
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
        assert prompt == reference(messages, with_tools=True, drops_analysis=True)
        assert ("Hm." in prompt) == is_kept
        assert "So." not in prompt


def test_content_before_a_call_becomes_reasoning(template: ChatTemplate) -> None:
    for content in ("Let me see.", [{"type": "text", "text": "Let me"}, {"type": "text", "text": "see."}]):
        turn = [TURN[0], {**TURN[1], "content": content}, TURN[2]]
        text = "Let me see." if isinstance(content, str) else "Let me\nsee."
        same = [TURN[0], {**TURN[1], "reasoning_content": f"Hm.\n\n{text}"}, TURN[2]]
        assert render(template, turn, with_tools=True) == reference(same, with_tools=True)
        assert turn[1]["reasoning_content"] == "Hm."  # the request is not changed


def test_system_messages_are_joined(template: ChatTemplate) -> None:
    texts: list[Any] = ["Be brief.", [{"type": "text", "text": "Be kind."}], "Be exact."]
    first, second, third = ({"role": "system", "content": text} for text in texts)
    expected = reference([{"role": "system", "content": "Be brief.\n\nBe kind.\n\nBe exact."}, *TURN], with_tools=True)
    assert render(template, [first, second, *TURN, third], with_tools=True) == expected


def test_results_without_ids_are_in_the_order_of_the_calls(template: ChatTemplate) -> None:
    calls, results = [call_of("a", "weather"), call_of("b", "time")], [result_of("a", "1"), result_of("b", "2")]
    turn = [TURN[0], {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    expected = reference(turn, with_tools=False)
    for names in (("id",), ("tool_call_id",), ("id", "tool_call_id")):
        bare = [{key: value for key, value in each.items() if key not in names} for each in turn]
        if "id" in names:
            bare[1]["tool_calls"] = [{key: call[key] for key in ("type", "function")} for call in calls]
        assert render(template, bare, with_tools=False) == expected
    assert harmony_messages(results) == results


def test_efforts(template: ChatTemplate) -> None:
    for effort, expected in (("none", "low"), ("minimal", "low"), ("high", "high"), ("max", "high")):
        assert f"\nReasoning: {expected}\n" in render(template, TURN, with_tools=False, effort=effort)
    assert harmony_options({}) == {}
