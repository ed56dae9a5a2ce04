"""Formats of real chat templates are found by rendering; what a template writes is parsed to the same message."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from server.constrained.tool_grammar import tool_grammar
from server.http.errors import InvalidValueError
from server.parts.tool_formats.harmony import HARMONY_FORMAT
from server.parts.tool_formats.tags import TaggedArguments
from server.schemas.tools import Tool
from server.text.parsers.answer_parser import AnswerFormat, AnswerParser, ReasoningTags
from server.text.parsers.tool_formats import GENERIC, split_text
from server.text.templates.chat_template import UNRECOGNIZED, ChatTemplate
from server.text.templates.reasoning_probe import ReasoningFormat
from server.text.templates.sandbox import ChatTemplateError, SandboxedTemplate
from server.text.templates.syntaxes import tool_syntaxes
from server.text.templates.tool_probe import common_prefix, common_suffix
from server.text.tokenizer import Tokenizer
from tests.server.constrained.test_tool_grammar import tools_of, validated
from tests.support.chat_templates import CHATML, chat_template
from tests.support.examples import IS_LONG, num_examples
from tests.support.grammars import allows, compiler_of
from tests.support.parsing import Answer, cut, read_answer
from tests.support.paths import ROOT
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID, write_tiny_model
from tests.support.tool_templates import EOS, KINDS, NAMES, SCHEMAS, TOOLS, WITH_CALLS, kinds_first, load_template

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


@kinds_first(WITH_CALLS)
def test_names_of_parameters_may_have_other_characters(name: str) -> None:
    """But quotes, brackets and what formats write after a name."""
    template, names = load_template(name), ("my city", "a.b", "ünï 城", "1st", "a/b", "@type", "$ref", "a\\b", "a|b")
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
    "gemma4": "google-gemma-4-31B-it",
    "generic": "HuggingFaceTB-SmolLM3-3B deepseek-ai-DeepSeek-R1-Distill-Llama-8B "
    "fireworks-ai-llama-3-firefunction-v2 llama-cpp-rwkv-world",
    "gigachat": "GigaChat3-10B-A1.8B GigaChat3.1-10B-A1.8B",
    "glm": "poolside-Laguna-S-2.1 poolside-Laguna-XS-2.1 poolside-Laguna-XS.2",
    "granite": "ibm-granite-granite-3.3-2B-Instruct",
    "hermes": "NousResearch-Hermes-3-Llama-3.1-8B-tool_use Qwen-Qwen3-0.6B ibm-granite-granite-4.0",
    "json": "unknown-json",
    "kimi_k2": "moonshotai-Kimi-K2",
    "lfm2": "LFM2-8B-A1B LFM2.5-8B-A1B",
    "llama3": "meta-llama-Llama-3.1-8B-Instruct meta-llama-Llama-3.2-3B-Instruct",
    "minimax_m2": "MiniMax-M2",
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
    assert fields["Qwen-Qwen3-0.6B"] == "reasoning_content"
    assert fields["moonshotai-Kimi-K2"] is None


def test_texts_around_content() -> None:
    markers = {name: load_template(name).reasoning.content_markers for name in NAMES}
    assert {name: texts for name, texts in markers.items() if texts} == {
        "Cohere2MoE": ("<|START_TEXT|>", "<|END_TEXT|>"),
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
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
    names = {GENERIC.name, HARMONY_FORMAT.name, UNRECOGNIZED}
    for syntax in tool_syntaxes():
        names |= {syntax.name, *(name for _, name, _ in syntax.families), *(each.name for _, each in syntax.announced)}
    assert documented == names


# The parser reads what grammars allow. Answers are sampled at random from the tokens that the masks allow.


TOKEN = re.compile(r"<[^<>\s=\"]+>|\[[A-Z_]+\]|\]<\]minimax\[>\[")
POSITION = {"type": "object", "properties": {"x": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["x"]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]?$"},
        "note": {"type": "string", "minLength": 2, "maxLength": 4},
        "days": {"type": "integer", "minimum": 0, "maximum": 14},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "maybe": {"type": ["string", "null"]},
        "either": {"anyOf": [{"type": "integer"}, {"type": "boolean"}]},
        "list": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
        "options": {
            "type": "object",
            "properties": {"k": {"type": "string", "maxLength": 3}, "inner": {"$ref": "#/$defs/position"}},
            "required": ["k"],
        },
        "position": {"$ref": "#/$defs/position"},
        "one": {"const": "x"},
        "level": {"enum": [1, 2, 3]},
    },
    "required": ["days", "note"],
    "$defs": {"position": POSITION},
}
ALL: dict[str, dict[str, Any]] = {"get_weather": SCHEMA, "time-now": {"type": "object", "properties": {}}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


# In `make test-long` one template for each format that there is.
DISTINCT = list({repr(load_template(name).tool_format): name for name in NAMES}.values()) if IS_LONG else [*KINDS]


def sample(tokenizer: Tokenizer, matcher: LLMatcher, rng: random.Random, ends: Sequence[str]) -> str:
    """Return a random output. Texts that end values, `ends`, are tried often, so that strings end."""
    tried = [tokenizer.encode(text, add_special_tokens=False) for text in ends]
    token_ids: list[int] = []
    while not matcher.is_stopped():
        assert len(token_ids) < 5000
        end = rng.choice(tried)
        if rng.random() < 0.3 and len(end) == matcher.validate_tokens(end):
            assert matcher.consume_tokens(end)
            token_ids += end
            continue
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token_id for token_id in range(tokenizer.vocab_size) if mask >> token_id & 1]
        closing = [each for each in allowed if each > END_OF_TEXT_ID or each in (*b'"<\n',)]
        token_id = rng.choice(closing if closing and rng.random() < len(token_ids) / 200 else allowed)
        token_id = END_OF_TEXT_ID if END_OF_TEXT_ID in allowed and rng.random() < 0.5 else token_id
        assert matcher.consume_token(token_id)
        token_ids.append(token_id)
    assert not matcher.is_error(), matcher.get_error()
    return tokenizer.decode([each for each in token_ids if each != END_OF_TEXT_ID], skip_special_tokens=False)


class Model:
    """A vocabulary of bytes in which the tags of a format may be special tokens."""

    def __init__(self, name: str, folder: Path, *, special: bool = True) -> None:
        template = load_template(name)
        self.tool_format, self.content_markers = template.tool_format, template.reasoning.content_markers
        self.format = self.new_format()
        tags = sorted(set(TOKEN.findall("\n".join(self.format.markers)))) if special else []
        self.tokenizer = Tokenizer.from_model(write_tiny_model(folder, *tags))
        self.special_ids = self.tokenizer.special_ids_in(self.format.markers)
        syntax = template.tool_format.arguments
        value_end = syntax.after_value if isinstance(syntax, TaggedArguments) else ""
        self.ends = ['"', *([value_end, value_end.strip()] if value_end else syntax.texts)]

    def new_format(self, schemas: dict[str, Any] = ALL, parallel: bool = True) -> AnswerFormat:
        return AnswerFormat(self.tool_format, schemas, parallel, content_markers=self.content_markers)

    def grammar(self, tools: list[Tool], choice: Any, *, parallel: bool = True) -> str:
        format = self.new_format(parallel=parallel)
        grammar = tool_grammar(format, tools, validated(choice), special_ids=self.special_ids)
        assert grammar is not None
        return grammar

    def accepts(self, grammar: str, text: str) -> bool:
        return allows(self.tokenizer, grammar, text)

    def samples(self, grammar: str, rng: random.Random, num: int = 1) -> Iterator[str]:
        for _ in range(num):
            yield sample(self.tokenizer, compiler_of(self.tokenizer).compile(grammar), rng, self.ends)

    def parse(self, text: str, schemas: dict[str, Any] = ALL, *, parallel: bool = True) -> Answer:
        parser = AnswerParser(self.new_format(schemas, parallel), hidden=(*self.content_markers, *self.special_ids))
        answer = read_answer(parser, [text])
        answer.is_complete = parser.ends_with_calls
        return answer


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@kinds_first(DISTINCT)
def test_the_parser_reads_what_the_grammar_allows(name: str, special: bool, tmp_path: Path, rng: random.Random) -> None:
    model = Model(name, tmp_path, special=special)
    for choice, parallel in [("required", True), ("required", False), (NAMED, True)]:
        grammar = model.grammar(tools_of(ALL), choice, parallel=parallel)
        for text in model.samples(grammar, rng, num_examples(1, 20)):
            answer = model.parse(text, parallel=parallel)
            assert (answer.content, answer.is_complete) == ("", True), text
            for tool, arguments in answer.decoded:
                jsonschema.validate(arguments, ALL[tool])
            assert len(answer.calls) == 1 or (parallel and choice == "required"), text


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@kinds_first(DISTINCT)
def test_strict_calls_are_optional(name: str, special: bool, tmp_path: Path, rng: random.Random) -> None:
    """Free text is allowed, and calls in it follow their schemas, however they begin."""
    model = Model(name, tmp_path, special=special)
    (call,) = model.samples(model.grammar(tools_of(ALL), NAMED), rng)
    grammar = model.grammar(tools_of(ALL, strict=ALL), None)
    assert all(model.accepts(grammar, text) for text in ("", "Hello, world!\n", "a < b", call))
    assert not model.accepts(grammar, call.replace("get_weather", "get_whatever"))
    for text in model.samples(grammar, rng, num_examples(2, 20)):
        for tool, arguments in model.parse(text).decoded:
            jsonschema.validate(arguments, ALL[tool])


def test_content_after_a_marker_that_begins_as_calls_do(tmp_path: Path, rng: random.Random) -> None:
    """Muse addresses content `to=user` and calls `to=get_weather`."""
    model = Model("muse-glimmer", tmp_path)
    (call,) = model.samples(model.grammar(tools_of(ALL), NAMED), rng)
    call = call.removeprefix("to=user<|message|>")
    grammar = model.grammar(tools_of(ALL, strict=ALL), None)
    for text in ("", "Hi", call, f"Hi {call}"):
        assert model.accepts(grammar, text)
        assert model.accepts(grammar, f"to=user<|message|>{text}")
    assert not model.accepts(grammar, "to=else<|message|>Hi")


@kinds_first(DISTINCT)
def test_arguments_of_tools_that_are_not_strict_are_free(name: str, tmp_path: Path, rng: random.Random) -> None:
    model = Model(name, tmp_path)
    tools = tools_of(ALL, strict=["time-now"])
    for text in model.samples(model.grammar(tools, None), rng, num_examples(2, 20)):
        assert all(isinstance(arguments, dict) for _, arguments in model.parse(text).decoded), text


MORE: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "additionalProperties": {"type": "boolean"},
}
EITHER: dict[str, Any] = {
    "anyOf": [
        {"properties": {"kind": {"const": "a"}, "n": {"type": "integer"}}, "required": ["kind", "n"]},
        {"properties": {"kind": {"const": "b"}}, "required": ["kind"]},
    ]
}
CLOSED = {"type": "object", "required": ["n"], "additionalProperties": False}
WHOLE_TREE: dict[str, Any] = CLOSED | {
    "properties": {"n": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#"}}}
}
CIRCLE: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/a"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {
        "a": CLOSED | {"properties": {"n": {"type": "integer"}, "b": {"$ref": "#/$defs/b"}}},
        "b": CLOSED | {"properties": {"n": {"type": "integer"}, "a": {"$ref": "#/properties/a"}}},
        "unused": {"const": "x" * 100_000},
    },
}


@pytest.mark.parametrize("name", ["Qwen3-Coder", "google-gemma-4-31B-it"])
@pytest.mark.parametrize("schema", [MORE, EITHER, WHOLE_TREE, CIRCLE], ids=["more", "either", "whole", "circle"])
def test_other_schemas(name: str, schema: dict[str, Any], tmp_path: Path, rng: random.Random) -> None:
    model = Model(name, tmp_path)
    grammar = model.grammar(tools_of({"get_weather": schema}), "required", parallel=False)
    for text in model.samples(grammar, rng, num_examples(3, 30)):
        ((_, arguments),) = model.parse(text, {"get_weather": schema}).decoded
        jsonschema.validate(arguments, schema)


def test_values_are_written_as_the_model_does(tmp_path: Path) -> None:
    model = Model("Qwen3-Coder", tmp_path)
    grammar = model.grammar(tools_of({"get_weather": SCHEMA}), "required")

    def call(**values: str) -> str:
        values = {"note": "ab", "days": "3"} | values
        names = [each for each in SCHEMA["properties"] if each in values]
        arguments = "".join(f"<parameter={each}>\n{values[each]}\n</parameter>\n" for each in names)
        return f"<tool_call>\n<function=get_weather>\n{arguments}</function>\n</tool_call>"

    for allowed in ({}, {"city": 'a "b"\n<c>'}, {"city": ""}, {"code": "CH1"}, {"maybe": "null"}, {"list": "[1, 2]"}):
        assert model.accepts(grammar, call(**allowed)), allowed
    refused = [("days", "x"), ("days", "15"), ("note", "a"), ("note", "abcde"), ("code", "ch"), ("unit", "kelvin")]
    refused += [("list", "[1, 2, 3]"), ("flag", "yes"), ("one", "y"), ("level", "4"), ("position", "{}")]
    for name, value in refused:
        assert not model.accepts(grammar, call(**{name: value})), (name, value)


UNSUPPORTED = [
    ({"type": "object", "patternProperties": {"^a": {}}}, "'patternProperties' is not supported"),
    ({"type": "object", "properties": {"a<b": {"type": "string"}}}, "the name 'a<b' is not supported"),
    ({"type": "object", "properties": {"a": {"enum": ["\n</parameter>"]}}}, "none of the values of 'enum'"),
    ({"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False}, "property 'a' is not"),
]


@pytest.mark.parametrize(("schema", "message"), UNSUPPORTED)
def test_schemas_that_no_call_can_follow(schema: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = Model("Qwen3-Coder", tmp_path, special=False)
    with pytest.raises(InvalidValueError, match=message) as error:
        model.grammar(tools_of({"time-now": ALL["time-now"], "get_weather": schema}), "required")
    assert error.value.param == "tools[1].function.parameters"


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
