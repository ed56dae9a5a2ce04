"""The formats of tool calls, reasoning and content that are found by rendering chat templates."""

import re

import pytest

from server.text.parsers.harmony import HARMONY
from server.text.parsers.reasoning_parser import ReasoningTags
from server.text.parsers.tool_formats import GENERIC, ID, KEY, TaggedArguments
from server.text.templates.chat_template import UNRECOGNIZED, ChatTemplate
from server.text.templates.families import ANNOUNCED, FAMILIES, GENERAL_NAMES
from server.text.templates.reasoning_probe import ReasoningFormat
from server.text.templates.rendered_text import common_prefix, common_suffix
from server.text.templates.sandbox import SandboxedTemplate
from tests.support.chat_templates import CHATML, chat_template
from tests.support.paths import ROOT
from tests.support.tool_templates import NAMES, load_template

FORMATS = {  # name of a format -> templates
    "apertus": "Apertus-8B-Instruct",
    "cohere": "Cohere2MoE CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "command_r": "CohereForAI-c4ai-command-r-plus-tool_use",
    "deepseek": "DeepSeek-V3.1 deepseek-ai-DeepSeek-R1-Distill-Qwen-32B llama-cpp-deepseek-r1",
    "deepseek_dsml": "deepseek-ai-DeepSeek-V4 deepseek-ai-DeepSeek-V4-Flash-0731",
    "gemma4": "google-gemma-4-31B-it",
    "generic": "HuggingFaceTB-SmolLM3-3B deepseek-ai-DeepSeek-R1-Distill-Llama-8B "
    "fireworks-ai-llama-3-firefunction-v2 llama-cpp-rwkv-world",
    "gigachat": "GigaChat3-10B-A1.8B GigaChat3.1-10B-A1.8B",
    "glm": "GLM-4.5 poolside-Laguna-S-2.1 poolside-Laguna-XS-2.1 poolside-Laguna-XS.2",
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
    ("GLM-4.5", ("", "<tool_call>", "\n", "</tool_call>", "\n", ""), "TaggedArguments"),
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
    dsml = load_template("deepseek-ai-DeepSeek-V4").tool_format.arguments
    assert isinstance(dsml, TaggedArguments)
    assert dsml.after_keys["string"] == '" string="true">'
    assert {dsml.after_keys[kind] for kind in ("number", "boolean", "object", "array")} == {'" string="false">'}
    nested = load_template("MiniMax-M3").tool_format.arguments
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
    *("Apertus-8B-Instruct", "CohereForAI-c4ai-command-r-plus-tool_use", "GigaChat3-10B-A1.8B"),
    *(
        "GigaChat3.1-10B-A1.8B",
        "LFM2-8B-A1B",
        "MiniMax-M1",
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
        "Phi-4-mini",
    ),
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


PREFIXES = [
    ("</think>\n\n", "</think>\n\n<call>", "</think>\n\n"),
    ("<|open|>think<|sep|>a", "<|open|>response<|sep|>", ""),  # the first tag belongs to what follows
    ("<|close|>think<|sep|><|open|>a", "<|close|>think<|sep|><|open|>b", "<|close|>think<|sep|>"),
    ("</invoke>\n<invoke>", "</invoke>\n</calls>", "</invoke>\n"),
    ("}, {", "}]", "}"),
    ("abc", "abd", ""),
    ("", "a", ""),
    ("same", "same", "same"),
]


@pytest.mark.parametrize(("first", "second", "expected"), PREFIXES)
def test_common_prefix(first: str, second: str, expected: str) -> None:
    assert common_prefix(first, second) == common_prefix(second, first) == expected


SUFFIXES = [
    ("<calls>\n<call>", "</call>\n<call>", "\n<call>"),
    ("</calls><|end|>\n", "text<|end|>\n", "<|end|>\n"),
    ("a<tool|>", "b<turn|>", ""),
    ('[{"name": "', '}, {"name": "', '{"name": "'),
    ("xyz", "ayz", ""),
    ("same", "same", "same"),
]


@pytest.mark.parametrize(("first", "second", "expected"), SUFFIXES)
def test_common_suffix(first: str, second: str, expected: str) -> None:
    assert common_suffix(first, second) == common_suffix(second, first) == expected
