"""Decides whether `re` matches a pattern in a time that grows linearly with the text.

A pattern becomes an automaton with one state for each character class. Backtracking is more than linear only if the
automaton has two ways to read the same text: around one loop (exponential), or from one loop into another (at least
quadratic); see Weideman et al., "Analyzing Matching Time Behavior of Backtracking Regular Expression Matchers". A
search is a loop over any text before the pattern. A repetition with a high bound, or within another, counts as one
without a bound: what it costs grows with the bound as it does with the text.
"""

import importlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import networkx as nx

op: Any = importlib.import_module("re._constants")
parser: Any = importlib.import_module("re._parser")

SEARCHES = frozenset(("search", "findall", "finditer", "sub", "subn", "split"))
ASCII, DOTALL, IGNORECASE, MULTILINE = map(int, (re.ASCII, re.DOTALL, re.IGNORECASE, re.MULTILINE))
MODES = SEARCHES | {"match", "fullmatch"}
ALPHABET = "\0\t\n\r 0a_AZz~\x7f\x85\xa0\xb5\xe9\u0663\u03bc\u2028\u4e00\U0010ffff"
CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d",
    op.CATEGORY_NOT_DIGIT: r"\D",
    op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w",
    op.CATEGORY_NOT_WORD: r"\W",
}
CLASSES = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)
MAX_CONSTANT = 16  # repetitions of one character class outside all others that cost no more than a constant

Follow = dict[int, set[int]]
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

    flags: int
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
            return self.state(char for char in self.sample if self.reads(name, value, char))
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

    def reads(self, name: Any, value: Any, char: str) -> bool:
        """Return whether a character class has a character."""
        cases = {char, char.lower(), char.upper()} if self.flags & IGNORECASE else {char}
        if name is op.ANY:
            return char != "\n" or bool(self.flags & DOTALL)
        if name is op.NOT_LITERAL:
            return chr(value) not in cases
        if name is op.IN:
            is_negated, members = value[0][0] is op.NEGATE, [item for item in value if item[0] is not op.NEGATE]
            return any(self.reads(kind, inner, char) for kind, inner in members) != is_negated
        if name is op.RANGE:
            return any(value[0] <= ord(case) <= value[1] for case in cases if len(case) == 1)
        if name is op.CATEGORY:
            return re.match(CATEGORIES[value], char, self.flags & ASCII) is not None
        return chr(value) in cases


def why_not_linear(pattern: str | bytes, flags: int = 0, *, mode: str = "search") -> list[str]:
    """Return why a pattern may take more than linear time; nothing: it cannot. `mode`: the function of `re`."""
    text = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    tree = parser.parse(text, flags)
    flags = int(tree.state.flags) | (ASCII if isinstance(pattern, bytes) else 0)
    automaton = Automaton(flags, _sample(tree))
    whole = automaton.sequence(tree)
    if mode in SEARCHES:
        _search(automaton, tree, whole)
    return automaton.problems + list(_ambiguities(automaton, frozenset() if mode == "fullmatch" else whole.safe))


def _search(automaton: Automaton, tree: Any, whole: Part) -> None:
    """Put a loop over any text before a pattern, or over lines for one that begins with `^`."""
    begins = tree[0][1] if len(tree) and tree[0][0] is op.AT else None
    if begins is op.AT_BEGINNING_STRING or (begins is op.AT_BEGINNING and not automaton.flags & MULTILINE):
        return
    anything = automaton.state(automaton.sample)
    automaton.connect(anything, anything)
    if begins is op.AT_BEGINNING:
        automaton.connect(anything, anything := automaton.state("\n"))
    automaton.connect(anything, whole)


def _sample(tree: Any) -> str:
    """Return characters that stand for all: one of each set that the classes of a pattern tell apart."""
    codes = {ord(char) for char in ALPHABET}
    for name, value in _leaves(tree):
        bounds = value if name is op.RANGE else (value,)
        codes |= {bound + step for bound in bounds for step in (-1, 0, 1) if 0 <= bound + step <= 0x10FFFF}
    chars = {chr(code) for code in codes}
    chars |= {case for char in chars for case in (char.lower(), char.upper()) if len(case) == 1}
    return "".join(sorted(chars))


def _leaves(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, tuple) and len(node) == 2 and node[0] in (op.LITERAL, op.NOT_LITERAL, op.RANGE):
        yield node
    elif isinstance(node, list | tuple | parser.SubPattern):
        for child in node:
            yield from _leaves(child)


def _ambiguities(automaton: Automaton, safe: frozenset[int]) -> Iterator[str]:
    """Yield the ways of reading one text twice that backtracking would try. No text fails after a state in `safe`."""
    follow: Follow = {state: set() for state in range(len(automaton.chars))}
    for start, end in automaton.edges:
        follow[start].add(end)
    reach = {state: _reachable(state, follow) for state in follow}
    for (start, end), count in automaton.edges.items():
        if count > 1 and start in reach[end]:
            yield f"a loop within a loop reads {_show(automaton, start)}"
    loops = {state: {other for other in reach[state] if state in reach[other]} for state in follow}
    looped = [state for state in follow if loops[state]]
    for loop in set(map(frozenset, loops.values())) - {frozenset()}:  # what holds for one of its states holds for all
        if _is_ambiguous(automaton, follow, loop, min(loop)):
            yield f"two ways around a loop read {_show(automaton, min(loop))}"
    unsafe = {state: ends - safe for state, ends in follow.items() if state not in safe}
    second = {state: _reachable(state, unsafe) if state in unsafe else set() for state in looped}
    for one, other in product(looped, looped):
        if other in second[other] and other in reach[one] and one not in reach[other]:
            between = {state for state in reach[one] if other in reach[state]}
            within = (loops[one], between, {state for state in second[other] if other in reach[state]})
            if (one, other, other) in _side_by_side(automaton, follow, within, (one, one, other)):
                yield f"two loops read {_show(automaton, other)} (the first: {_show(automaton, one)})"


def _reachable(state: int, follow: Follow) -> set[int]:
    graph = nx.DiGraph(follow)
    return follow[state].union(*(nx.descendants(graph, end) for end in follow[state]))


def _is_ambiguous(automaton: Automaton, follow: Follow, loop: Set[int], start: int) -> bool:
    """Return whether two different ways around a loop read one text."""
    graph = nx.DiGraph(_side_by_side(automaton, follow, (loop, loop), (start, start)))
    return any(one != other for one, other in nx.ancestors(graph, (start, start)))


def _side_by_side(
    automaton: Automaton, follow: Follow, within: tuple[Set[int], ...], start: States
) -> dict[States, set[States]]:
    """Return the states that automata side by side reach by reading the same text, each with those that follow."""
    graph: dict[States, set[States]] = {}
    waiting = [start]
    while waiting:
        if (current := waiting.pop()) in graph:
            continue
        ends = product(*(follow[state] & allowed for state, allowed in zip(current, within, strict=True)))
        graph[current] = {end for end in ends if frozenset.intersection(*(automaton.chars[state] for state in end))}
        waiting += graph[current]
    return graph


def _show(automaton: Automaton, state: int) -> str:
    chars = automaton.chars[state]
    return "any text" if len(chars) == len(automaton.sample) else repr("".join(sorted(chars))[:12])
