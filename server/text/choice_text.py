"""The text of one choice of a request, as its tokens arrive: detokenized, and cut at the first stop string."""

from collections.abc import Sequence

from server.text.detokenizer import Detokenizer, TokenBytes
from server.text.stop import StopMatcher


class ChoiceText:
    """Turns the tokens of one choice into the text that a client may see."""

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
        """The text of the first `min_tokens` tokens is not searched: a stop string must begin after it.

        `shown_ids` are special tokens that are never skipped. With `track_offsets`, `offsets` holds for each consumed
        token how many characters of the choice's text come before the token's; a token that begins inside a character
        has the index of that character.
        """
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, shown_ids=shown_ids)
        self._matcher = StopMatcher(stop, include_stop=include_stop)
        self._min_tokens = min_tokens
        self._track_offsets = track_offsets
        self.num_tokens = 0  # consumed, the one that completed a stop string included
        self.offsets: list[int] = []

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._matcher.matched

    def push(self, token_ids: Sequence[int]) -> str:
        """The text to release. Tokens after the one that completes a stop string are not consumed."""
        pieces = []
        for token_id in token_ids:
            if self.stopped is not None:
                break
            pieces.append(self._push_token(token_id))
        return "".join(pieces)

    def finish(self) -> str:
        """The text that was held back; call it after the last token. Nothing after a stop string."""
        return self._search(self._detokenizer.flush()) + self._matcher.flush()

    def _push_token(self, token_id: int) -> str:
        if self._track_offsets:
            self.offsets.append(self._detokenizer.offset(token_id))
        self.num_tokens += 1
        return self._search(self._detokenizer.push((token_id,)))

    def _search(self, text: str) -> str:
        return text if self.num_tokens <= self._min_tokens else self._matcher.push(text)


def token_text(tokenizer: TokenBytes, token_id: int) -> str:
    r"""A token's own text for a list of log probabilities.

    A token that is not valid UTF-8 by itself reads as OpenAI writes it: `bytes:\xf0\x9f`, printable ASCII as it is.
    """
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(map(_escape_byte, data))


def _escape_byte(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else f"\\x{byte:02x}"
