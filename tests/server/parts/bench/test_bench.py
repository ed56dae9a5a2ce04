"""The benchmark against a stub server: the load that it generates, and the arithmetic of its report."""

import asyncio
import dataclasses
import itertools
import statistics
from pathlib import Path

import msgspec
import pytest

from server.cli.http_client import StreamUsage
from server.cli.main import main
from server.parts.bench.bench import (
    Exchange,
    Report,
    Summary,
    Target,
    make_prompts,
    make_report,
    poisson_arrivals,
    run_benchmark,
    summarize,
)
from server.parts.bench.commands import LoadOptions
from tests.support.server_process import free_port
from tests.support.serving import wait_until
from tests.support.stub_openai import Script, StubServer
from tests.support.turned_loop import TurnedLoop, turn


@pytest.mark.parametrize(
    ("endpoint", "is_chunked", "rate"),
    [("completions", True, None), ("chat", False, None), ("completions", True, 200.0)],
)
def test_a_load(endpoint: str, is_chunked: bool, rate: float | None) -> None:
    """No answer begins until four requests run; with a rate, until all do, since a slow server delays none."""
    at_once = 4 if rate is None else 8
    script = Script([["a"], ["b"], ["c"]], hold=at_once, num_prompt_tokens=11, is_chunked=is_chunked)
    load = LoadOptions(url="", endpoint=endpoint, num_requests=8, concurrency=4, rate=rate, input_len=10, output_len=3)
    with StubServer(script) as server:
        report = run_benchmark(dataclasses.replace(load, url=server.url))
    assert (report.num_requests, report.num_completed, report.errors) == (8, 8, {})
    assert report.model == "stub-model"
    assert (report.input_tokens, report.output_tokens) == (88, 24)
    assert (report.concurrency, report.rate) == ((4, None) if rate is None else (None, rate))
    assert server.max_running == at_once
    first, between, whole = report.time_to_first_token_ms, report.inter_token_latency_ms, report.request_latency_ms
    assert first
    assert between
    assert whole
    assert 0 < first.p50 <= whole.p50 <= 1000 * report.duration + 1  # which is rounded


