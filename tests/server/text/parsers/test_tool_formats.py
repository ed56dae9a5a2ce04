"""Formats of real chat templates are found by rendering; what a template writes is parsed to the same message."""

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from server.text.parsers.answer_parser import AnswerFormat, AnswerParser
from server.text.parsers.harmony import HARMONY
from server.text.parsers.reasoning_parser import ReasoningTags
from server.text.parsers.tool_formats import GENERIC, ID, KEY, TaggedArguments, split_text
from server.text.templates.chat_template import UNRECOGNIZED, ChatTemplate
from server.text.templates.families import ANNOUNCED, FAMILIES, GENERAL_NAMES
from server.text.templates.reasoning_probe import ReasoningFormat
from server.text.templates.rendered_text import common_prefix, common_suffix
from server.text.templates.sandbox import ChatTemplateError, SandboxedTemplate
from tests.support.chat_templates import CHATML, chat_template
from tests.support.examples import num_examples
from tests.support.parsing import Answer, cut, read_answer
from tests.support.paths import ROOT
from tests.support.tool_templates import EOS, NAMES, SCHEMAS, TOOLS, WITH_CALLS, kinds_first, load_template

Call = tuple[str, Any]
FULL: dict[str, Any] = {
    "city": 'São Paulo, <b>\n "x" \\',
    "days": 3,
    "flag": True,
    "list": [1, -2],
    "options": {"name": "a b", "x": 5},
    "ratio": 0.5,
}
# These write strings without escapes.
UNESCAPED = ("LFM2.5-8B-A1B",)
# Templates that allow one call in a message, or write only the first.
SINGLE = ("GigaChat", "meta-llama")
TOKENS = ("<|message_sep|>", "<|CHATBOT_TOKEN|>")  # other control tokens, which are no content
# What ends a turn. Templates write more after it, the model does not.
ENDS = (
    f"{EOS} <|im_end|> <|eot_id|> <|eot|> <|END_OF_TURN_TOKEN|> <|end_of_msg|> [e~[ <|end_of_text|> <turn|>"
    " <end_of_sentence> <｜end▁of▁sentence｜> </assistant> <|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|> <SPECIAL_12>"
    " <|assistant_end|> <|call|> <|calls|> <|tool_response>"
)
TURN_ENDS = re.compile(
    "|".join(map(re.escape, ENDS.split())) + r"|<\|end\|>(?!<\|begin\|>|<\|start\|>)|<\|message_sep\|>(?!\n\nfunction)"
)


def arguments_of(name: str) -> dict[str, Any]:
    return FULL | ({"city": "São Paulo, <b>"} if name in UNESCAPED else {})


def answer_of(template: ChatTemplate, message: dict[str, Any], **options: Any) -> tuple[str, bool]:
    """Return what the template writes of the last message, and whether it begins within reasoning."""
    messages = [{"role": "user", "content": "Question?"}]
    prompt = template.render(messages, tools=TOOLS, template_kwargs=options)
    text = template.render([*messages, message], tools=TOOLS, add_generation_prompt=False, template_kwargs=options)
    begin = prompt if text.startswith(prompt) else common_prefix(prompt, text)
    tags = template.reasoning_tags
    return TURN_ENDS.split(text[len(begin) :])[0], tags is not None and tags.are_opened_by(begin)


def parse(
    template: ChatTemplate, pieces: list[str], is_reasoning: bool = False, schemas: dict[str, Any] = SCHEMAS
) -> Answer:
    tags, markers = template.reasoning_tags, template.reasoning.content_markers
    format = AnswerFormat(
        template.tool_format, schemas, reasoning_tags=tags, content_markers=markers, is_reasoning=is_reasoning
    )
    parser = AnswerParser(format, hidden=(*markers, *TOKENS))
    answer = read_answer(parser, pieces)
    answer.is_complete = parser.ends_with_calls
    assert parser.num_held == 0 or not parser.is_reasoning
    return answer


