"""Regular expressions of requests, in the form in which llguidance reads them: that of Rust's regex crate."""

import re

import msgspec
from llguidance import LLMatcher

# Rust's classes cover all of Unicode. Those of JSON Schema's dialect, ECMAScript's, are ASCII. A class in brackets may
# stand within brackets too, so that these need not be told apart.
_ASCII_CLASSES = {"d": "[0-9]", "w": "[0-9A-Za-z_]", "s": r"[\x09-\x0D\x20]"}
_CLASSES = _ASCII_CLASSES | {name.upper(): f"[^{text[1:]}" for name, text in _ASCII_CLASSES.items()}


def ascii_classes(pattern: str) -> str:
    r"""Return the pattern with `\d`, `\w`, `\s` and their complements in ASCII, as in Python with `re.ASCII`."""
    # A hyphen before a class within brackets is a literal, not a range that ends with a bracket.
    return re.sub(
        r"\\(.)|-(?=\\[dwsDWS])", lambda found: _CLASSES.get(found[1], _escaped(found[0])), pattern, flags=re.S
    )


def regex_grammar(pattern: str) -> str:
    """Return the grammar of the texts that match a pattern as a whole."""
    return LLMatcher.grammar_from_regex(ascii_classes(pattern))


def lark_regex(pattern: str) -> str:
    """Return a regular expression in Lark's notation."""
    grammar = msgspec.json.decode(regex_grammar(pattern))
    lark: str = grammar["grammars"][0]["lark_grammar"]
    return lark.removeprefix("start: ")


def escape_regex(text: str) -> str:
    """Return a regular expression that matches the text alone, also between slashes."""
    return re.sub(r"\W", lambda found: f"\\x{{{ord(found[0]):x}}}", text)


def _escaped(text: str) -> str:
    return r"\-" if text == "-" else text
