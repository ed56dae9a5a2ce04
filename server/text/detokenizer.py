"""Token ids to text as the ids arrive: a character is released once its last byte is there, and never in part."""

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What detokenizing needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Detokenizer:
    """The text of one sequence of tokens.

    Tokens are bytes, and the bytes of all tokens together are UTF-8, so a token may begin or end inside a character.
    Bytes that are no UTF-8 become U+FFFD, as `bytes.decode("utf-8", "replace")` would have it for the whole.
    """

    def __init__(
        self, tokenizer: TokenBytes, *, skip_special_tokens: bool = True, shown_ids: frozenset[int] = frozenset()
    ) -> None:
        """`shown_ids` are special tokens that are not skipped."""
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer.special_ids - shown_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.num_chars = 0  # characters released so far

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        return self._decode(b"".join(map(self._bytes, token_ids)))

    def flush(self) -> str:
        """The rest: one U+FFFD where a character was never finished, otherwise nothing."""
        return self._decode(b"", final=True)

    def offset(self, token_id: int) -> int:
        """Index of the character where this token's text would begin, were it pushed now.

        A token that begins inside a character has the index of that character.
        """
        unfinished, _ = self._decoder.getstate()
        if not unfinished:
            return self.num_chars
        # One character where the token goes on with the unfinished one, two where it breaks it off.
        chars = (unfinished + self._bytes(token_id)[:1]).decode("utf-8", "replace")
        return self.num_chars + len(chars) - 1

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped_ids else self._tokenizer.token_bytes(token_id)

    def _decode(self, data: bytes, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        self.num_chars += len(text)
        return text
