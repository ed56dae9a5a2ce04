"""What thousands of hostile connections from another process cost a real server, and that others are answered."""

import asyncio
import statistics
from pathlib import Path

import pytest

from tests.bench.connections import CERTIFICATE, KINDS, api_process, attacking, probe
from tests.bench.serve import running_server
from tests.support.examples import num_examples

pytestmark = pytest.mark.alone

NUM_CONNECTIONS = num_examples(500, 4096)
MAX_BYTES = (300 << 20) // 4096  # of the API process, for each connection
SLACK_BYTES = 16 << 20
MAX_DELAY = 0.5  # seconds, usually; other tests and programs take their part of the cores


@pytest.mark.checklist("A16")
@pytest.mark.parametrize("uses_tls", [False, True])
def test_hostile_connections_cost_little_memory_and_do_not_hold_up_others(smollm2_path: Path, uses_tls: bool) -> None:
    flags = ["--max-model-len=1024", "--kv-cache-memory=64MiB", "--max-num-seqs=8"]
    with running_server([str(smollm2_path), *flags, *(CERTIFICATE if uses_tls else [])]) as (url, _):
        process = api_process(url)
        base = process.memory_info().rss
        for kind in [name for name, kind in KINDS.items() if kind.uses_tls == uses_tls]:
            with attacking(kind, url, NUM_CONNECTIONS):
                peak, (health_delays, _) = asyncio.run(probe(url, process, seconds=3.0))
            assert peak - base < SLACK_BYTES + NUM_CONNECTIONS * MAX_BYTES, kind
            assert statistics.median(health_delays) < MAX_DELAY, kind
