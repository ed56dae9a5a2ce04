"""Search for stop strings in text that arrives in pieces.

The match that is complete first counts; of several that end at the same character, the longest. So the result depends
on the text alone, not on how it was split into pieces. The search is an Aho-Corasick automaton: each character takes
constant time on average, whatever the stop strings are, and the state always tells how many characters at the end of
the text can still become a match.
"""

import functools
import re
from collections import deque
from collections.abc import Sequence


class StopStringMatcher:
    """Returns text up to the first stop string, and holds back characters that may be the start of one."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """With `include_stop`, the text includes the stop string. Raises ValueError if a stop string is empty."""
        if "" in stops:
            raise ValueError("stop: a stop string must have at least one character")
        self._automaton = _automaton(tuple(stops)) if stops else None
        self._include_stop = include_stop
        self._state = 0
        self._held = ""  # the end of the text that is the start of a stop string
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Read the next piece of text; return the text before a match that can be sent. Nothing follows a match."""
        if self.matched is not None:
            return ""
        if self._automaton is None:
            return text
        self._state, num_read = self._automaton.run(self._state, text)
        self.matched = self._automaton.matches[self._state]
        text = self._held + text[:num_read]
        num_held = self._automaton.depths[self._state]
        if self.matched is not None:
            num_held = 0 if self._include_stop else len(self.matched)
        self._held = "" if self.matched is not None else text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """Return the text that was held back. Call it after the last piece of text."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """Aho-Corasick automaton. A state represents the longest suffix of the text that is a prefix of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.depths = [0]  # length of the suffix
        self.matches: list[str | None] = [None]  # the longest stop string that ends here
        self._fallbacks = [0]  # state of the next shorter suffix
        for stop in stops:
            self._insert(stop)
        self._link()
        self._first_char = re.compile(f"[{re.escape(''.join(self.children[0]))}]")

    def run(self, state: int, text: str) -> tuple[int, int]:
        """Read text up to the first complete match; return the state and the number of characters read."""
        position = 0
        while position < len(text):
            if state == 0:
                first = self._first_char.search(text, position)
                if first is None:
                    break
                position = first.start()
            state = self._next(state, text[position])
            position += 1
            if self.matches[state] is not None:
                return state, position
        return state, len(text)

    def _next(self, state: int, char: str) -> int:
        while state and char not in self.children[state]:
            state = self._fallbacks[state]
        return self.children[state].get(char, 0)

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self.children[state]:
                self.children[state][char] = len(self.children)
                self.children.append({})
                self.depths.append(self.depths[state] + 1)
                self.matches.append(None)
                self._fallbacks.append(0)
            state = self.children[state][char]
        self.matches[state] = stop

    def _link(self) -> None:
        """Set the fallbacks. In breadth-first order, the fallback of a state is complete before the state itself."""
        queue = deque(self.children[0].values())
        while queue:
            state = queue.popleft()
            if self.matches[state] is None:
                self.matches[state] = self.matches[self._fallbacks[state]]
            for char, child in self.children[state].items():
                self._fallbacks[child] = self._next(self._fallbacks[state], char)
                queue.append(child)


@functools.lru_cache(maxsize=8)  # the choices of a request share one, which may have thousands of states
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    return _Automaton(stops)
