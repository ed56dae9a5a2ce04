"""Test of chunked prefill: short requests go on while a long prompt is computed."""

import random
import time
from itertools import pairwise

import pytest

from tests.support.server_process import ServerProcess
from tests.support.streams import Stream, start_streams

NUM_PROMPT_TOKENS = 3600
CHUNK = 512  # tokens per step on a CPU


@pytest.mark.checklist("E06")
@pytest.mark.alone
def test_a_long_prompt_does_not_block_short_requests(server: ServerProcess) -> None:
    prompt = [random.Random(7).randrange(1000, 40000) for _ in range(NUM_PROMPT_TOKENS)]
    streams = start_streams(server, 4, max_tokens=60)
    sent = time.monotonic()
    long = Stream(server, {"prompt": prompt, "max_tokens": 1, "ignore_eos": True})
    assert long.result().is_complete
    num_chunks = NUM_PROMPT_TOKENS // CHUNK
    computed = long.times[0]
    for stream in streams:
        assert not stream.ended, "it ended before the long prompt"
        times = [moment for moment in list(stream.times) if sent <= moment <= computed]
        assert len(times) >= num_chunks - 2, "each step generates a token of each stream"
        longest_gap = max(later - earlier for earlier, later in pairwise([sent, *times, computed]))
        assert longest_gap < 3 * (computed - sent) / num_chunks
    for stream in streams:
        assert stream.result().is_complete
