"""Convert token ids to text incrementally. A character is returned only when all of its bytes have arrived."""

import codecs
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
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer.special_ids - shown_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.num_chars = 0  # characters returned so far

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        return self._decode(b"".join(map(self._bytes, token_ids)))

    def flush(self) -> str:
        """Return one U+FFFD if the last character is incomplete, else the empty string."""
        return self._decode(b"", final=True)

    def offset(self, token_id: int) -> int:
        """Return the index of the first character of this token's text, if the token is pushed next.

        A token that starts inside a character has the index of that character.
        """
        unfinished, _ = self._decoder.getstate()
        if not unfinished:
            return self.num_chars
        # One character if the token continues the unfinished one, two if it does not.
        chars = (unfinished + self._bytes(token_id)[:1]).decode("utf-8", "replace")
        return self.num_chars + len(chars) - 1

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped_ids else self._tokenizer.token_bytes(token_id)

    def _decode(self, data: bytes, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        self.num_chars += len(text)
        return text
