"""How often the counts of a regular expression repeat one part of it, which says what following it would take."""

import re

from server.errors import clip

MAX_COPIES = 10_000  # of one part; with a million, one mask takes ten seconds

# An escape, the beginning of a class, something in braces, or a character. Bounded, so that this is linear.
_TOKEN = re.compile(r"\\[pPxuU]\{[^}]{0,40}\}|\\.|\[\^?\]?|\{[\d\s,]{1,4000}\}|.", re.DOTALL)
_LARK_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\\.|//[^\n]*|/(?:\\.|[^/\\])+/|\s+', re.DOTALL)
_LARK_COUNT = re.compile(r"~(\d{1,20})(?:\.\.(\d{1,20}))?")


def num_copies(pattern: str) -> int:
    """How many copies of one part the counts within each other make: 1,000 for `(a{10}b){2,100}`."""
    groups = [1]  # of each group that is open: the most of any part so far
    last = 1  # of what a count would repeat
    num_open_classes = 0
    for token in _TOKEN.findall(pattern):
        if token[0] == "[":
            num_open_classes += 1
            last = 1
        elif num_open_classes:
            num_open_classes -= token == "]"
        elif token == "(":
            groups.append(1)
        elif token == ")":
            last = groups.pop() if len(groups) > 1 else groups[0]
        elif token[0] == "{" and (counts := re.findall(r"\d+", token)):
            last *= max(1, *map(int, counts))
        elif token not in ("*", "+", "?"):
            last = 1
        groups[-1] = max(groups[-1], last)
    return max(groups)


def problem_of_regex(pattern: str) -> str | None:
    """What is wrong with its size."""
    if num_copies(pattern) <= MAX_COPIES:
        return None
    return f"the regular expression {clip(pattern, 40)!r} repeats a part of it more than {MAX_COPIES} times"


def problem_of_lark(grammar: str) -> str | None:
    """The same of a grammar in Lark's notation: of its expressions between slashes with the counts around them, and of
    its strings, for they may be part of a JSON schema.
    """
    strings = [token for token in _LARK_TOKEN.findall(grammar) if token[0] == '"']
    whole = _LARK_COUNT.sub(r"{\1,\2}", _LARK_TOKEN.sub(_as_regex, grammar))
    if all(num_copies(text) <= MAX_COPIES for text in (whole, *strings)):
        return None
    return f"it repeats a part of a regular expression more than {MAX_COPIES} times"


def _as_regex(token: re.Match[str]) -> str:
    """A part of a grammar, as part of one large expression: neither space nor comments, a string as one character."""
    text = token[0]
    if text[0] == '"':
        return '"'
    return f"({text[1:-1]})" if text[0] == "/" and text[1] != "/" else ""
