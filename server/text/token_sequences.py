"""The token sequences of words and strings, for `bad_words` and the sequence breakers of the DRY sampler."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from engine.shared.messages import SequenceBreaker
from engine.shared.recently_used import RecentlyUsed
from server.text.tokenizer import Tokenizer

MAX_CACHED_BYTES = 4 << 20  # of the breakers of a model
SEPARATOR = "\u0100"  # between the tokens in `_TokenIndex`; no byte decodes to it in Latin-1


def word_sequences(tokenizer: Tokenizer, word: str) -> list[list[int]]:
    """Return the distinct, non-empty token sequences of a word at the start of a text and after a space."""
    bare = word.lstrip(" ")
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in (bare, f" {bare}")]
    return [ids for index, ids in enumerate(encoded) if ids and ids not in encoded[:index]]


class _TokenIndex:
    """Finds the tokens of a vocabulary that contain or end with certain bytes, in far less than a pass over it."""

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self._joined = SEPARATOR.join(token.decode("latin-1") for token in vocabulary)
        by_end = sorted((token[::-1], token_id) for token_id, token in enumerate(vocabulary))
        self._reversed = [token for token, _ in by_end]
        self._ids = array("i", [token_id for _, token_id in by_end])  # of `_reversed`

    def containing(self, part: bytes) -> set[int]:
        """Return the ids of the tokens that contain `part`, which is not empty."""
        pieces = self._joined.split(part.decode("latin-1"))
        return set(accumulate(piece.count(SEPARATOR) for piece in pieces[:-1]))

    def ending_with(self, end: bytes) -> set[int]:
        """Return the ids of the tokens that end with `end`."""
        start = end[::-1]
        first = bisect_left(self._reversed, start)
        last = bisect_right(self._reversed, start, lo=first, key=lambda token: token[: len(start)])
        return set(self._ids[first:last])


class SequenceBreakers:
    """Finds the token sequences that end with or contain certain strings, and caches them. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._index: _TokenIndex | None = None  # made by the first search
        self._index_lock = threading.Lock()
        self._found: RecentlyUsed[str, dict[tuple[int, ...], bytes]] = RecentlyUsed(MAX_CACHED_BYTES)

    def find(self, strings: Sequence[str]) -> tuple[SequenceBreaker, ...]:
        """Return the token sequences of the strings, each once."""
        by_rest: dict[tuple[int, ...], list[bytes]] = {}
        for string in strings:
            for rest, first in self._breakers(string).items():
                by_rest.setdefault(rest, []).append(first)
        return tuple(SequenceBreaker(_joined(parts), rest) for rest, parts in by_rest.items())

    def _breakers(self, string: str) -> dict[tuple[int, ...], bytes]:
        found = self._found.get(string)
        if found is None:
            found = self._search(string)
            self._found.put(string, found, _num_bytes(string, found))
        return found

    def _search(self, string: str) -> dict[tuple[int, ...], bytes]:
        """Return each token that contains the string, and each that ends with a prefix of it, followed by the rest.

        The keys are the rests, the values the sorted ids of the tokens.
        """
        index = self._token_index()
        whole = index.containing(string.encode())
        found: dict[tuple[int, ...], set[int]] = {(): whole}
        for num_chars in range(1, len(string)):
            if first := index.ending_with(string[:num_chars].encode()) - whole:
                rest = self._tokenizer.encode(string[num_chars:], add_special_tokens=False, parse_special=False)
                found.setdefault(tuple(rest), set()).update(first)
        return {rest: _packed(first) for rest, first in found.items() if first}

    def _token_index(self) -> _TokenIndex:
        with self._index_lock:
            if self._index is None:
                ids = range(self._tokenizer.vocab_size)
                self._index = _TokenIndex([self._tokenizer.token_bytes(token_id) for token_id in ids])
            return self._index


def _num_bytes(string: str, found: Mapping[tuple[int, ...], bytes]) -> int:
    """Return about the memory that the breakers of a string take in the cache."""
    return 256 + 4 * len(string) + sum(len(first) + 64 + 8 * len(rest) for rest, first in found.items())


def _packed(token_ids: set[int]) -> bytes:
    return array("i", sorted(token_ids)).tobytes()


def _joined(parts: Sequence[bytes]) -> bytes:
    """Return the union of sets that `_packed` has made."""
    if len(parts) == 1:
        return parts[0]
    return _packed({token_id for part in parts for token_id in memoryview(part).cast("i")})
