"""The formats of tool calls that are found by rendering chat templates."""

import pytest

from server.text.parsers.tool_formats import (
    GENERIC,
    ID,
    INDEX,
    KEY,
    JSONArguments,
    LiteralArguments,
    ObjectCall,
    TaggedArguments,
    ToolFormat,
)
from server.text.templates.chat_template import ChatTemplate
from server.text.templates.sandbox import SandboxedTemplate
from tests.support.tool_templates import NAMES, load_template

FORMATS = {
    "Apertus-8B-Instruct": "apertus",
    "Apriel-1.6-15b-Thinker-fixed": "tool_calls",
    "Cohere2MoE": "cohere",
    "CohereForAI-c4ai-command-r-plus-tool_use": "command_r",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "cohere",
    "DeepSeek-V3.1": "deepseek",
    "GLM-4.5": "glm",
    "GigaChat3-10B-A1.8B": "gigachat",
    "GigaChat3.1-10B-A1.8B": "gigachat",
    "HuggingFaceTB-SmolLM3-3B": "generic",
    "Kimi-K3": "kimi_k3",
    "LFM2-8B-A1B": "lfm2",
    "LFM2.5-8B-A1B": "lfm2",
    "Llama-pythonic": "pythonic",
    "MiniMax-M1": "tool_calls",
    "MiniMax-M2": "minimax_m2",
    "MiniMax-M3": "minimax_m3",
    "Mistral-call-ids": "mistral_names",
    "NVIDIA-Nemotron-Nano-v2": "nemotron",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Phi-4-mini": "phi4",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen3-Coder": "qwen3_coder",
    "Qwen3.5-4B": "qwen3_coder",
    "Seed-OSS": "qwen3_coder",
    "StepFun3.5-Flash": "qwen3_coder",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "generic",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek",
    "deepseek-ai-DeepSeek-V4": "deepseek_dsml",
    "deepseek-ai-DeepSeek-V4-Flash-0731": "deepseek_dsml",
    "fireworks-ai-llama-3-firefunction-v2": "generic",
    "google-gemma-4-31B-it": "gemma4",
    "ibm-granite-granite-3.3-2B-Instruct": "granite",
    "ibm-granite-granite-4.0": "hermes",
    "llama-cpp-deepseek-r1": "deepseek",
    "llama-cpp-rwkv-world": "generic",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "moonshotai-Kimi-K2": "kimi_k2",
    "muse-glimmer": "muse",
    "poolside-Laguna-S-2.1": "glm",
    "poolside-Laguna-XS-2.1": "glm",
    "poolside-Laguna-XS.2": "glm",
    "unknown-json": "json",
    "unknown-named": "named_json",
    "unknown-tags": "tagged",
    "unsloth-mistral-Devstral-Small-2507": "mistral_names",
    "upstage-Solar-Open-100B": "solar",
}


def test_the_format_of_each_template() -> None:
    assert {name: load_template(name).tool_format_name for name in NAMES} == FORMATS


def outline(format: ToolFormat) -> tuple[str, ...]:
    texts = (format.start, format.before_name, format.after_name, format.after_arguments, format.separator, format.end)
    return tuple(texts)


@pytest.mark.parametrize(
    ("name", "texts", "kind"),
    [
        (
            "Qwen-Qwen3-0.6B",
            ("", '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", ""),
            ObjectCall,
        ),
        (
            "mistralai-Mistral-Nemo-Instruct-2407",
            ("[TOOL_CALLS][", '{"name": "', '", "arguments": ', "}", ", ", "]"),
            ObjectCall,
        ),
        (
            "Cohere2MoE",
            (
                "<|START_ACTION|>[",
                f'\n    {{"tool_call_id": "{INDEX}", "tool_name": "',
                '", "parameters": ',
                "}",
                ",",
                "\n]<|END_ACTION|>",
            ),
            ObjectCall,
        ),
        (
            "moonshotai-Kimi-K2",
            (
                "<|tool_calls_section_begin|>",
                "<|tool_call_begin|>functions.",
                f":{INDEX}<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
                "",
                "<|tool_calls_section_end|>",
            ),
            JSONArguments,
        ),
        ("Mistral-call-ids", ("", "[TOOL_CALLS]", f"[CALL_ID]{ID}[ARGS]", "", "", ""), JSONArguments),
        (
            "llama-cpp-deepseek-r1",
            (
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                "\n```json\n",
                "\n```<｜tool▁call▁end｜>",
                "\n",
                "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
            ),
            JSONArguments,
        ),
        (
            "MiniMax-M2",
            (
                "<minimax:tool_call>\n",
                '<invoke name="',
                '">\n',
                "</invoke>\n",
                "",
                "</minimax:tool_call>",
            ),
            TaggedArguments,
        ),
        ("GLM-4.5", ("", "<tool_call>", "\n", "</tool_call>", "\n", ""), TaggedArguments),
        (
            "google-gemma-4-31B-it",
            ("", "<|tool_call>call:", "{", "}<tool_call|>", "", "<|tool_response>"),
            LiteralArguments,
        ),
        ("LFM2.5-8B-A1B", ("<|tool_call_start|>[", "", "(", ")", ", ", "]<|tool_call_end|>"), LiteralArguments),
    ],
)
def test_texts_around_calls(name: str, texts: tuple[str, ...], kind: type) -> None:
    format = load_template(name).tool_format
    assert outline(format) == texts
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
