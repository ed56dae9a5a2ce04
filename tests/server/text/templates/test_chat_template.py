"""Chat templates render and continue messages as transformers does, and fail with an error that is safe to show."""

import copy
import dataclasses
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from server.text.parsers.reasoning_parser import ReasoningTags
from server.text.parsers.tool_formats import GENERIC, HERMES
from server.text.templates.chat_template import END, ChatTemplate
from server.text.templates.sandbox import ChatTemplateError, SandboxedTemplate
from tests.support.chat_templates import (
    CHAT,
    CHATML,
    LLAMA3,
    MISTRAL,
    PARTS,
    PARTS_ONLY,
    REASONING,
    ROLE_BUILT,
    SYSTEM_CHAT,
    TOOLS,
    chat_template,
    transformers_oracle,
    user,
)
from tests.support.tool_model import TEMPLATE
from tests.support.tool_templates import NAMES, load_template


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    return transformers_oracle()


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (CHATML, CHAT),
        (CHATML, SYSTEM_CHAT),
        (LLAMA3, CHAT),
        (LLAMA3, SYSTEM_CHAT),
        (MISTRAL, CHAT),
        (PARTS, SYSTEM_CHAT),
        (PARTS, user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
        (PARTS_ONLY, user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
        (ROLE_BUILT, CHAT),
        (REASONING, [*CHAT, {"role": "assistant", "content": "<think>hm</think>\n\nYes"}]),
    ],
)
def test_renders_as_transformers_does(
    oracle: PreTrainedTokenizerFast, source: str, messages: list[dict[str, Any]]
) -> None:
    template, given_messages = chat_template(source), copy.deepcopy(messages)
    choices: list[tuple[Any, bool]] = [(None, True), (None, False), (TOOLS, True), (TOOLS, False)]
    for tools, is_prompt in choices:
        expected = oracle.apply_chat_template(
            messages, tools=tools, chat_template=source, add_generation_prompt=is_prompt, tokenize=False
        )
        assert template.render(messages, add_generation_prompt=is_prompt, tools=tools) == expected
        assert messages == given_messages


def test_template_kwargs_are_variables() -> None:
    rendered = chat_template(LLAMA3).render(CHAT, template_kwargs={"date_string": "26 Jul 2024"})
    assert "Today: 26 Jul 2024\n" in rendered


@pytest.mark.checklist("C20")
@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_template_kwargs_cannot_replace_what_we_set(name: str) -> None:
    with pytest.raises(ChatTemplateError, match=name):
        chat_template(CHATML).render(CHAT, template_kwargs={name: "x"})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, "<|im_start|>user\na\nb<|im_end|>\n"),  # joined
        (PARTS, "<|im_start|>user:ab<|im_end|>"),  # the template's own way
        (PARTS_ONLY, "<|im_start|>user:ab"),
        (MISTRAL, "<s>[INST] a\nb [/INST]"),
    ],
)
def test_text_parts_come_in_the_form_that_the_template_handles(source: str, expected: str) -> None:
    messages = user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    assert chat_template(source).render(messages, add_generation_prompt=False) == expected


