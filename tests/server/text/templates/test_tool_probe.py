"""The formats of tool calls that are found by rendering chat templates."""

import pytest

from server.text.parsers.tool_formats import (
    GENERIC,
    ID,
    KEY,
    JSONArguments,
    LiteralArguments,
    ObjectCall,
    TaggedArguments,
)
from server.text.templates.chat_template import ChatTemplate
from server.text.templates.sandbox import SandboxedTemplate
from tests.support.tool_templates import NAMES, load_template

FORMATS = {  # name of a format -> templates
    "apertus": ["Apertus-8B-Instruct"],
    "cohere": ["Cohere2MoE", "CohereForAI-c4ai-command-r7b-12-2024-tool_use"],
    "command_r": ["CohereForAI-c4ai-command-r-plus-tool_use"],
    "deepseek": ["DeepSeek-V3.1", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "llama-cpp-deepseek-r1"],
    "deepseek_dsml": ["deepseek-ai-DeepSeek-V4", "deepseek-ai-DeepSeek-V4-Flash-0731"],
    "gemma4": ["google-gemma-4-31B-it"],
    "generic": [
        "HuggingFaceTB-SmolLM3-3B",
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
        "fireworks-ai-llama-3-firefunction-v2",
        "llama-cpp-rwkv-world",
    ],
    "gigachat": ["GigaChat3-10B-A1.8B", "GigaChat3.1-10B-A1.8B"],
    "glm": ["GLM-4.5", "poolside-Laguna-S-2.1", "poolside-Laguna-XS-2.1", "poolside-Laguna-XS.2"],
    "granite": ["ibm-granite-granite-3.3-2B-Instruct"],
    "hermes": ["NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Qwen-Qwen3-0.6B", "ibm-granite-granite-4.0"],
    "json": ["unknown-json"],
    "kimi_k2": ["moonshotai-Kimi-K2"],
    "kimi_k3": ["Kimi-K3"],
    "lfm2": ["LFM2-8B-A1B", "LFM2.5-8B-A1B"],
    "llama3": ["meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct"],
    "minimax_m2": ["MiniMax-M2"],
    "minimax_m3": ["MiniMax-M3"],
    "mistral": ["mistralai-Mistral-Nemo-Instruct-2407"],
    "mistral_names": ["Mistral-call-ids", "unsloth-mistral-Devstral-Small-2507"],
    "muse": ["muse-glimmer"],
    "named_json": ["unknown-named"],
    "nemotron": ["NVIDIA-Nemotron-Nano-v2"],
    "phi4": ["Phi-4-mini"],
    "pythonic": ["Llama-pythonic"],
    "qwen3_coder": ["Qwen3-Coder", "Qwen3.5-4B", "Seed-OSS", "StepFun3.5-Flash"],
    "solar": ["upstage-Solar-Open-100B"],
    "tagged": ["unknown-tags"],
    "tool_calls": ["Apriel-1.6-15b-Thinker-fixed", "MiniMax-M1"],
}


def test_the_format_of_each_template() -> None:
    expected = {name: format for format, names in FORMATS.items() for name in names}
    assert {name: load_template(name).tool_format_name for name in NAMES} == expected


AFTER = '", "arguments": '


@pytest.mark.parametrize(
    ("name", "texts", "kind"),
    [
        (
            "mistralai-Mistral-Nemo-Instruct-2407",
            ("[TOOL_CALLS][", '{"name": "', AFTER, "}", ", ", "]"),
            ObjectCall,
        ),
        ("unknown-named", ("", "<<", ">>", "<</>>", "", ""), JSONArguments),
        ("Mistral-call-ids", ("", "[TOOL_CALLS]", f"[CALL_ID]{ID}[ARGS]", "", "", ""), JSONArguments),
        ("GLM-4.5", ("", "<tool_call>", "\n", "</tool_call>", "\n", ""), TaggedArguments),
        ("LFM2.5-8B-A1B", ("<|tool_call_start|>[", "", "(", ")", ", ", "]<|tool_call_end|>"), LiteralArguments),
    ],
)
def test_texts_around_calls(name: str, texts: tuple[str, ...], kind: type) -> None:
    format = load_template(name).tool_format
    around = (format.start, format.before_name, format.after_name, format.after_arguments)
    assert (*around, format.separator, format.end) == texts
    assert type(format.arguments) is kind


def test_texts_around_arguments() -> None:
    assert load_template("Qwen3-Coder").tool_format.arguments == TaggedArguments(
        "<parameter=", ">\n", "\n</parameter>\n", is_padded=True
    )
    assert load_template("poolside-Laguna-XS.2").tool_format.arguments == TaggedArguments(
        "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"
    )
    dsml = load_template("deepseek-ai-DeepSeek-V4").tool_format.arguments
    assert isinstance(dsml, TaggedArguments)
    assert dsml.after_keys["string"] == '" string="true">'
    assert {dsml.after_keys[kind] for kind in ("number", "boolean", "object", "array")} == {'" string="false">'}
    nested = load_template("MiniMax-M3").tool_format.arguments
    assert isinstance(nested, TaggedArguments)
    assert nested.is_nested
    assert f"</{KEY}>" in nested.after_value


def test_the_end_of_the_answer_is_no_part_of_the_calls() -> None:
    source = load_template("llama-cpp-deepseek-r1").source
    template = ChatTemplate(SandboxedTemplate(source), bos_token=None, eos_token="<｜end▁of▁sentence｜>")
    assert template.tool_format.end == "<｜tool▁calls▁end｜>"


def test_what_the_template_allows() -> None:
    assert load_template("mistralai-Mistral-Nemo-Instruct-2407").tool_format.id_length == 9
    assert load_template("Qwen-Qwen3-0.6B").tool_format.id_length is None
    assert not load_template("GigaChat3-10B-A1.8B").tool_format.several
    assert load_template("meta-llama-Llama-3.1-8B-Instruct").tool_format.is_bare
    assert load_template("llama-cpp-rwkv-world").tool_format is GENERIC
