"""Texts are compared at the boundaries of their tags."""

import pytest

from server.text.templates.rendered_text import common_prefix, common_suffix, last_tag


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("</think>\n\n", "</think>\n\n<call>", "</think>\n\n"),
        ("<|open|>think<|sep|>a", "<|open|>response<|sep|>", ""),  # the first tag belongs to what follows
        ("<|close|>think<|sep|><|open|>a", "<|close|>think<|sep|><|open|>b", "<|close|>think<|sep|>"),
        ("</invoke>\n<invoke>", "</invoke>\n</calls>", "</invoke>\n"),
        ("}, {", "}]", "}"),
        ("abc", "abd", ""),
        ("", "a", ""),
        ("same", "same", "same"),
    ],
)
def test_common_prefix(first: str, second: str, expected: str) -> None:
    assert common_prefix(first, second) == common_prefix(second, first) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("<calls>\n<call>", "</call>\n<call>", "\n<call>"),
        ("</calls><|end|>\n", "text<|end|>\n", "<|end|>\n"),
        ("a<tool|>", "b<turn|>", ""),
        ('[{"name": "', '}, {"name": "', '{"name": "'),
        ("xyz", "ayz", ""),
        ("same", "same", "same"),
    ],
)
def test_common_suffix(first: str, second: str, expected: str) -> None:
    assert common_suffix(first, second) == common_suffix(second, first) == expected


def test_last_tag() -> None:
    assert last_tag("a\n<|channel>thought\n") == "<|channel>thought"
    assert last_tag("x [THINK]") == "[THINK]"
    assert last_tag("none") == ""