def message_of(calls: list[Call], content: str = "", reasoning: str = "") -> dict[str, Any]:
    written = [
        {"id": f"abcdefgh{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(calls)
    ]
    optional = {"reasoning_content": reasoning, "tool_calls": written}
    return {"role": "assistant", "content": content} | {name: value for name, value in optional.items() if value}


WITHOUT_TEXT = {  # templates that drop the content of messages with calls, or move it
    *("Cohere2MoE", "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "MiniMax-M1", "muse-glimmer"),
    *("mistralai-Mistral-Nemo-Instruct-2407", "upstage-Solar-Open-100B", "meta-llama-Llama-3.1-8B-Instruct"),
    *("meta-llama-Llama-3.2-3B-Instruct", "google-gemma-4-31B-it", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"),
    *("NVIDIA-Nemotron-Nano-v2", "llama-cpp-deepseek-r1", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use"),
    "Llama-pythonic",
}


@pytest.mark.parametrize("name", WITH_CALLS)
def test_calls_and_content(name: str) -> None:
    template = load_template(name)
    calls = [("get_weather", arguments_of(name)), ("other-tool", {"city": "x"}), ("get_weather", {"city": ""})]
    calls = calls[:1] if name.startswith(SINGLE) else calls
    for found in (calls, calls[:1]):
        content = "" if name in WITHOUT_TEXT or len(found) > 1 else "One moment."
        text, is_reasoning = answer_of(template, message_of(found, content))
        answer = parse(template, [text], is_reasoning)
        assert answer.decoded == found, text
        assert (answer.content.strip(), answer.reasoning, answer.is_complete) == (content, "", True), text


# Names of parameters that no programming language would have, but a JSON schema may.
ODD_NAMES = (
    *("my city", "a.b", "ünï 城", "a:b", "a=b", "x<y", "x>y", 'say "q"', "it's", "a,b", "a(b)", "a{b}", "a[b]", "1st"),
    *(" lead", "trail ", "a/b", "/x", "@type", "$ref", "a\\b", "a|b", "<|", "", "line\nbreak", "="),
)


@kinds_first(WITH_CALLS)
def test_names_of_parameters_may_have_any_characters(name: str, rng: random.Random) -> None:
    template, names = load_template(name), rng.sample(ODD_NAMES, len(ODD_NAMES))
    types = [("string", "v w"), ("integer", 3)]
    schema = {"type": "object", "properties": {key: {"type": types[i % 2][0]} for i, key in enumerate(names)}}
    call = ("get_weather", {key: types[i % 2][1] for i, key in enumerate(names)})
    text, is_reasoning = answer_of(template, message_of([call]))
    for pieces in ([text], list(text)):
        answer = parse(template, pieces, is_reasoning, {"get_weather": schema})
        assert (answer.decoded, answer.content.strip()) == ([call], ""), text


@kinds_first(NAMES)
def test_reasoning(name: str) -> None:
    template = load_template(name)
    if template.reasoning.message_field is None:
        return
    switches = {option: True for option in ("enable_thinking", "thinking") if option in template.options}
    for calls, content in (([], "The answer."), ([("get_weather", arguments_of(name))], "")):
        text, is_reasoning = answer_of(template, message_of(calls, content, "Let me see."), **switches)
        if "Let me see." not in text:  # the template drops the reasoning of such messages
            continue
        answer = parse(template, [text], is_reasoning or text.startswith("Let me see."))
        assert (answer.reasoning.strip(), answer.content.strip()) == ("Let me see.", content), text
        assert answer.decoded == calls, text


@kinds_first(WITH_CALLS)
def test_any_pieces_are_parsed_alike(name: str, rng: random.Random) -> None:
    """Whole answers, answers that break off, and answers with text in the wrong place."""
    template = load_template(name)
    calls = [("get_weather", arguments_of(name)), ("other-tool", {"city": "x"})]
    try:
        text, is_reasoning = answer_of(template, message_of(calls))
    except ChatTemplateError:
        text, is_reasoning = answer_of(template, message_of(calls[:1]))
    position = rng.randrange(len(text))
    pieces = [*split_text(text), "{", "}", "<", ">", "]", ",", '"', "\n", "x"]
    broken = text[:position] + rng.choice(pieces) + text[position + rng.randrange(5) :]
    for whole in (text, broken, text[:position], "".join(rng.choices(pieces, k=12))):
        expected, positions = parse(template, [whole], is_reasoning), range(len(whole) + 1)
        ways = [rng.choices(positions, k=rng.randrange(2, 30)) for _ in range(num_examples(5, 100))]
        ways += [[position] for position in positions if whole is text]  # in two, everywhere
        for way in ([*positions], *ways):
            assert parse(template, cut(whole, way), is_reasoning) == expected, way


@kinds_first(WITH_CALLS)
def test_an_answer_that_breaks_off_has_the_beginning_of_the_whole(name: str) -> None:
    template = load_template(name)
    text, is_reasoning = answer_of(template, message_of([("get_weather", arguments_of(name))]))
    whole = parse(template, [text], is_reasoning)
    markers = (*TOKENS, *template.reasoning.content_markers)
    for end in range(len(text)):
        answer = parse(template, [text[:end]], is_reasoning)
        if answer.calls:
            rest, (called, arguments) = answer.content.strip(), answer.calls[0]
            assert any(marker.startswith(rest) for marker in ("", *markers)) or rest.startswith(', "'), text[:end]
            assert called == whole.calls[0][0]
            assert whole.calls[0][1].startswith(arguments), text[:end]
        elif not (template.reasoning_tags or any(token in text for token in markers)):
            assert answer.content == text[:end]


@kinds_first(WITH_CALLS)
def test_calls_of_unknown_tools_are_content(name: str) -> None:
    template = load_template(name)
    text, is_reasoning = answer_of(template, message_of([("get_weather", {"city": "x"})]))
    answer = parse(template, [text.replace("get_weather", "get_whatever")], is_reasoning)
    assert answer.calls == []
    assert "get_whatever" in answer.content


# The formats of tool calls, reasoning and content that are found.

FORMATS = {  # name of a format -> templates
    "apertus": "Apertus-8B-Instruct",
    "cohere": "Cohere2MoE CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "command_r": "CohereForAI-c4ai-command-r-plus-tool_use",
    "deepseek": "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B llama-cpp-deepseek-r1",
    "deepseek_dsml": "deepseek-ai-DeepSeek-V4 deepseek-ai-DeepSeek-V4-Flash-0731",
    "gemma4": "google-gemma-4-31B-it",
    "generic": "HuggingFaceTB-SmolLM3-3B deepseek-ai-DeepSeek-R1-Distill-Llama-8B "
    "fireworks-ai-llama-3-firefunction-v2 llama-cpp-rwkv-world",
    "gigachat": "GigaChat3-10B-A1.8B GigaChat3.1-10B-A1.8B",
    "glm": "poolside-Laguna-S-2.1 poolside-Laguna-XS-2.1 poolside-Laguna-XS.2",
    "granite": "ibm-granite-granite-3.3-2B-Instruct",
    "hermes": "NousResearch-Hermes-3-Llama-3.1-8B-tool_use Qwen-Qwen3-0.6B ibm-granite-granite-4.0",
    "json": "unknown-json",
    "kimi_k2": "moonshotai-Kimi-K2",
    "kimi_k3": "Kimi-K3",
    "lfm2": "LFM2-8B-A1B LFM2.5-8B-A1B",
    "llama3": "meta-llama-Llama-3.1-8B-Instruct meta-llama-Llama-3.2-3B-Instruct",
    "minimax_m2": "MiniMax-M2",
    "minimax_m3": "MiniMax-M3",
    "mistral": "mistralai-Mistral-Nemo-Instruct-2407",
    "mistral_names": "Mistral-call-ids unsloth-mistral-Devstral-Small-2507",
    "muse": "muse-glimmer",
    "named_json": "unknown-named",
    "nemotron": "NVIDIA-Nemotron-Nano-v2",
    "phi4": "Phi-4-mini",
    "pythonic": "Llama-pythonic",
    "qwen3_coder": "Qwen3-Coder Qwen3.5-4B Seed-OSS StepFun3.5-Flash",
    "solar": "upstage-Solar-Open-100B",
    "tagged": "unknown-tags",
    "tool_calls": "Apriel-1.6-15b-Thinker-fixed MiniMax-M1",
}


def test_the_format_of_each_template() -> None:
    expected = {name: format for format, names in FORMATS.items() for name in names.split()}
    assert {name: load_template(name).tool_format_name for name in NAMES} == expected


AFTER = '", "arguments": '


AROUND = [
    ("mistralai-Mistral-Nemo-Instruct-2407", ("[TOOL_CALLS][", '{"name": "', AFTER, "}", ", ", "]"), "ObjectCall"),
    ("unknown-named", ("", "<<", ">>", "<</>>", "", ""), "JSONArguments"),
    ("Mistral-call-ids", ("", "[TOOL_CALLS]", f"[CALL_ID]{ID}[ARGS]", "", "", ""), "JSONArguments"),
    ("poolside-Laguna-XS.2", ("", "<tool_call>", "\n", "</tool_call>", "\n", ""), "TaggedArguments"),
    ("LFM2.5-8B-A1B", ("<|tool_call_start|>[", "", "(", ")", ", ", "]<|tool_call_end|>"), "LiteralArguments"),
]


@pytest.mark.parametrize(("name", "texts", "kind"), AROUND)
def test_texts_around_calls(name: str, texts: tuple[str, ...], kind: str) -> None:
    format = load_template(name).tool_format
    around = (format.start, format.before_name, format.after_name, format.after_arguments)
    assert (*around, format.separator, format.end) == texts
    assert type(format.arguments).__name__ == kind


def test_texts_around_arguments() -> None:
    padded = TaggedArguments("<parameter=", ">\n", "\n</parameter>\n", is_padded=True)
    assert load_template("Qwen3-Coder").tool_format.arguments == padded
    tagged = TaggedArguments("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
    assert load_template("poolside-Laguna-XS.2").tool_format.arguments == tagged
    dsml, nested = (load_template(name).tool_format.arguments for name in ("deepseek-ai-DeepSeek-V4", "MiniMax-M3"))
    assert isinstance(dsml, TaggedArguments)
    others = dict.fromkeys(("number", "boolean", "object", "array"), '" string="false">')
    assert dsml.after_keys == others | {"string": '" string="true">'}
    assert isinstance(nested, TaggedArguments)
    assert nested.is_nested
    assert f"</{KEY}>" in nested.after_value


def test_what_the_template_allows() -> None:
    assert load_template("mistralai-Mistral-Nemo-Instruct-2407").tool_format.id_length == 9
    assert load_template("Qwen-Qwen3-0.6B").tool_format.id_length is None
    assert not load_template("GigaChat3-10B-A1.8B").tool_format.several
    assert load_template("meta-llama-Llama-3.1-8B-Instruct").tool_format.is_bare
    assert load_template("llama-cpp-rwkv-world").tool_format is GENERIC
    # The end of the answer is no part of the calls.
    source = load_template("llama-cpp-deepseek-r1").source
    template = ChatTemplate(SandboxedTemplate(source), bos_token=None, eos_token="<｜end▁of▁sentence｜>")
    assert template.tool_format.end == "<｜tool▁calls▁end｜>"


# Reasoning and content.


THINK = ReasoningTags("<think>", "</think>")
TAGS = {
    "Apriel-1.6-15b-Thinker-fixed": ReasoningTags("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    "Cohere2MoE": ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>"),
    "Kimi-K3": ReasoningTags("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    "MiniMax-M3": ReasoningTags("<mm:think>", "</mm:think>"),
    "Mistral-call-ids": ReasoningTags("[THINK]", "[/THINK]"),
    "Seed-OSS": ReasoningTags("<seed:think>", "</seed:think>"),
    "google-gemma-4-31B-it": ReasoningTags("<|channel>thought", "<channel|>"),
    "muse-glimmer": ReasoningTags("to=self<|message|>", "<|eom|><|start|>assistant"),
    "unknown-json": ReasoningTags("<muse>", "</muse>"),
    "upstage-Solar-Open-100B": ReasoningTags("<|think|>", "<|end|><|begin|>assistant"),
}
WITHOUT = {
    *("Apertus-8B-Instruct", "CohereForAI-c4ai-command-r-plus-tool_use", "GigaChat3-10B-A1.8B", "MiniMax-M1"),
    *("GigaChat3.1-10B-A1.8B", "LFM2-8B-A1B", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Phi-4-mini"),
    *("Qwen3-Coder", "fireworks-ai-llama-3-firefunction-v2", "ibm-granite-granite-4.0", "moonshotai-Kimi-K2"),
    *("meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "unsloth-mistral-Devstral-Small-2507"),
    "mistralai-Mistral-Nemo-Instruct-2407",
}


def test_the_tags_of_each_template() -> None:
    expected = {name: None if name in WITHOUT else TAGS.get(name, THINK) for name in NAMES}
    assert {name: load_template(name).reasoning_tags for name in NAMES} == expected


def test_the_field_that_a_template_reads() -> None:
    fields = {name: load_template(name).reasoning.message_field for name in NAMES}
    assert fields["LFM2.5-8B-A1B"] == "thinking"
    assert fields["upstage-Solar-Open-100B"] == "reasoning"
    assert fields["Qwen-Qwen3-0.6B"] == fields["deepseek-ai-DeepSeek-V4"] == "reasoning_content"
    assert fields["moonshotai-Kimi-K2"] is None


def test_texts_around_content() -> None:
    markers = {name: load_template(name).reasoning.content_markers for name in NAMES}
    assert {name: texts for name, texts in markers.items() if texts} == {
        "Cohere2MoE": ("<|START_TEXT|>", "<|END_TEXT|>"),
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        "Kimi-K3": ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
        "muse-glimmer": ("to=user<|message|>",),
        "upstage-Solar-Open-100B": ("<|content|>",),
    }


def test_tags_that_no_message_shows() -> None:
    """Templates may only open the tag, describe it, drop the reasoning of earlier messages, or have a switch."""
    opens = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    drops = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    switch = "{% if add_generation_prompt and enable_thinking %}{{ '<think>' }}{% endif %}"
    for source in (CHATML.partition("{%- if add_generation_prompt")[0] + opens, drops, CHATML + switch):
        assert chat_template(source).reasoning_tags == THINK
    describes = "{{ 'Reason in [THINK] and [/THINK].' }}"
    assert chat_template(describes + CHATML).reasoning_tags == ReasoningTags("[THINK]", "[/THINK]")
    after_content = "{% for m in messages %}{{ m.content }}[{{ m.reasoning_content }}]{% endfor %}"
    for source in (CHATML, after_content):
        assert chat_template(source).reasoning == ReasoningFormat()


def test_a_switch_without_tags_is_not_recognized() -> None:
    assert load_template("Apertus-8B-Instruct").reasoning_format_name == "unrecognized"
    assert [name for name in NAMES if not load_template(name).reasoning.is_recognized] == ["Apertus-8B-Instruct"]


# Names.


def test_the_documentation_names_all_formats() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    table = text.partition("| `tool_format` |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    names = {name for families in FAMILIES.values() for _, name, _ in families}
    names |= {*GENERAL_NAMES.values(), *(format.name for _, format in ANNOUNCED)}
    names |= {GENERIC.name, HARMONY.name, UNRECOGNIZED}
    assert documented == names


# Texts are compared at the boundaries of their tags.


COMMON = [
    (common_prefix, "</think>\n\n", "</think>\n\n<call>", "</think>\n\n"),
    # The first tag belongs to what follows.
    (common_prefix, "<|open|>think<|sep|>a", "<|open|>response<|sep|>", ""),
    (common_prefix, "<|close|>think<|sep|><|open|>a", "<|close|>think<|sep|><|open|>b", "<|close|>think<|sep|>"),
    (common_prefix, "</invoke>\n<invoke>", "</invoke>\n</calls>", "</invoke>\n"),
    (common_prefix, "}, {", "}]", "}"),
    (common_prefix, "abc", "abd", ""),
    (common_prefix, "", "a", ""),
    (common_suffix, "<calls>\n<call>", "</call>\n<call>", "\n<call>"),
    (common_suffix, "</calls><|end|>\n", "text<|end|>\n", "<|end|>\n"),
    (common_suffix, "a<tool|>", "b<turn|>", ""),
    (common_suffix, '[{"name": "', '}, {"name": "', '{"name": "'),
    (common_suffix, "xyz", "ayz", ""),
    *((common, "same", "same", "same") for common in (common_prefix, common_suffix)),
]


@pytest.mark.parametrize(("common", "first", "second", "expected"), COMMON)
def test_common_texts(common: Callable[[str, str], str], first: str, second: str, expected: str) -> None:
    assert common(first, second) == common(second, first) == expected
