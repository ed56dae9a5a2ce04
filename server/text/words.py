"""Words as the token sequences that spell them in a text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from server.text.tokenizer import Tokenizer

MAX_REMEMBERED = 256  # sequence breakers


def spellings(tokenizer: Tokenizer, word: str) -> list[list[int]]:
    """The token ids of a word at the beginning of a text and after a space; none where it has no tokens."""
    bare = word.lstrip(" ")
    spelled = [tokenizer.encode(text, add_special_tokens=False) for text in (bare, f" {bare}")]
    return [ids for place, ids in enumerate(spelled) if ids and ids not in spelled[:place]]


class SequenceBreakers:
    """The token sequences with which a text comes to hold certain strings. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._found: dict[str, list[tuple[int, ...]]] = {}

    def find(self, strings: Sequence[str]) -> dict[int, frozenset[tuple[int, ...]]]:
        """By their number of tokens."""
        by_length: dict[int, set[tuple[int, ...]]] = {}
        for string in strings:
            for sequence in self._sequences(string):
                by_length.setdefault(len(sequence), set()).add(sequence)
        return {length: frozenset(sequences) for length, sequences in by_length.items()}

    def _sequences(self, string: str) -> list[tuple[int, ...]]:
        found = self._found.get(string)
        if found is None:
            found = self._search(string)
            if len(self._found) < MAX_REMEMBERED:
                self._found[string] = found
        return found

    def _search(self, string: str) -> list[tuple[int, ...]]:
        """Each token that holds the string; and each that ends with a part of it, with the tokens of the rest."""
        whole = string.encode()
        rests = {}
        for num_chars in range(1, len(string)):
            rest = self._tokenizer.encode(string[num_chars:], add_special_tokens=False, parse_special=False)
            rests[string[:num_chars].encode()] = tuple(rest)
        last_bytes = {beginning[-1] for beginning in rests}
        found: list[tuple[int, ...]] = []
        for token_id, token in enumerate(self._vocabulary):
            if whole in token:
                found.append((token_id,))
            elif token and token[-1] in last_bytes:
                found += [(token_id, *rest) for beginning, rest in rests.items() if token.endswith(beginning)]
        return found

    @cached_property
    def _vocabulary(self) -> list[bytes]:
        return [self._tokenizer.token_bytes(token_id) for token_id in range(self._tokenizer.vocab_size)]
