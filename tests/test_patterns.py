"""Regular expressions of both packages: none takes more than linear time, whatever text it is matched with.

A pattern becomes an automaton with one state for each character class. Backtracking is more than linear only if the
automaton has two ways to read the same text: around one loop (exponential), or from one loop into another (at least
quadratic); see Weideman et al., "Analyzing Matching Time Behavior of Backtracking Regular Expression Matchers". A
search is a loop over any text before the pattern. A repetition with a high bound, or within another, counts as one
without a bound: what it costs grows with the bound as it does with the text.
"""

import ast
import importlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any, NamedTuple

import networkx as nx

from engine.config.families import FAMILIES
from engine.parts.distributed.plan import PLAN
from engine.parts.quantized.formats import _LAYOUTS
from server.parts.tool_formats.syntaxes import _VALUES
from server.text.parsers.object_reader import _NAME, _OTHER_MEMBERS
from server.text.templates.chat_encoding import _trie_pattern
from tests.support.paths import ROOT

PACKAGES = ("engine", "server")
SETTING_TYPES = ("pattern",)  # of settings whose second argument is matched as a whole

# Patterns that the code makes while it runs, by module and by the name or the source of the pattern: what they can be.
MADE: Mapping[tuple[str, str], Sequence[str]] = {
    ("engine.parts.distributed.plan", "pattern"): [pattern for pattern, _ in PLAN],
    ("engine.parts.lora.checkpoint", "pattern"): [
        pattern for family in FAMILIES for layout in (family.layout, family.gguf_layout) for pattern, _ in layout.names
    ],
    ("engine.weights.layout", "pattern"): (),  # those of the entry above
    ("engine.parts.quantized.formats", "_LAYOUTS[quantization.method][0]"): [row[0] for row in _LAYOUTS.values()],
    ("server.text.parsers.markers", 'f"({tokens})"'): [r"(<\|end\|>|a\+)"],
    ("server.parts.hub.names", 'rf"(?:^|[-.]){re.escape(tag.lower())}$"'): [r"(?:^|[-.])a\-a$"],
    ("server.settings.setting", "regex"): (),  # found by SETTING_TYPES
    ("server.text.parsers.markers", "_pattern"): [r"<\|end\|>|<\|", "(?!)"],
    ("server.text.parsers.object_reader", "_header"): [
        rf'\{{\s*{_OTHER_MEMBERS}"(?:name|tool)"\s*:\s*"({_NAME})"\s*,\s*"(?:arguments)"\s*:\s*\{{'
    ],
    ("server.text.parsers.object_reader", "_arguments_first"): [
        rf'\{{\s*{_OTHER_MEMBERS}"(?:arguments|parameters)"\s*:\s*\{{'
    ],
    ("server.text.choice_text", "_first_char"): [r"[a\]\-]"],
    ("server.text.templates.chat_encoding", '_trie_pattern(tokens) if tokens else "(?!)"'): [
        _trie_pattern(("<|end|>", "<|endoftext|>", "aab", "aaa", "aa"))
    ],
    ("server.text.templates.chat_encoding", "_any_guard"): ["[ab]"],
    ("server.parts.tool_formats.syntaxes", "re.escape(key + found.after_key) + _VALUES[kind]"): [*_VALUES.values()],
    ("server.text.templates.tool_probe", "pattern[0]"): [r"(?<!\w)0(?!\w)"],
    ("server.text.templates.tool_probe", "pattern[1]"): [r"(?<!\w)1(?!\w)"],
}


class Found(NamedTuple):
    """A regular expression in the source."""

    module: str
    name: str  # of the pattern, or its source if it has none
    line: int
    source: str
    flags: str
    modes: frozenset[str]  # the functions of `re` that match it

    def problems(self) -> Iterator[str]:
        """Yield why it may be slow. Raises NameError for a pattern that is made while the code runs."""
        names = vars(importlib.import_module(self.module))
        key = self.module, self.name
        patterns = MADE[key] if key in MADE else [eval(f"({self.source})", names)]
        for pattern, mode in product(patterns, self.modes):
            for why in why_not_linear(pattern, eval(self.flags, names), mode=mode):
                yield f"{self.module}:{self.line}: {mode} of {pattern!r}: {why}"


