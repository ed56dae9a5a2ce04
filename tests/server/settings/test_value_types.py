"""Sizes are formatted as they are parsed; test_load.py covers the other types of values."""

import pytest

from server.settings.value_types import format_size, parse_size


@pytest.mark.parametrize("num_bytes", [0, 1, 1023, 1024, 10 << 20, 3 << 29, 1 << 40])
def test_sizes_are_written_as_they_are_read(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == num_bytes
