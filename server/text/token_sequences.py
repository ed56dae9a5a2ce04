"""The token sequences of words and strings, for `bad_words` and the sequence breakers of the DRY sampler."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from server.text.tokenizer import Tokenizer

MAX_CACHED = 256  # sequence breakers


def word_sequences(tokenizer: Tokenizer, word: str) -> list[list[int]]:
    """Return the distinct, non-empty token sequences of a word at the start of a text and after a space."""
    bare = word.lstrip(" ")
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in (bare, f" {bare}")]
    return [ids for index, ids in enumerate(encoded) if ids and ids not in encoded[:index]]


class SequenceBreakers:
    """Finds the token sequences that end with or contain certain strings, and caches them. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._found: dict[str, list[tuple[int, ...]]] = {}

    def find(self, strings: Sequence[str]) -> dict[int, frozenset[tuple[int, ...]]]:
        """Return the token sequences of the strings, grouped by their number of tokens."""
        by_length: dict[int, set[tuple[int, ...]]] = {}
        for string in strings:
            for sequence in self._sequences(string):
                by_length.setdefault(len(sequence), set()).add(sequence)
        return {length: frozenset(sequences) for length, sequences in by_length.items()}

    def _sequences(self, string: str) -> list[tuple[int, ...]]:
        found = self._found.get(string)
        if found is None:
            found = self._search(string)
            if len(self._found) < MAX_CACHED:
                self._found[string] = found
        return found

    def _search(self, string: str) -> list[tuple[int, ...]]:
        """Return each token that contains the string, and each that ends with a prefix of it, followed by the rest."""
        whole = string.encode()
        rests = {}
        for num_chars in range(1, len(string)):
            rest = self._tokenizer.encode(string[num_chars:], add_special_tokens=False, parse_special=False)
            rests[string[:num_chars].encode()] = tuple(rest)
        last_bytes = {prefix[-1] for prefix in rests}
        found: list[tuple[int, ...]] = []
        for token_id, token in enumerate(self._vocabulary):
            if whole in token:
                found.append((token_id,))
            elif token and token[-1] in last_bytes:
                found += [(token_id, *rest) for prefix, rest in rests.items() if token.endswith(prefix)]
        return found

    @cached_property
    def _vocabulary(self) -> list[bytes]:
        return [self._tokenizer.token_bytes(token_id) for token_id in range(self._tokenizer.vocab_size)]
