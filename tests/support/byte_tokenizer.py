"""A tokenizer whose tokens are any bytes."""

from collections.abc import Iterable, Sequence


class BytesTokenizer:
    """Token i stands for the i-th of the given bytes."""

    def __init__(self, tokens: Sequence[bytes], special_ids: Iterable[int] = ()) -> None:
        self.tokens = tokens
        self.special_ids = frozenset(special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]


def split_at(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The data in pieces, some of them empty; cuts beyond its end count as its end."""
    ends = sorted(min(cut, len(data)) for cut in cuts)
    return [data[begin:end] for begin, end in zip([0, *ends], [*ends, len(data)], strict=True)]
