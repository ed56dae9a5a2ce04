"""Counts of tokens against `list.count`."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling.token_counts import TokenCounts
from tests.support.examples import num_examples

TokenIds = st.lists(st.integers(0, 6), max_size=12)


def check(counts: TokenCounts, prompt: list[int], output: list[int]) -> None:
    assert len(set(counts.ids)) == len(counts.ids) == len(counts.codes)
    expected = {token_id: 2 * output.count(token_id) + (token_id in prompt) for token_id in prompt + output}
    assert dict(zip(counts.ids, counts.codes, strict=True)) == expected


@settings(max_examples=num_examples(100, 2000), deadline=None)
@given(prompt=TokenIds.filter(bool), parts=st.lists(st.tuples(TokenIds, TokenIds), max_size=5))
def test_counts_of_a_text_that_grows(prompt: list[int], parts: list[tuple[list[int], list[int]]]) -> None:
    """Also of a text that grew before its first count, and with drafts, which may be rejected."""
    counts, output = TokenCounts(), list[int]()
    for accepted, draft in parts:
        output += accepted
        counts.update(prompt + output, len(prompt))
        check(counts.with_draft(draft), prompt, output + draft)
        check(counts, prompt, output)
