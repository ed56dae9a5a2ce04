"""Measure how near decoding comes to the machine's read bandwidth: `python -m tests.bench.decode_bandwidth FILE.gguf`.

One client streams short answers over HTTP; before and after each, a thread per core reads a large array
(`read_bandwidth.py`). What other machines on the same hardware take of the bandwidth changes within seconds, so each
answer is compared with the passes around it, with the fastest and with their mean, and the median of these ratios
counts. What is read for a token are the bytes of its weights, without the KV cache.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import httpx

from tests.bench.random_gguf import bytes_per_token
from tests.bench.read_bandwidth import measure_passes
from tests.bench.serve import MODEL_NAME, parse, run, running_server

PROMPT = "The quick brown fox jumps over the lazy dog"


def main() -> int:
    arguments = parse("decode_bandwidth", __doc__, "", answers=(40, "number"), tokens=(64, "of an answer"))
    num_bytes = bytes_per_token(Path(arguments.model))
    rates: list[float] = []
    of_best: list[float] = []
    of_mean: list[float] = []
    with (
        running_server([arguments.model, "--speculative", "off"]) as (url, _),
        httpx.Client(base_url=url, timeout=600, trust_env=False) as client,
    ):
        seconds_per_token(client, arguments.tokens)
        before = measure_passes()
        for _ in range(arguments.answers):
            rates.append(num_bytes / seconds_per_token(client, arguments.tokens))
            after = measure_passes()
            of_best.append(rates[-1] / max(*before, *after))
            of_mean.append(rates[-1] / statistics.mean([*before, *after]))
            before = after
    print(f"{num_bytes / 1e9:.3f} GB per token, {statistics.median(rates) / 1e9:.1f} GB/s, {len(rates)} answers")
    for name, ratios in (("the fastest pass", of_best), ("the mean pass", of_mean)):
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{middle:.0%} of {name} (quartiles {low:.0%} and {high:.0%})")
    return 0


def seconds_per_token(client: httpx.Client, num_tokens: int) -> float:
    """Return the mean time between the tokens of one answer."""
    body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    times = []
    with client.stream("POST", "/v1/completions", json=body | {"temperature": 0}) as response:
        response.raise_for_status()
        times = [time.perf_counter() for line in response.iter_lines() if line.startswith("data: {")]
    return (times[num_tokens - 1] - times[0]) / (num_tokens - 1)


if __name__ == "__main__":
    run(main)
