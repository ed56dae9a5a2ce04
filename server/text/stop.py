"""Stop strings, found in text that arrives in pieces.

Of all places where a stop string occurs, the one that is complete first in the stream counts; of several that end at
the same character, the one that starts first (the longest). So the result depends on the text alone, never on how it
was cut into pieces. The search is an Aho-Corasick automaton: each character costs constant time on average, whatever
the stop strings are, and the state always says how much of the text's end may still become a match.
"""

import re
from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string, holding back what may still turn out to be one."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """Raises ValueError for an empty stop string. `include_stop` releases the matched string too."""
        if "" in stops:
            raise ValueError("stop: a stop string must have at least one character")
        self._automaton = _Automaton(stops) if stops else None
        self._include_stop = include_stop
        self._state = 0
        self._held = ""  # the end of the text that is the beginning of some stop string
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What can be released: all text before a match, none after it."""
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
        """What was held back; call it when no more text comes."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """Aho-Corasick: state s stands for the longest end of the text that begins some stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.depths = [0]  # characters that the state stands for
        self.matches: list[str | None] = [None]  # the longest stop string that ends here
        self._fallbacks = [0]  # the state of the next shorter end of the text
        for stop in stops:
            self._insert(stop)
        self._link()
        self._first_char = re.compile(f"[{re.escape(''.join(self.children[0]))}]")

    def run(self, state: int, text: str) -> tuple[int, int]:
        """The state after the text, or where a match is complete; and the number of characters read."""
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
        """Breadth first, so that the fallback of a state, which is shorter, is complete before the state itself."""
        queue = deque(self.children[0].values())
        while queue:
            state = queue.popleft()
            if self.matches[state] is None:
                self.matches[state] = self.matches[self._fallbacks[state]]
            for char, child in self.children[state].items():
                self._fallbacks[child] = self._next(self._fallbacks[state], char)
                queue.append(child)
