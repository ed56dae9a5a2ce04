"""A tokenizer with arbitrary bytes as tokens."""

from collections.abc import Iterable, Sequence


class BytesTokenizer:
    """A tokenizer whose token i is the i-th of the given byte strings."""

    def __init__(self, tokens: Sequence[bytes], special_ids: Iterable[int] = ()) -> None:
        self.tokens = tokens
        self.special_ids = frozenset(special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]


def split_at(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Split data at the given positions, which may repeat; those beyond its end are clipped."""
    ends = sorted(min(cut, len(data)) for cut in cuts)
    return [data[begin:end] for begin, end in zip([0, *ends], [*ends, len(data)], strict=True)]
