"""A lower bound of the number of tokens of a text, for refusing long texts without tokenizing them."""

import itertools
import json
import math
import struct
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import tokenizers
from tokenizers import models

from server.text.gguf_tokenizer import SPACE, byte_alphabet

UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
PRE_TOKENIZERS = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts")  # that may keep a text
WHITE_SPACE = "".join(filter(str.isspace, map(chr, range(0x3001)))).encode()
SEPARATOR = b"\xff"  # never part of a text
CHUNK_BYTES = 1 << 16
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_PAIR = struct.Struct("=H")


class TokenBound:
    """Bounds the number of tokens of a text from below by what the tokens of a vocabulary consist of.

    The bytes of a text's tokens are those of the text, so there are two bounds, of which the larger one counts:
    two neighbouring bytes that are neighbours in no token belong to different tokens; and a byte is at least the share
    1/n of a token, if n is the length of the longest token that contains it.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        *,
        known: bytes,
        swallowed: bytes = b"",
        forms: Iterable[str] = (),
        space: str | None = None,
    ) -> None:
        """Prepare the bounds.

        Args:
            tokens: the vocabulary.
            known: bytes that are tokens of their own. Others may be dropped, or become the token for unknown text.
            swallowed: bytes of which one token can take any number with it.
            forms: the Unicode normalization forms to which a text is converted first.
            space: a character that is the same as a space.
        """
        self._forms = tuple(forms)
        self._space = space
        counted = set(known) - set(swallowed) - {*SEPARATOR}
        longest = _longest(tokens)
        self._shares = [1 / longest.get(byte, 1) if byte in counted else 0.0 for byte in range(256)]
        within = set(_pairs(SEPARATOR.join(tokens)))
        pairs = {_PAIR.unpack(bytes(pair))[0] for pair in itertools.product(counted, repeat=2)}
        self._borders = frozenset(pairs - within)

    def min_tokens(self, text: str, enough: int) -> int:
        """Return a number of tokens that the text has at least, special tokens around it not counted.

        Only as much of the text is read as has more than `enough` tokens.
        """
        if self._space is not None:
            text = text.replace(self._space, " ")
        is_unchanged = all(unicodedata.is_normalized(cast(Any, form), text) for form in self._forms)
        data, num_borders, shares = text.encode(), 0, 0.0
        for start in range(0, len(data), CHUNK_BYTES):
            for pair, count in Counter(_pairs(data[start : start + CHUNK_BYTES + 1])).items():
                first, second = _PAIR.pack(pair)
                if is_unchanged:
                    num_borders += count if pair in self._borders else 0
                    shares += count * self._shares[first]
                elif first < 0x80 and second < 0x80:  # only ASCII characters before others certainly stay as they are
                    shares += count * self._shares[first]
            num_tokens = max(num_borders and num_borders + 1, math.ceil(shares * (1 - 1e-9)))  # floats are inexact
            if num_tokens > enough:
                break
        return num_tokens if data else 0


def _longest(tokens: Iterable[bytes]) -> dict[int, int]:
    """Return the length of the longest token with a byte, by byte."""
    by_length: dict[int, list[bytes]] = {}
    for token in tokens:
        by_length.setdefault(len(token), []).append(token)
    return {byte: length for length in sorted(by_length) for byte in set(b"".join(by_length[length]))}


def _pairs(data: bytes) -> Iterator[int]:
    """Return each two neighbouring bytes as a number."""
    ends = [start + (len(data) - start) // 2 * 2 for start in (0, 1)]
    return itertools.chain(*(memoryview(data)[start:end].cast("H") for start, end in zip((0, 1), ends, strict=True)))


def token_bound(backend: tokenizers.Tokenizer, vocab_size: int, to_bytes: Callable[[str], bytes]) -> TokenBound | None:
    """Return the bound for a tokenizer; None if it may drop text, or join any amount of it to one token.

    `to_bytes` converts a token to its bytes.
    """
    normalizers, splits = _steps(backend.normalizer, "normalizers"), _steps(backend.pre_tokenizer, "pretokenizers")
    is_byte_level = any(step["type"] == "ByteLevel" for step in splits)
    known = _byte_level_bytes(backend.model) if is_byte_level else _sentencepiece_bytes(backend.model)
    if not known or not all(map(_keeps_text, [*normalizers, *splits])):
        return None
    if is_byte_level and any(step["type"] in ("Metaspace", "Replace") for step in [*normalizers, *splits]):
        return None
    vocabulary = filter(None, map(backend.id_to_token, range(vocab_size)))
    added = backend.get_added_tokens_decoder().values()
    as_they_are = (
        [token.content for token in added]
        if is_byte_level
        else [token.replace(SPACE, " ") for token in [*(token.content for token in added), *BYTE_TOKENS]]
    )
    return TokenBound(
        [*map(to_bytes, vocabulary), *map(str.encode, as_they_are)],
        known=known,
        swallowed=WHITE_SPACE if any(token.lstrip or token.rstrip for token in added) else b"",
        forms=[step["type"] for step in normalizers if step["type"] in UNICODE_FORMS],
        space=None if is_byte_level else SPACE,
    )


def _steps(part: object, name: str) -> list[dict[str, Any]]:
    """Return the settings of a normalizer or a pre-tokenizer, or of the parts of a sequence."""
    if part is None:
        return []
    state = json.loads(cast(Any, part).__getstate__())
    steps = [state]
    while any(step["type"] == "Sequence" for step in steps):
        steps = [inner for step in steps for inner in (step[name] if step["type"] == "Sequence" else [step])]
    return steps


def _keeps_text(step: dict[str, Any]) -> bool:
    """Return whether a normalizer or a pre-tokenizer leaves a text as it is, apart from what `TokenBound` knows."""
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String") or step["pattern"].get("Regex") or ""
        return step["content"] == SPACE and (pattern == " " or pattern.startswith(r"\A(?!"))
    if step["type"] == "Metaspace":
        return bool(step["replacement"] == SPACE)
    return step["type"] in ("Prepend", *UNICODE_FORMS, *PRE_TOKENIZERS) and step.get("behavior") != "Removed"


def _byte_level_bytes(model: models.Model) -> bytes:
    """Return the bytes for which a vocabulary of byte-level BPE has tokens."""
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return b""
    return bytes(byte for char, byte in byte_alphabet().items() if model.token_to_id(char) is not None)


def _sentencepiece_bytes(model: models.Model) -> bytes:
    """Return all bytes if unknown characters are written as bytes, else none."""
    if isinstance(model, models.BPE):
        falls_back = model.byte_fallback and not (model.continuing_subword_prefix or model.end_of_word_suffix)
    elif isinstance(model, models.Unigram):
        falls_back = json.loads(cast(Any, model).__getstate__())["byte_fallback"]
    else:
        falls_back = False
    return bytes(range(256)) if falls_back and None not in map(model.token_to_id, BYTE_TOKENS) else b""
