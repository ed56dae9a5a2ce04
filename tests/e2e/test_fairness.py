"""Nobody holds up others: not by a long prompt, and not by many requests."""

import random
import time
from itertools import pairwise

import httpx
import pytest

from tests.e2e.conftest import StartServer
from tests.support.server_process import COMPLETIONS, MODEL, REQUEST_SECONDS, ServerProcess
from tests.support.serving import wait_until
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


@pytest.mark.alone
def test_a_client_with_hundreds_of_choices_does_not_hold_up_another(start_server: StartServer) -> None:
    """Without keys, a client is its address."""
    server = start_server("--max-num-seqs=32", "--max-queued-requests=512", "--kv-cache-memory=128MiB")
    prompts = ["Once upon a time", "It was a dark night", "In the beginning"]
    attack = Stream(server, {"prompt": prompts, "n": 128, "max_tokens": 400, "ignore_eos": True})
    wait_until(lambda: server.num_running == 32 and server.num_waiting > 300, timeout=REQUEST_SECONDS)
    num_steps = server.metric("lightwell_engine_steps_total")
    with httpx.Client(
        base_url=server.url, transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=REQUEST_SECONDS
    ) as other:
        for number in range(20):
            body = {"model": MODEL, "prompt": f"Light {number}", "max_tokens": 1}
            assert other.post(COMPLETIONS, json=body).status_code == 200
    assert server.metric("lightwell_engine_steps_total") - num_steps <= 20 * 3, "the one that runs, and its own"
    assert not attack.ended
