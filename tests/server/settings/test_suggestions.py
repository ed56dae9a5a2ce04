"""Suggestions for names that do not exist."""

import pytest

from server.settings.suggestions import did_you_mean

KNOWN = ["--port", "--host", "--max-num-seqs", "--max-num-batched-tokens"]


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("--prot", "--port"),
        ("--max-num-seq", "--max-num-seqs"),
        ("--max-batched-tokens", "--max-num-batched-tokens"),
        ("--frobnicate", None),
        ("", None),
    ],
)
def test_the_nearest_name(name: str, suggestion: str | None) -> None:
    assert did_you_mean(name, KNOWN) == (f" (did you mean {suggestion}?)" if suggestion else "")
