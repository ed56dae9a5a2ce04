"""The ends of JSON values, against Python's own decoder."""

import json

from hypothesis import given
from hypothesis import strategies as st

from server.text.parsers.json_scanner import JSONScanner
from tests.server.text.parsers.test_tool_parser import JSON, cut


@given(
    st.dictionaries(st.text('a"}\\'), JSON, max_size=3) | st.lists(JSON, max_size=3),
    st.text(max_size=5),
    st.lists(st.integers(0, 80), max_size=8),
)
def test_a_value_ends_where_the_decoder_says(value: object, rest: str, cuts: list[int]) -> None:
    text = json.dumps(value, ensure_ascii=False)
    _, expected = json.JSONDecoder().raw_decode(text + rest)
    scanner, num_read = JSONScanner(), 0
    for piece in cut(text + rest, cuts):
        end = scanner.advance(piece, 0)
        num_read += len(piece) if end is None else end
        if end is not None:
            break
    assert num_read == expected == len(text)
    assert scanner.depth == 0


def test_stops_at_any_of_the_depths() -> None:
    scanner, text = JSONScanner(), '{"a{": [1, {}], "b": 2}!'
    assert scanner.advance(text, 0, 2) == text.index("[") + 1
    assert scanner.depth == 2
    assert scanner.advance(text[text.index("[") + 1 :], 0) == len('1, {}], "b": 2}')
    assert scanner.advance("no brackets", 0) is None