def test_form_is_chosen_for_each_role() -> None:
    """Some templates handle parts from users but only strings in the system message."""
    source = PARTS.replace(
        "{%- if message.content is string", "{%- if message.role == 'system' or message.content is string"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rendered = chat_template(source).render([{"role": role, "content": parts} for role in ("system", "user")])
    assert rendered == "<|im_start|>system:a\nb<|im_end|><|im_start|>user:ab<|im_end|>"


EACH = "{{% for message in messages %}}{{% set late = message.role == 'system' and loop.index0 > 0 %}}{}{{% endfor %}}"


@pytest.mark.parametrize(
    ("source", "is_placed"),
    [
        (CHATML, True),
        (PARTS_ONLY, True),
        (LLAMA3, True),
        (MISTRAL, False),  # which supports no system messages
        (EACH.format("{{ raise_exception('Only first.') if late else message.content }}"), False),
        (EACH.format("{% if not late %}{{ message.content }}{% endif %}"), False),
        (EACH.format("{{ message.content }}"), True),
        ("{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join }}" + CHATML, False),
    ],
)
def test_where_system_messages_are_written(source: str, is_placed: bool) -> None:
    assert chat_template(source).keeps_system_position is is_placed


def test_content_of_none_is_empty() -> None:
    rendered = chat_template(CHATML).render([{"role": "assistant", "content": None}], add_generation_prompt=False)
    assert rendered == "<|im_start|>assistant\n<|im_end|>\n"


@pytest.mark.parametrize("source", [CHATML, PARTS, PARTS_ONLY])
@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "http://x"}}, {"type": "text"}, "x", None])
def test_other_parts_are_refused(source: str, part: Any) -> None:
    with pytest.raises(ChatTemplateError, match="content"):
        chat_template(source).render(user([{"type": "text", "text": "a"}, part]))


def test_templates_own_refusal_reaches_the_client_as_one_short_line() -> None:
    with pytest.raises(ChatTemplateError, match="render this request: Conversation roles must alternate"):
        chat_template(MISTRAL).render([{"role": "assistant", "content": "x"}])
    with pytest.raises(ChatTemplateError, match=r"^.{1,299}$"):
        chat_template("{{ raise_exception(messages[0].content) }}").render(user("a\nb\x00" * 1000))


def test_what_a_template_shows_of_the_model() -> None:
    template = chat_template(TEMPLATE)
    assert (template.tool_format, template.reasoning_tags) == (HERMES, ReasoningTags("<think>", "</think>"))
    assert (template.tool_format_name, template.reasoning_format_name) == ("hermes", "<think>")
    template = chat_template(CHATML)
    assert (template.tool_format, template.reasoning_tags) == (GENERIC, None)
    assert (template.tool_format_name, template.reasoning_format_name) == ("generic", None)
    template = chat_template(
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
        + "{% endfor %}{% endfor %}{{ tools | tojson }}{% if enable_thinking %}{% endif %}"
    )
    assert template.tool_format == dataclasses.replace(GENERIC, is_recognized=False)
    assert (template.tool_format_name, template.reasoning_format_name) == ("unrecognized", "unrecognized")


def test_arguments_are_json_where_the_template_needs_text() -> None:
    source = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}"
        "{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}"
        "{% endfor %}{% endfor %}{{ tools | tojson }}"
    )
    call: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    messages: list[dict[str, Any]] = [*CHAT, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert '<call>f {"a": "é"}</call>' in chat_template(source).render(messages, tools=TOOLS)
    assert call["function"] == {"name": "f", "arguments": {"a": "é"}}


def test_tools_in_the_system_message() -> None:
    template = load_template("Phi-4-mini")
    functions = json.dumps([tool["function"] for tool in TOOLS], ensure_ascii=False)
    expected = f"<|system|><|tool|>{functions}<|/tool|><|end|><|user|>Hi<|end|><|assistant|>"
    assert template.render(user("Hi"), tools=TOOLS) == expected
    system = [{"role": "system", "content": "Be kind."}, *user("Hi")]
    assert template.render(system, tools=TOOLS) == expected.replace("<|tool|>", "Be kind.<|tool|>")
    assert template.describes_tools
    assert not chat_template(CHATML).describes_tools


def test_tools_need_no_description() -> None:
    properties = {"city": {"type": "string"}, "days": {"type": "integer", "description": "How many"}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    before = copy.deepcopy(tool)
    for name in NAMES:
        if "firefunction" not in name:  # which needs variables
            template = load_template(name)
            prompt = template.render([{"role": "user", "content": "Hi"}], tools=[tool])
            assert ("weather" in prompt) == template.describes_tools, name
            assert tool == before


def test_a_description_is_made_up_only_where_the_template_needs_one() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "f", **fields}} for fields in ({}, {"description": "x"})]
    plain = ChatTemplate(SandboxedTemplate("{{ tools | tojson }}"), bos_token=None, eos_token=None)
    assert json.loads(plain.render(messages, tools=tools)) == tools
    needy = "{% for tool in tools %}{{ '//' + tool.function.description + '//' }}{% endfor %}"
    template = ChatTemplate(SandboxedTemplate(needy), bos_token=None, eos_token=None)
    assert template.render(messages, tools=tools) == "//////x//"
    failing = ChatTemplate(SandboxedTemplate("{{ tools[0].no + 'x' }}"), bos_token=None, eos_token=None)
    with pytest.raises(ChatTemplateError):
        failing.render(messages, tools=tools)


