"""The formats of reasoning and content that are found by rendering chat templates."""

from server.text.parsers.reasoning_parser import ReasoningTags
from server.text.templates.reasoning_probe import ReasoningFormat
from tests.support.chat_templates import CHATML, chat_template
from tests.support.tool_templates import NAMES, load_template

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
    *(
        "Apertus-8B-Instruct",
        "CohereForAI-c4ai-command-r-plus-tool_use",
        "GigaChat3-10B-A1.8B",
        "GigaChat3.1-10B-A1.8B",
    ),
    *("LFM2-8B-A1B", "MiniMax-M1", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Phi-4-mini", "Qwen3-Coder"),
    *("fireworks-ai-llama-3-firefunction-v2", "ibm-granite-granite-4.0", "moonshotai-Kimi-K2"),
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
    body = CHATML.partition("{%- if add_generation_prompt")[0]
    assert chat_template(body + opens).reasoning_tags == THINK
    assert chat_template("{{ 'Reason in [THINK] and [/THINK].' }}" + CHATML).reasoning_tags == ReasoningTags(
        "[THINK]", "[/THINK]"
    )
    drops = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert chat_template(drops).reasoning_tags == THINK
    switch = "{% if add_generation_prompt and enable_thinking %}{{ '<think>' }}{% endif %}"
    assert chat_template(CHATML + switch).reasoning_tags == THINK
    assert chat_template(CHATML).reasoning == ReasoningFormat()


def test_reasoning_after_the_content_has_no_tags() -> None:
    template = "{% for m in messages %}{{ m.content }}[{{ m.reasoning_content }}]{% endfor %}"
    assert chat_template(template).reasoning == ReasoningFormat()


def test_a_switch_without_tags_is_not_recognized() -> None:
    assert load_template("Apertus-8B-Instruct").reasoning_format_name == "unrecognized"
    assert [name for name in NAMES if not load_template(name).reasoning.is_recognized] == ["Apertus-8B-Instruct"]