def find_patterns() -> list[Found]:
    """Return the patterns that both packages pass to functions of `re` and to the types of settings."""
    texts = {path: path.read_text() for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
    texts = {path: text for path, text in texts.items() if re.search(r"\bre\.|\bpattern\(", text)}
    nodes = {path: list(ast.walk(ast.parse(text))) for path, text in texts.items()}
    uses: dict[str, set[str]] = defaultdict(set)  # of compiled patterns, by name
    for node in chain.from_iterable(nodes.values()):
        if isinstance(node, ast.Attribute) and node.attr in MODES:
            uses[_name(node.value)].add(node.attr)
    found = []
    for path, text in texts.items():
        assigned = {node.value: _name(node.targets[0]) for node in nodes[path] if isinstance(node, ast.Assign)}
        for node in nodes[path]:
            if isinstance(node, ast.Call) and (argument := _pattern_argument(node)) is not None:
                source = ast.get_source_segment(text, argument) or ""
                function = _name(node.func)
                name = assigned.get(node, source) if function == "compile" else source
                modes = (uses.get(name) or MODES) if function == "compile" else {function} & MODES or {"fullmatch"}
                modes = {"search" if mode in SEARCHES else mode for mode in modes}
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.append(Found(module, name, node.lineno, source, _flags(node), frozenset(modes)))
    return found


def _name(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def _pattern_argument(call: ast.Call) -> ast.expr | None:
    function = _name(call.func)
    if isinstance(call.func, ast.Attribute):
        is_re = _name(call.func.value) == "re" and function in MODES | {"compile"}
        return call.args[0] if is_re else None
    return call.args[1] if function in SETTING_TYPES else None


def _flags(call: ast.Call) -> str:
    arguments = [ast.unparse(each) for each in (*call.args, *(keyword.value for keyword in call.keywords))]
    return "|".join(["0", *(each for each in arguments if re.fullmatch(r"re\.[A-Z]+( \| re\.[A-Z]+)*", each))])


def test_patterns_take_linear_time() -> None:
    found = find_patterns()
    keys = {(each.module, each.name) for each in found}
    assert len(found) > 100
    assert [key for key in MADE if key not in keys] == []
    assert list(chain.from_iterable(each.problems() for each in found)) == []


def test_pydantic_matches_patterns_in_linear_time() -> None:
    """Its default engine, in Rust, does not backtrack."""
    texts = (path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    assert not any("regex_engine" in text or "from re import" in text for text in texts)


def test_slow_patterns_are_found() -> None:
    """One of each kind: a loop within a loop, two ways around a loop, one loop after another, a search."""
    for pattern in ("(a+)+b", "(aa|aaa)*b", "a*a*b", r"\s+$", r"(.)\1"):
        assert why_not_linear(pattern) != [], pattern
    assert why_not_linear(r"-?(\d+(\.\d+)?(ns|us|ms|s|m|h))+", mode="fullmatch") == []


# Whether `re` matches a pattern in a time that grows linearly with the text.

op: Any = importlib.import_module("re._constants")
parser: Any = importlib.import_module("re._parser")
compiler: Any = importlib.import_module("re._compiler")

SEARCHES = frozenset(("search", "findall", "finditer", "sub", "subn", "split"))
MODES = SEARCHES | {"match", "fullmatch"}
ALPHABET = "\0\t\n\r 0a_AZz~\x7f\x85\xa0\xb5\xe9\u0663\u03bc\u2028\u4e00\U0010ffff"
CLASSES = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)
MAX_CONSTANT = 16  # repetitions of one character class outside all others that cost no more than a constant

States = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a pattern."""

    first: frozenset[int] = frozenset()  # states by which it begins
    last: frozenset[int] = frozenset()  # states by which it ends
    safe: frozenset[int] = frozenset()  # those after which it ends whatever follows
    is_nullable: bool = True  # it can match nothing
    is_sure: bool = True  # it can match nothing whatever surrounds it


@dataclass(slots=True)
class Automaton:
    """What a pattern reads. Each state reads one character; edges are counted, as each is a way of its own."""

    settings: Any  # the state of `re`'s parser, which has the flags
    sample: str  # the characters that stand for all others
    chars: list[frozenset[str]] = field(default_factory=list)  # that a state reads
    edges: Counter[tuple[int, int]] = field(default_factory=Counter)
    possessive: set[int] = field(default_factory=set)  # states that read all they can, and give none back
    problems: list[str] = field(default_factory=list)
    num_open: int = 0  # repetitions around what is added

    def state(self, chars: Iterable[str]) -> Part:
        self.chars.append(frozenset(chars))
        states = frozenset((len(self.chars) - 1,))
        return Part(states, states, states, False, False)

    def connect(self, before: Part, after: Part) -> None:
        for start, end in product(before.last, after.first):
            if start not in self.possessive or self.chars[end] - self.chars[start]:
                self.edges[start, end] += 1

    def sequence(self, items: Iterable[tuple[Any, Any]]) -> Part:
        whole = Part()
        for name, value in items:
            part = self.part(name, value)
            self.connect(whole, part)
            whole = Part(
                whole.first | part.first if whole.is_nullable else whole.first,
                whole.last | part.last if part.is_nullable else part.last,
                whole.safe | part.safe if part.is_sure else part.safe,
                whole.is_nullable and part.is_nullable,
                whole.is_sure and part.is_sure,
            )
        return whole

    def part(self, name: Any, value: Any) -> Part:
        """Add a node of the parse tree of `re`."""
        if name in REPEATS:
            return self.repeat(*value, is_possessive=name is op.POSSESSIVE_REPEAT)
        if name is op.SUBPATTERN:
            return self.sequence(value[3])
        if name is op.ATOMIC_GROUP:
            return self.sequence(value)
        if name is op.BRANCH:
            return self.branch([self.sequence(branch) for branch in value[1]])
        if name in CLASSES:
            reads = compiler.compile(parser.SubPattern(self.settings, [(name, value)])).fullmatch
            return self.state(filter(reads, self.sample))
        if name in (op.ASSERT, op.ASSERT_NOT) and value[0] > 0:  # it reads ahead, then the rest reads the same text
            ahead = self.sequence(value[1])
            return Part(ahead.first, ahead.last, is_sure=False)
        if name not in (op.AT, op.ASSERT, op.ASSERT_NOT):  # looking back has a fixed length
            self.problems.append(f"{name} is not understood")
        return Part(is_sure=False)

    def branch(self, parts: Sequence[Part]) -> Part:
        if self.num_open and sum(part.is_nullable for part in parts) > 1:
            self.problems.append("a repetition of what may be empty in several ways")
        return Part(
            frozenset().union(*(part.first for part in parts)),
            frozenset().union(*(part.last for part in parts)),
            frozenset().union(*(part.safe for part in parts)),
            any(part.is_nullable for part in parts),
            any(part.is_sure for part in parts),
        )

    def repeat(self, low: int, high: Any, body: Any, *, is_possessive: bool) -> Part:
        self.num_open += high != 1
        part = self.sequence(body)
        self.num_open -= high != 1
        is_class = len(body) == 1 and body[0][0] in CLASSES
        if high != 1 and not (is_class and high <= MAX_CONSTANT and self.num_open == 0):
            self.connect(part, part)
        if part.is_nullable and (high != 1 or (low == 0 and self.num_open)):
            self.problems.append("a repetition of what may be empty")
        if is_possessive and is_class:
            self.possessive |= part.first
        safe = part.safe if low <= 1 else frozenset[int]()  # not before the last of several
        return Part(part.first, part.last, safe, low == 0 or part.is_nullable, low == 0 or part.is_sure)


def why_not_linear(pattern: str | bytes, flags: int = 0, *, mode: str = "search") -> list[str]:
    """Return why a pattern may take more than linear time; nothing: it cannot. `mode`: the function of `re`."""
    if isinstance(pattern, bytes):
        pattern, flags = pattern.decode("latin-1"), flags | re.ASCII
    tree = parser.parse(pattern, flags)
    automaton = Automaton(tree.state, _sample(tree))
    whole = automaton.sequence(tree)
    if mode in SEARCHES:
        _search(automaton, tree, whole)
    return automaton.problems + list(_ambiguities(automaton, frozenset() if mode == "fullmatch" else whole.safe))


def _search(automaton: Automaton, tree: Any, whole: Part) -> None:
    """Put a loop over any text before a pattern, or over lines for one that begins with `^`."""
    begins = tree[0][1] if len(tree) and tree[0][0] is op.AT else None
    if begins is op.AT_BEGINNING_STRING or (begins is op.AT_BEGINNING and not automaton.settings.flags & re.MULTILINE):
        return
    anything = automaton.state(automaton.sample)
    automaton.connect(anything, anything)
    if begins is op.AT_BEGINNING:
        automaton.connect(anything, anything := automaton.state("\n"))
    automaton.connect(anything, whole)


def _sample(tree: Any) -> str:
    """Return characters that stand for all: one of each set that the classes of a pattern tell apart."""
    bounds = map(int, re.findall(r"\d+", repr(tree)))  # and other numbers, which do no harm
    codes = {*map(ord, ALPHABET), *(bound + step for bound in bounds for step in (-1, 0, 1))}
    chars = {chr(code) for code in codes if 0 <= code <= 0x10FFFF}
    chars |= {case for char in chars for case in (char.lower(), char.upper()) if len(case) == 1}
    return "".join(sorted(chars))


def _ambiguities(automaton: Automaton, safe: frozenset[int]) -> Iterator[str]:
    """Yield the ways of reading one text twice that backtracking would try. No text fails after a state in `safe`."""
    graph = nx.DiGraph(list(automaton.edges))
    reach = nx.transitive_closure(graph)  # a state reaches itself if it is in a loop
    second = nx.transitive_closure(graph.subgraph(set(graph) - safe))
    for (start, end), count in automaton.edges.items():
        if count > 1 and start in reach[end]:
            yield f"a loop within a loop reads {_show(automaton, start)}"
    loops = {state: loop for loop in nx.strongly_connected_components(graph) for state in loop if state in reach[state]}
    for state in {min(loop) for loop in loops.values()}:  # what holds for one of its states holds for all
        pairs = nx.DiGraph(_side_by_side(automaton, graph, (loops[state],) * 2, (state, state)))
        if any(one != other for one, other in nx.ancestors(pairs, (state, state))):
            yield f"two ways around a loop read {_show(automaton, state)}"
    for one, other in product(loops, loops):
        if second.has_edge(other, other) and other in reach[one] and one not in reach[other]:
            between = {state for state in reach[one] if other in reach[state]}
            within = (loops[one], between, {state for state in second[other] if other in second[state]})
            if (one, other, other) in _side_by_side(automaton, graph, within, (one, one, other)):
                yield f"two loops read {_show(automaton, other)} (the first: {_show(automaton, one)})"


def _side_by_side(
    automaton: Automaton, graph: nx.DiGraph, within: tuple[Set[int], ...], start: States
) -> dict[States, set[States]]:
    """Return the states that automata side by side reach by reading the same text, each with those that follow."""
    found: dict[States, set[States]] = {}
    waiting = [start]
    while waiting:
        if (current := waiting.pop()) in found:
            continue
        ends = product(*(allowed & graph[state].keys() for state, allowed in zip(current, within, strict=True)))
        found[current] = {end for end in ends if frozenset.intersection(*(automaton.chars[state] for state in end))}
        waiting += found[current]
    return found


def _show(automaton: Automaton, state: int) -> str:
    chars = automaton.chars[state]
    return "any text" if len(chars) == len(automaton.sample) else repr("".join(sorted(chars))[:12])
