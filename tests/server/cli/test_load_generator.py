"""The load generator: prompts, arrival times, latencies and its own cost."""

import itertools
import statistics
import time

import pytest

from server.cli.bench import run_benchmark
from server.cli.http_client import StreamUsage
from server.cli.load_generator import Exchange, LoadOptions, make_prompts, poisson_arrivals
from tests.support.stub_openai import Script, StubServer


def test_poisson_arrivals() -> None:
    arrivals = poisson_arrivals(50.0, 20001, 1)
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert min(gaps) >= 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    # The standard deviation of an exponential distribution equals its mean.
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert poisson_arrivals(50.0, 3, 1) == arrivals[:3] != poisson_arrivals(50.0, 3, 2)


def test_prompts() -> None:
    load = LoadOptions(url="", input_len=20, shared_prefix_len=8)
    prompts = make_prompts(load, 7, 30)
    assert prompts == make_prompts(load, 7, 30)
    assert len(set(prompts)) == 30
    words = [prompt.split() for prompt in prompts]
    assert {len(prompt) for prompt in words} == {20}
    assert len({tuple(prompt[:8]) for prompt in words}) == 1
    assert len({tuple(prompt[:10]) for prompt in words}) > 25
    assert len({prompt[:40] for prompt in make_prompts(LoadOptions(url="", input_len=20), 7, 30)}) == 30


def exchange(chunks: list[tuple[float, int | None]], num_output_tokens: int | None) -> Exchange:
    usage = None if num_output_tokens is None else StreamUsage(3, num_output_tokens)
    return Exchange(0.0, chunks[-1][0] if chunks else 1.0, chunks, usage)


@pytest.mark.parametrize(
    ("chunks", "num_output_tokens", "expected"),
    [
        ([(1.0, None), (1.5, None), (2.5, None)], 3, [0.5, 1.0]),
        ([(1.0, None), (1.5, None), (2.5, None)], None, [0.5, 1.0]),
        ([(1.0, 1), (2.0, 4), (2.5, 1)], 6, [0.25] * 4 + [0.5]),
        ([(1.0, None), (2.0, None)], 8, [0.25] * 4),
        ([(1.0, None)], 1, []),
        ([], 0, []),
        ([(1.0, None), (2.0, None)], 0, [1.0]),
    ],
)
def test_inter_token_latencies(
    chunks: list[tuple[float, int | None]], num_output_tokens: int | None, expected: list[float]
) -> None:
    assert exchange(chunks, num_output_tokens).inter_token_latencies() == pytest.approx(expected)


def test_generating_load_is_cheap() -> None:
    """Takes less than 0.5 ms of CPU time per token; an engine step takes several milliseconds."""
    script = Script([["a"]] * 100)
    with StubServer(script) as server:
        started = time.thread_time()
        report = run_benchmark(LoadOptions(url=server.url, model="m", num_requests=20, concurrency=8))
        cost = time.thread_time() - started
    assert cost / report.output_tokens < 0.5e-3
