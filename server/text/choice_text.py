"""Turn the tokens of one choice into text as they arrive, up to the first stop string."""

import codecs
import functools
import re
from collections import deque
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """The part of a tokenizer that detokenization uses."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Detokenizer:
    """Incremental detokenizer of one sequence.

    The bytes of all tokens together are UTF-8, so a token can start or end inside a character. Invalid bytes become
    U+FFFD, as in `bytes.decode("utf-8", "replace")` of the whole sequence.
    """

    def __init__(
        self, tokenizer: TokenBytes, *, skip_special_tokens: bool = True, shown_ids: frozenset[int] = frozenset()
    ) -> None:
        """`shown_ids` are special tokens that are never skipped."""
        self._token_bytes = tokenizer.token_bytes
        self._skipped_ids = tokenizer.special_ids - shown_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_whole = True  # no character is incomplete
        self.num_chars = 0  # characters returned so far

    def push(self, token_id: int) -> str:
        """Return the text that a token completes."""
        if token_id in self._skipped_ids:
            return ""
        data = self._token_bytes(token_id)
        if self._is_whole:
            try:
                text = data.decode()
            except UnicodeDecodeError:
                pass
            else:
                self.num_chars += len(text)
                return text
        return self._decode(data)

    def flush(self) -> str:
        """Return one U+FFFD if the last character is incomplete, else the empty string."""
        return "" if self._is_whole else self._decode(b"", final=True)

    def offset(self, token_id: int) -> int:
        """Return the index of the first character of this token's text, if the token is pushed next.

        A token that starts inside a character has the index of that character.
        """
        if self._is_whole:
            return self.num_chars
        unfinished, _ = self._decoder.getstate()
        first = b"" if token_id in self._skipped_ids else self._token_bytes(token_id)[:1]
        # One character if the token continues the unfinished one, two if it does not.
        return self.num_chars + len((unfinished + first).decode("utf-8", "replace")) - 1

    def _decode(self, data: bytes, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        self._is_whole = not self._decoder.getstate()[0]
        self.num_chars += len(text)
        return text


class StopStringMatcher:
    """Returns text up to the first stop string, and holds back characters that may be the start of one.

    The match that is complete first counts; of several that end at the same character, the longest. So the result
    depends on the text alone, not on how it was split into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """With `include_stop`, the text includes the stop string. No stop string is empty."""
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
    """Aho-Corasick automaton. A state represents the longest suffix of the text that is a prefix of a stop string.

    Each character takes constant time on average, whatever the stop strings are, and the state always tells how many
    characters at the end of the text can still become a match.
    """

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


# The choices of a request share one, which may have thousands of states.
_automaton = functools.lru_cache(maxsize=8)(_Automaton)


class ChoiceText:
    """Detokenizes one choice and searches it for stop strings."""

    def __init__(
        self,
        tokenizer: TokenBytes,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
        track_offsets: bool = False,
    ) -> None:
        """Initialize the text of one choice.

        Args:
            tokenizer: maps token ids to bytes.
            stop: stop strings.
            include_stop: whether the text includes the stop string that ends it.
            min_tokens: a stop string must start after the text of this many tokens.
            skip_special_tokens: whether to leave special tokens out of the text.
            shown_ids: special tokens that are never left out.
            track_offsets: whether to fill `offsets`: for each consumed token, the index of its first character in the
                text. A token that starts inside a character has the index of that character.
        """
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, shown_ids=shown_ids)
        self._matcher = StopStringMatcher(stop, include_stop=include_stop) if stop else None
        self._min_tokens = min_tokens
        self._track_offsets = track_offsets
        self.num_tokens = 0  # consumed so far, including the token that completes a stop string
        self.offsets: list[int] = []
        self.stopped: str | None = None  # the stop string that ended the text

    def push(self, token_id: int) -> str:
        """Consume a token and return the text to send. Nothing may follow the end of a stop string."""
        if self._track_offsets:
            self.offsets.append(self._detokenizer.offset(token_id))
        self.num_tokens += 1
        text = self._detokenizer.push(token_id)
        return text if self._matcher is None else self._search(self._matcher, text)

    def finish(self) -> str:
        """Return the text that was held back, which is empty after a stop string. Call it after the last token."""
        text = self._detokenizer.flush()
        return text if self._matcher is None else self._search(self._matcher, text) + self._matcher.flush()

    def _search(self, matcher: StopStringMatcher, text: str) -> str:
        if self.num_tokens <= self._min_tokens:
            return text
        text = matcher.push(text)
        self.stopped = matcher.matched
        return text


def token_text(tokenizer: TokenBytes, token_id: int) -> str:
    r"""Return the text of a token for lists of log probabilities.

    A token that is not valid UTF-8 is written as in OpenAI's answers: `bytes:\xf0\x9f`, with printable ASCII unescaped.
    """
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(map(_escape_byte, data))


def _escape_byte(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else f"\\x{byte:02x}"
