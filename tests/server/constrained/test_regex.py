r"""Regular expressions match what they match in Python with `re.ASCII`, wherever a request has them."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from engine.grammar.compiler import GrammarCompiler, GrammarError
from server.constrained.regex import ascii_classes
from server.text.tokenizer import Tokenizer
from tests.support.clients import CHAT, ask
from tests.support.examples import num_examples
from tests.support.grammars import grammar_of, json_schema, matches
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID

ARABIC_DIGIT, LETTER, NO_BREAK_SPACE, LONG_S = "\u0663", "é", "\u00a0", "\u017f"
CHARACTERS = "05aZ_-[]\\^ \t\n\v\f\r\x1c\x85.#" + ARABIC_DIGIT + LETTER + NO_BREAK_SPACE + LONG_S

CLASSES = st.sampled_from([rf"\{name}" for name in "dwsDWS"])
ESCAPED = st.sampled_from(["a", "5", "_", r"\-", r"\]", r"\[", r"\\", r"\^", r"\.", r"\t", r"\x41"])
RANGES = st.sampled_from(["a-f", "0-9", "!-/", r"\[-\]"])
SETS = st.builds(
    lambda sign, parts, hyphen: f"[{sign}{''.join(parts)}{hyphen}]",
    st.sampled_from(["", "^"]),
    st.lists(CLASSES | ESCAPED | RANGES, min_size=1, max_size=4),
    st.sampled_from(["", "-"]),
)
ATOMS = CLASSES | SETS | ESCAPED | st.sampled_from([".", "-"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("".join, st.lists(inner, max_size=3)),
        st.builds(lambda one, other: f"(?:{one}|{other})", inner, inner),
        st.builds(lambda part, count: f"({part}){count}", inner, st.sampled_from(["*", "+?", "{2}", "{0,2}"])),
    ),
    max_leaves=6,
)
TEXTS = st.lists(st.text(CHARACTERS, max_size=4), min_size=8, max_size=8)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.to_json(), [END_OF_TEXT_ID])


def accepts(compiler: GrammarCompiler, grammar: str, text: str) -> bool:
    try:
        matcher, token_ids = compiler.compile(grammar), [*text.encode()]
    except GrammarError:  # no text matches it, such as [^\d\D]
        return False
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@settings(max_examples=num_examples(150, 20_000), deadline=None)
@given(pattern=PATTERNS.filter(bool), texts=TEXTS)
def test_random_patterns(compiler: GrammarCompiler, pattern: str, texts: list[str]) -> None:
    grammar = LLMatcher.grammar_from_regex(ascii_classes(pattern))
    for text in texts:
        assert accepts(compiler, grammar, text) == bool(re.fullmatch(pattern, text, re.ASCII)), (pattern, text)


def test_hyphens_beside_classes(compiler: GrammarCompiler) -> None:
    """They are literals, as in ECMAScript without the flags `u` and `v`. In Python such a pattern is an error."""
    for pattern, same in ((r"[!-\d]", r"[!\-\d]"), (r"[\w-\d]", r"[\w\-\d]"), (r"[\d-x]", r"[\d\-x]")):
        grammar = LLMatcher.grammar_from_regex(ascii_classes(pattern))
        for character in map(chr, range(128)):
            assert accepts(compiler, grammar, character) == bool(re.fullmatch(same, character)), character


def test_escapes_of_other_kinds_are_kept() -> None:
    for pattern in (r"\\d", r"\x64", r"\p{Nd}", r"\.\-\]", r"a-z", "\\", r"[\]-d]"):
        assert ascii_classes(pattern) == pattern
    assert ascii_classes("\\\n\\d") == "\\\n[0-9]"


GOOD, BAD = "a_7 \u00e9", "\u00e9_7 \u00e9"
PATTERN = r"\w+[\s]\W"
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"pattern": f"^{PATTERN}$", "type": "string"}}}
NAMES = {"type": "object", "patternProperties": {f"^{PATTERN}$": {}}, "additionalProperties": False}
EVERYWHERE: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": PATTERN}}, "%s"),
    ({"response_format": json_schema(SCHEMA)}, '{"a":"%s"}'),
    ({"response_format": json_schema(NAMES)}, '{"%s":1}'),
    ({"response_format": json_schema({"propertyNames": {"pattern": f"^{PATTERN}$"}, "type": "object"})}, '{"%s":1}'),
    ({"response_format": {"type": "structural_tag", "format": {"type": "regex", "pattern": PATTERN}}}, "%s"),
]


@pytest.mark.parametrize(("fields", "answer"), EVERYWHERE)
def test_all_fields_with_patterns(server: RunningServer, fields: dict[str, Any], answer: str) -> None:
    grammar = grammar_of(server, CHAT, **fields)
    assert matches(server, grammar, answer % GOOD)
    assert not matches(server, grammar, answer % BAD)


def test_names_with_the_same_pattern_are_refused(server: RunningServer) -> None:
    """They are not merged, which would lose one of their schemas."""
    schema = {"type": "object", "patternProperties": {r"^\d$": {"type": "integer"}, "^[0-9]$": {"minimum": 3}}}
    response = ask(server.url, CHAT, response_format=json_schema(schema))
    assert "not disjoint" in check_error(response, 400)["message"]
