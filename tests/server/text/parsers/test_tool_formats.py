"""Answers in the formats of real chat templates: what a template writes of a message is parsed to the same message."""

import json
import random
import re
from typing import Any

import pytest

from server.text.parsers.answer_parser import AnswerFormat, AnswerParser
from server.text.parsers.tool_formats import split_text
from server.text.templates.chat_template import ChatTemplate
from server.text.templates.rendered_text import common_prefix
from server.text.templates.sandbox import ChatTemplateError
from tests.support.examples import num_examples
from tests.support.parsing import Answer, cut, read_answer
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


def decoded(answer: Answer) -> list[Call]:
    return [(name, json.loads(arguments)) for name, arguments in answer.calls]


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
        assert decoded(answer) == found, text
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
        assert (decoded(answer), answer.content.strip()) == ([call], ""), text


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
        assert decoded(answer) == calls, text


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