def test_earlier_calls_are_content_where_the_template_does_not_write_them() -> None:
    calls: list[Any] = [
        {"function": {"name": name, "arguments": arguments}} for name, arguments in [("f", {"a": 1}), ("g", {})]
    ]
    messages: list[dict[str, Any]] = [*CHAT, {"role": "assistant", "content": "Well.", "tool_calls": calls}]
    text = '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'
    prompt = load_template("Phi-4-mini").render(messages, tools=TOOLS)
    assert prompt.endswith(f"<|assistant|>Well.<|tool_call|>{text}<|/tool_call|><|end|><|assistant|>")
    prompt = load_template("ibm-granite-granite-3.3-2B-Instruct").render(messages, tools=TOOLS)
    assert f"Well.<|tool_call|>{text}<|end_of_text|>" in prompt
    assert load_template("Qwen-Qwen3-0.6B").render(messages, tools=TOOLS).count('"name": "f", "arguments"') == 1


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_the_name_that_the_template_reads(field: str) -> None:
    reasoning = "{% if m.FIELD %}{{ '<r>' + m.FIELD + '</r>' }}{% endif %}".replace("FIELD", field)
    template = chat_template(
        f"{{% for m in messages %}}<|{{{{ m.role }}}}|>{reasoning}{{{{ m.content }}}}{{% endfor %}}"
    )
    assert template.reasoning_tags == ReasoningTags("<r>", "</r>")
    messages = [*CHAT, {"role": "assistant", "content": "b", "reasoning_content": "a"}]
    assert template.render(messages).endswith("<r>a</r>b")


# Continued messages.


@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL, PARTS, REASONING])
def test_continues_as_transformers_does(oracle: PreTrainedTokenizerFast, source: str) -> None:
    for content in ("It is", "a <b> é", "I think, I think"):
        messages: list[dict[str, Any]] = [CHAT[0], {"role": "assistant", "content": content}]
        expected = oracle.apply_chat_template(
            messages, chat_template=source, continue_final_message=True, tokenize=False
        )
        rendered = chat_template(source).render(messages, add_generation_prompt=False, continue_final_message=True)
        assert rendered == expected
        assert str(expected).endswith(content)


def test_content_in_any_form_is_continued() -> None:
    contents: list[Any] = ["It is", [{"type": "text", "text": "It is"}]]
    for content in contents:
        messages = [CHAT[0], {"role": "assistant", "content": content}]
        for source in (CHATML, PARTS_ONLY):
            rendered = chat_template(source).render(messages, add_generation_prompt=False, continue_final_message=True)
            assert rendered.endswith("It is")


def test_a_template_that_does_not_write_the_final_message_cannot_continue_it() -> None:
    messages = [CHAT[0], {"role": "assistant", "content": "It is"}]
    for source in ("{{ messages[0].content }}", "{{ messages[1].content }}{{ messages[1].content }}"):
        with pytest.raises(ChatTemplateError, match="final message"):
            chat_template(source).render(messages, continue_final_message=True)
    messages[1]["content"] = f"It {END} is"
    with pytest.raises(ChatTemplateError, match="final message"):
        chat_template(CHATML).render(messages, continue_final_message=True)