def test_what_is_sent() -> None:
    with StubServer() as server:
        load = LoadOptions(
            url=f"{server.url}/base", api_key="k", model="m", num_requests=1, input_len=6, output_len=9, seed=4
        )
        run_benchmark(load)
        run_benchmark(dataclasses.replace(load, endpoint="chat", ignore_eos=False))
    completion, chat = server.requests
    assert completion.path == "/base/v1/completions"
    assert completion.headers["authorization"] == "Bearer k"
    assert completion.headers["content-type"] == "application/json"
    assert completion.body == {
        **{"model": "m", "prompt": make_prompts(load, 4, 1)[0], "max_tokens": 9, "min_tokens": 9, "ignore_eos": True},
        **{"temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}},
    }
    assert chat.path == "/base/v1/chat/completions"
    assert chat.body["messages"] == [{"role": "user", "content": completion.body["prompt"]}]
    assert not {"prompt", "min_tokens", "ignore_eos"} & set(chat.body)


def test_warmup_is_not_counted_and_has_other_prompts() -> None:
    with StubServer() as server:
        report = run_benchmark(LoadOptions(url=server.url, model="m", num_requests=3, warmup=2))
    assert report.num_requests == 3
    prompts = [seen.body["prompt"] for seen in server.requests]
    assert len(prompts) == len(set(prompts)) == 5


def test_tokens_are_those_of_the_usage_or_else_of_the_chunks() -> None:
    for with_usage, with_token_ids, num_tokens in ((True, False, 8), (False, True, 8), (False, False, 2)):
        script = Script([["a", "b", "c", "d"]] * 2, with_usage=with_usage, with_token_ids=with_token_ids)
        with StubServer(script) as server:
            report = run_benchmark(LoadOptions(url=server.url, model="m", num_requests=2))
        assert (report.input_tokens, report.output_tokens) == (10 if with_usage else 0, 2 * num_tokens)


# The load.


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


def test_inter_token_latencies() -> None:
    cases: list[tuple[list[tuple[float, int | None]], int | None, list[float]]] = [
        ([(1.0, None), (1.5, None), (2.5, None)], 3, [0.5, 1.0]),
        ([(1.0, None), (1.5, None), (2.5, None)], None, [0.5, 1.0]),
        ([(1.0, 1), (2.0, 4), (2.5, 1)], 6, [0.25] * 4 + [0.5]),
        ([(1.0, None), (2.0, None)], 8, [0.25] * 4),
        ([(1.0, None)], 1, []),
        ([], 0, []),
        ([(1.0, None), (2.0, None)], 0, [1.0]),
    ]
    for chunks, num_output_tokens, expected in cases:
        usage = None if num_output_tokens is None else StreamUsage(3, num_output_tokens)
        exchange = Exchange(0.0, chunks[-1][0] if chunks else 1.0, chunks, usage)
        assert exchange.inter_token_latencies() == pytest.approx(expected), chunks


# The report.


def test_a_report() -> None:
    exchanges = [
        Exchange(10.0, 11.0, [(10.25, None), (10.5, None), (11.0, None)], StreamUsage(7, 3)),
        Exchange(10.5, 14.0, [(11.0, None)], StreamUsage(5, 1)),
        Exchange(11.0, 12.0, error="timeout"),
    ]
    report = make_report(LoadOptions(url="", model="m"), "m", exchanges)
    assert (report.num_requests, report.num_completed, report.errors) == (3, 2, {"timeout": 1})
    assert (report.duration, report.input_tokens, report.output_tokens) == (4.0, 12, 4)
    assert (report.input_tokens_per_second, report.output_tokens_per_second) == (3.0, 1.0)
    assert report.requests_per_second == 0.5
    assert report.time_to_first_token_ms == summarize([0.25, 0.5])
    assert report.inter_token_latency_ms == summarize([0.25, 0.5])
    assert report.request_latency_ms == summarize([1.0, 3.5])


def test_summaries() -> None:
    assert summarize([]) is None
    assert summarize([0.25]) == Summary(250.0, 250.0, 250.0, 250.0)
    assert summarize([value / 1000 for value in range(101)]) == Summary(50.0, 50.0, 90.0, 99.0)


# Failures.


def test_failures_are_counted() -> None:
    for script, error in (
        (Script(status=429, error="queue full"), "HTTP 429: queue full"),
        (Script(error="engine died"), "the answer failed: engine died"),
        (Script(with_done=False), "stream cut off"),
        (Script(close_early=True, is_chunked=False), "stream cut off"),
    ):
        with StubServer(script) as server:
            report = run_benchmark(LoadOptions(url=server.url, model="m", num_requests=3))
        assert report.num_completed == 0
        assert report.errors == {error: 3}


def test_time_out() -> None:
    async def wait_in_vain(server: StubServer) -> Exchange:
        exchange = asyncio.create_task(Target(LoadOptions(url=server.url, timeout=600.0), "m").exchange("x", 0.0))
        await asyncio.to_thread(wait_until, lambda: server.requests)
        await turn(600.0)
        return await exchange

    with StubServer(Script(never_ends=True)) as server, asyncio.Runner(loop_factory=TurnedLoop) as runner:
        assert runner.run(wait_in_vain(server)).error == "timeout"
        assert server.disconnected.wait(60)


# The command.


def test_json_output(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer() as server:
        status = main(["bench", "--url", f"{server.url}/v1", "--num-requests", "3", "--concurrency", "2", "--json"])
    output = capsys.readouterr()
    report = msgspec.json.decode(output.out, type=Report)
    assert status == 0
    assert (report.num_completed, report.concurrency) == (3, 2)
    assert output.err == ""


def test_table_output(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer() as server:
        assert main(["bench", "--url", server.url, "--num-requests", "3", "--seed", "9"]) == 0
    output = capsys.readouterr().out
    for text in ("stub-model, completions, 3 requests, 8 in flight, seed 9", "time to first token (ms)", "p99"):
        assert text in output
    assert "3 of 3 requests completed" in output


def test_seeds_differ_unless_given() -> None:
    with StubServer() as server:
        for seed in ([], [], ["--seed", "1"], ["--seed", "1"]):
            main(["bench", "--url", server.url, "--num-requests", "1", "--json", *seed])
    prompts = [seen.body["prompt"] for seen in server.requests]
    assert len(set(prompts)) == 3
    assert prompts[2] == prompts[3]


def test_the_command_fails_where_all_requests_do(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer(Script(status=401, error="wrong\x1b[31m key")) as server:
        assert main(["bench", "--url", server.url, "--num-requests", "2"]) == 1
    output = capsys.readouterr().out
    assert "failed: 2 x HTTP 401: wrong[31m key" in output
    assert "\x1b" not in output


def test_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["bench", "--url", url]) == 1
    assert capsys.readouterr().err.startswith(f"lightwell: error: no server answers at {url} (")


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTWELL_API_KEY", "first,second")
    with StubServer() as server:
        main(["bench", "--url", server.url, "--num-requests", "1", "--json"])
        main(["bench", "--url", server.url, "--num-requests", "1", "--json", "--api-key", "mine"])
    assert [seen.headers["authorization"] for seen in server.seen] == ["Bearer first"] * 2 + ["Bearer mine"] * 2
