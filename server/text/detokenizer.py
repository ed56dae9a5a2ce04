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
        self._token_bytes = tokenizer.token_bytes
        self._skipped_ids = tokenizer.special_ids - shown_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_whole = True  # no character is incomplete
        self.num_chars = 0  # characters returned so far

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        skipped, token_bytes = self._skipped_ids, self._token_bytes
        data = b"".join([token_bytes(token_id) for token_id in token_ids if token_id not in skipped])
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
