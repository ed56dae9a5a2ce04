"""How often the counts of a regular expression repeat one part of it, which says what following it would take."""

import re
from collections.abc import Mapping

from server.errors import clip

MAX_COPIES = 10_000  # of one part; with a million, one mask takes ten seconds
MAX_COPIES_IN_RULES = 1_000_000  # where a rule repeats a terminal: a parser counts, and not a regular expression

# An escape, the beginning of a class, something in braces, or a character. Bounded, so that this is linear.
_TOKEN = re.compile(r"\\[pPxuU]\{[^}]{0,40}\}|\\.|\[\^?\]?|\{[\d\s,]{1,4000}\}|.", re.DOTALL)
# Of Lark's notation: a string, an escape, a comment, a regular expression, or space.
_LARK_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\\.|//[^\n]*|/(?:\\.|[^/\\])+/|\s+', re.DOTALL)
_LARK_COUNT = re.compile(r"~\s*(\d{1,4000})(?:\s*\.\.\s*(\d{1,4000}))?")
_TERMINAL = re.compile(r"\b[A-Z_][A-Z0-9_]*\b")
_DEFINITION = re.compile(r"^[ \t]*[?!]?([A-Za-z_]\w*)(?:\.-?\d+)?(?:\[[^\]\n]*\])?\s*:", re.MULTILINE)
_ENOUGH = 10**12  # more is not counted
_MAX_ROUNDS = 20  # far more than terminals are defined within each other, whatever their order


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
            last = min(last * max(1, *map(int, counts)), _ENOUGH)
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
    """The same of a grammar in Lark's notation: of its terminals, which are regular expressions out of others, and of
    what stands between slashes or quotes anywhere, for strings may be part of a JSON schema.
    """
    parts = [token.strip('/"') for token in _LARK_TOKEN.findall(grammar) if token[0] in '/"']
    text = _LARK_COUNT.sub(r"{\1,\2}", _LARK_TOKEN.sub(_as_copies, grammar))
    split = _DEFINITION.split(text)
    definitions = list(zip(split[1::2], split[2::2], strict=True))
    copies = _copies_in_terminals([(name, body) for name, body in definitions if _TERMINAL.fullmatch(name)])
    of_rules = [num_copies(_with_copies(body, copies)) for name, body in definitions if name not in copies]
    of_regexes = [*map(num_copies, parts), *copies.values()]
    if max(of_regexes, default=1) <= MAX_COPIES and max(of_rules, default=1) <= MAX_COPIES_IN_RULES:
        return None
    return f"it repeats a part of a regular expression more than {MAX_COPIES} times"


def _copies_in_terminals(terminals: list[tuple[str, str]]) -> dict[str, int]:
    """As `num_copies` by name, or as far as a few rounds come."""
    copies = {name: 1 for name, _ in terminals}
    for _ in range(_MAX_ROUNDS):
        before = dict(copies)
        for name, body in terminals:
            copies[name] = num_copies(_with_copies(body, copies))
        if copies == before or max(copies.values()) > MAX_COPIES:
            break
        terminals.reverse()
    return copies


def _with_copies(body: str, copies: Mapping[str, int]) -> str:
    """A definition with the terminals in it as something repeated as often as their own parts."""
    return _TERMINAL.sub(lambda found: _repeated(copies.get(found[0], 1)), body)


def _as_copies(token: re.Match[str]) -> str:
    """A part of a grammar as something repeated as often as its own parts; no comment, nor space before a count."""
    text, after = token[0], token.string[token.end() : token.end() + 1]
    if text.isspace():
        return "" if after in "{~*+?" else "\n" if "\n" in text else " "
    if text[0] == '"':
        return _repeated(1)
    return _repeated(num_copies(text[1:-1])) if text[0] == "/" and text[1] != "/" else ""


def _repeated(count: int) -> str:
    return f"#{{{count}}}"
