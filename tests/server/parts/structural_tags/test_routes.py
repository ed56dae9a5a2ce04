"""Structural tags, in XGrammar's form and in the older one, become grammars for the engine, or are refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.clients import CHAT, COMPLETIONS, ask
from tests.support.grammars import COMPACT, SCHEMA, check_matches, grammar_of, nested
from tests.support.serving import RunningServer, check_error

Fields = dict[str, Any]


def parts(kind: str, *elements: Fields) -> Fields:
    return {"type": kind, "elements": list(elements)}


def text(value: str) -> Fields:
    return {"type": "const_string", "value": value}


def tag(begin: str, content: Fields, end: str | list[str]) -> Fields:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def triggered(**fields: Any) -> Fields:
    return {"type": "triggered_tags", "triggers": ["<f"], "tags": [F1, F2]} | fields


def separated(**fields: Any) -> Fields:
    return {"type": "tags_with_separator", "tags": [F1, F2], "separator": ", "} | fields


ANY = {"type": "any_text"}
NUMBER = {"type": "json_schema", "json_schema": {"type": "integer"}}
F1, F2 = tag("<f1>", NUMBER, "</f>"), tag("<f2>", ANY, "</f>")
GRAMMAR = {"type": "grammar", "grammar": 'root ::= "a" | "b" root'}

# A format, texts that match it, and texts that do not. XGrammar 0.2.8 agrees on all but the last.
FORMATS: list[tuple[Fields, list[str], list[str]]] = [
    (text('é😀 "\\/\n'), ['é😀 "\\/\n'], ["", "é"]),
    (parts("sequence", text("a"), NUMBER, text("b")), ["a1b", "a-20b"], ["a1", "ab", "1b"]),
    (parts("or", text("a"), text("ab"), NUMBER), ["a", "ab", "7"], ["", "a7", "b"]),
    (tag("<a>", ANY, "</a>"), ["<a></a>", "<a>q<a></a>"], ["<a>", "<a></a>x", "x<a></a>"]),
    (tag("<a>", ANY, ["</a>", "</b>"]), ["<a>q</a>", "<a></b>"], ["<a></a></b>"]),
    (parts("or", tag("<a>", NUMBER, ""), tag("<b>", ANY, "")), ["<a>1", "<b>1x"], ["<a>", "<a>x"]),
    (parts("sequence", tag("<t>", ANY, "</t>"), ANY), ["<t>a</t>", "<t></t>b</t>"], ["a", "<t>a"]),
    (ANY | {"excludes": ["ab", "x*"]}, ["", "a b x"], ["ab", "1x*2"]),
    ({"type": "regex", "pattern": "[a-c]+/\\d"}, ["a/1"], ["a/", "a1", "a/\u0663"]),
    (parts("sequence", text("<"), {"type": "regex", "pattern": "[a-c]+"}, text(">")), ["<abc>"], ["<>", "abc"]),
    (parts("sequence", text("<"), GRAMMAR, text(">")), ["<a>", "<bba>"], ["<b>", "ba"]),
    (triggered(), ["", "q", "q<f1>3</f>q<f2>q</f>", "<f2><f1></f>"], ["<f", "<f1>x</f>", "<f3>", "<f1>3</f><f"]),
    (triggered(stop_after_first=True), ["q", "q<f1>3</f>"], ["<f1>3</f>q", "<f1>3</f><f1>3</f>"]),
    (triggered(at_least_one=True), ["<f1>3</f>", "<f2></f>q<f1>3</f>q"], ["", "q", "q<f1>3</f>"]),
    (triggered(at_least_one=True, stop_after_first=True), ["<f1>3</f>"], ["", "<f1>3</f>q", "q<f1>3</f>"]),
    (triggered(excludes=["x"]), ["q<f2>x</f>q"], ["x", "<f1>3</f>x"]),
    (tag("<a>", triggered(), "</a>"), ["<a></a>", "<a>q<f1>3</f>q</a>"], ["<a><f1></a>", "<a>q"]),
    (separated(), ["", "<f1>3</f>", "<f1>3</f>, <f2></f>"], [" ", "<f1>3</f>, ", "<f1>3</f><f1>3</f>"]),
    (separated(at_least_one=True, stop_after_first=True), ["<f1>3</f>"], ["", "<f1>3</f>, <f1>3</f>"]),
    ({"type": "optional", "content": F2}, ["", "<f2>q</f>"], ["<f2>", "q"]),
    ({"type": "plus", "content": parts("or", text("a"), F1)}, ["a", "a<f1>1</f>a"], ["", "b"]),
    (parts("sequence", {"type": "star", "content": text("ab")}, text("x")), ["x", "ababx"], ["ab", "abaxx"]),
    (parts("sequence", F2, text("\n\n"), triggered()), ["<f2>Hm.</f>\n\nSo <f1>3</f>"], ["<f2>Hm.</f>So"]),
    (parts("sequence", ANY, F1), ["<f1>3</f>", "So <f1>3</f>"], ["", "So", "<f1><f1>3</f>"]),
]
# Markers with special tokens, as many models have for tool calls.
SPECIAL: list[tuple[Fields, list[str], list[str]]] = [
    (tag("<|im_start|>a\n", ANY, "<|im_end|>"), ["<|im_start|>a\nb<|im_end|>"], ["a\nb", "<|im_start|>b<|im_end|>"]),
    (tag("a<|im_start|>", ANY, "b<|im_end|>"), ["a<|im_start|>qb<|im_end|>"], ["a<|im_start|>q<|im_end|>"]),
    (
        triggered(triggers=["<|im_start|>"], tags=[tag("<|im_start|>f ", NUMBER, "<|im_end|>")]),
        ["q", "q<|im_start|>f 3<|im_end|>q"],
        ["<|im_start|>", "<|im_end|>", "<|im_start|>f 3q"],
    ),
]


# The older form: in free text, each trigger begins a structure.
STRUCTURE: dict[str, Any] = {"begin": "[1]", "schema": SCHEMA, "end": "<|im_end|>"}
TAG: dict[str, Any] = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=age>", "schema": {"type": "integer", "maximum": 99, "minimum": 0}, "end": "</f>"},
        {"begin": "<f=name>", "schema": {"enum": ["Jo", "Al"]}, "end": ""},
        STRUCTURE,
    ],
    "triggers": ["<f=", "[1]"],
}
FREE = ["", "No <f> in\n[it] at all.", 'Old: <f=age>7</f>, <f=name>"Jo"!', f"[1]{COMPACT}<|im_end|><f=age>12</f>"]
TAGS = [({"type": "structural_tag", "format": format}, good, bad) for format, good, bad in FORMATS + SPECIAL]


@pytest.mark.parametrize(
    ("constraint", "good", "bad"), [*TAGS, (TAG, FREE, ["<f=age>7", "<f=age>100</f>", "<f=size>", "a[1]{}"])]
)
def test_formats(server: RunningServer, constraint: Fields, good: list[str], bad: list[str]) -> None:
    grammar = grammar_of(server, CHAT, response_format=constraint)
    for other in ({"structural_tag": constraint}, {"structural_tag": json.dumps(constraint)}):
        assert grammar_of(server, COMPLETIONS, structured_outputs=other) == grammar
    check_matches(server, grammar, good, bad)


REFUSED: list[tuple[Fields, str, str]] = [
    (parts("sequence", ANY, NUMBER), "elements[0]", "any text must be followed by a literal text, which ends it"),
    ({"type": "star", "content": ANY}, "content", "any text must be followed by a literal text, which ends it"),
    (triggered(triggers=["<g"]), "tags[0].begin", "expected text that begins with one of the triggers"),
    (triggered(triggers=["<f", "<f1"]), "triggers[1]", "no tag begins with it, or all of them begin with an earlier"),
    (tag("<a>", {"type": "json_schema", "json_schema": {"not": {}}}, ""), "", "Unimplemented keys"),
    (parts("sequence", {"type": "json_schema", "json_schema": nested(70)}), "", "nested more than 64 levels deep"),
    (GRAMMAR | {"grammar": "a ::="}, "", ""),
    ({"type": "regex", "pattern": "a("}, "", "unclosed group"),
    (parts("sequence"), "format.elements", "empty array"),
    ({"type": "token", "token": 5}, "", ""),
    (NUMBER | {"style": "qwen_xml"}, "format.style", "json"),
    (ANY | {"more": 1}, "format.more", ""),
]


@pytest.mark.parametrize(("format", "path", "problem"), REFUSED)
def test_formats_that_cannot_be_followed(server: RunningServer, format: Fields, path: str, problem: str) -> None:
    constraint = {"type": "structural_tag", "format": format}
    error = check_error(ask(server.url, CHAT, response_format=constraint), 400)
    assert error["param"].startswith("response_format")
    assert error["param"].endswith(path)
    assert problem in error["message"]


def test_a_tree_that_is_too_large(server: RunningServer) -> None:
    """The grammar of each part would list all the parts that may follow it. Errors in a text name the part, too."""
    rows = [parts("sequence", *[{"type": "optional", "content": text("a")}] * 128) for _ in range(10)]
    constraint = {"type": "structural_tag", "format": parts("sequence", *rows)}
    for fields in ({"response_format": constraint}, {"structured_outputs": {"structural_tag": json.dumps(constraint)}}):
        error = check_error(ask(server.url, CHAT, **fields), 400)
        assert error["message"].endswith("expected at most 512 parts.")
    constraint = {"type": "structural_tag", "format": parts("sequence", NUMBER, text("a"), {"type": "regex"})}
    fields = {"structured_outputs": {"structural_tag": json.dumps(constraint)}}
    error = check_error(ask(server.url, COMPLETIONS, **fields), 400)
    assert error["param"] == "structured_outputs.structural_tag.format.elements[2].pattern"


EMPTY = text("")


def nested_in(depth: int, wrap: Callable[[Fields], Fields], format: Fields = NUMBER) -> Fields:
    for _ in range(depth):
        format = wrap(format)
    return format


@pytest.mark.parametrize(
    "format",
    [
        parts("sequence", *[parts("or", EMPTY, EMPTY)] * 60, NUMBER),
        nested_in(20, lambda inner: tag("<a>", inner, ["", ""])),
        nested_in(15, lambda inner: triggered(tags=[tag("<f>", inner, "</f>")], at_least_one=True)),
        parts("sequence", *[parts("sequence", *[{"type": "optional", "content": text("a")}] * 100)] * 3),
    ],
    ids=["alternatives", "ends", "triggers", "optional parts"],
)
def test_formats_with_exponentially_many_alternatives(server: RunningServer, format: Fields) -> None:
    """What makes grammars has a limit of its own on its time; the server does not answer 500."""
    fields = {"response_format": {"type": "structural_tag", "format": format}}
    assert ask(server.url, CHAT, max_tokens=1, **fields).status_code in (200, 400)


def test_a_tree_that_is_too_deep(server: RunningServer) -> None:
    for depth in (70, 300, 900):
        nested_text = '{"type":"optional","content":' * depth + json.dumps(NUMBER) + "}" * depth
        text = f'{{"type":"structural_tag","format":{nested_text}}}'
        for fields in (
            {"structured_outputs": {"structural_tag": text}},
            {"response_format": json.loads(text) if depth == 70 else text},
        ):
            assert check_error(ask(server.url, CHAT, **fields), 400)["param"].startswith(next(iter(fields)))


WRONG_SHAPES: list[tuple[Any, str]] = [
    (TAG | {"triggers": ["[1]"]}, ".structures[0].begin"),
    (TAG | {"triggers": ["<f=", "[1]", "<f=age"]}, ".triggers[2]"),
    (TAG | {"triggers": []}, ".triggers"),
    (TAG | {"triggers": None}, ".triggers"),
    (TAG | {"structures": [STRUCTURE | {"schema": nested(70)}]}, ".structures[0].schema"),
    (TAG | {"structures": [STRUCTURE | {"schema": {"not": {}}}], "triggers": ["["]}, ""),
    (TAG | {"type": "json_object"}, ".structures"),
    (TAG | {"structures": None}, ".structures"),
    (TAG | {"structures": None, "triggers": None}, ".format"),
    (TAG | {"format": {"type": "any_text"}}, ".structures"),
    (TAG | {"type": "text", "format": {"type": "any_text"}}, ".format"),
]


@pytest.mark.parametrize(("constraint", "param"), WRONG_SHAPES)
def test_wrong_shapes(server: RunningServer, constraint: Any, param: str) -> None:
    for path in (CHAT, COMPLETIONS):
        error = check_error(ask(server.url, path, response_format=constraint), 400)
        assert error["param"] == f"response_format{param}"
    error = check_error(ask(server.url, COMPLETIONS, structured_outputs={"structural_tag": "{}"}), 400)
    assert (error["param"], error["code"]) == ("structured_outputs.structural_tag.type", "missing_required_parameter")
