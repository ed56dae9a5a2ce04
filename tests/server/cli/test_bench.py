"""The benchmark against a stub server with known timings, and the arithmetic of its report."""

import dataclasses
import json
import math
import socket
from pathlib import Path

import msgspec
import pytest

from server.cli.bench import Report, make_report, run_benchmark, summarize
from server.cli.http_client import RemoteError
from server.cli.load_generator import Exchange, LoadOptions, make_prompts, poisson_arrivals
from server.cli.main import main
from tests.support.stub_openai import Script, StubServer


def free_url() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_closed_loop(endpoint: str, is_chunked: bool) -> None:
    script = Script([["a"], ["b"], ["c"]], first_delay=0.08, delay=0.03, num_prompt_tokens=11, is_chunked=is_chunked)
    with StubServer(script) as server:
        report = run_benchmark(
            LoadOptions(url=server.url, endpoint=endpoint, num_requests=8, concurrency=4, input_len=10, output_len=3)
        )
    assert (report.num_requests, report.num_completed, report.errors) == (8, 8, {})
    assert report.model == "stub-model"
    assert (report.input_tokens, report.output_tokens) == (88, 24)
    assert (report.concurrency, report.rate) == (4, None)
    assert server.max_running == 4
    assert report.time_to_first_token_ms
    assert report.inter_token_latency_ms
    assert report.request_latency_ms
    assert 80 <= report.time_to_first_token_ms.p50 < 300
    assert 25 <= report.inter_token_latency_ms.p50 < 150
    assert 140 <= report.request_latency_ms.p50 < 600
    assert 0.28 <= report.duration < 1.5  # two waves of four
    assert report.output_tokens_per_second == pytest.approx(24 / report.duration, rel=0.01)
    assert report.input_tokens_per_second == pytest.approx(88 / report.duration, rel=0.01)


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
        "model": "m",
        "prompt": make_prompts(load, 4, 1)[0],
        "max_tokens": 9,
        "min_tokens": 9,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert chat.path == "/base/v1/chat/completions"
    assert chat.body["messages"] == [{"role": "user", "content": completion.body["prompt"]}]
    assert not {"prompt", "min_tokens", "ignore_eos"} & set(chat.body)


def test_open_loop_sends_when_requests_are_due() -> None:
    load = LoadOptions(url="", rate=100.0, num_requests=20, seed=3)
    arrivals = poisson_arrivals(100.0, 20, 3)
    with StubServer(Script(first_delay=0.3)) as server:
        report = run_benchmark(dataclasses.replace(load, url=server.url))
    assert report.num_completed == 20
    assert (report.concurrency, report.rate) == (None, 100.0)
    assert server.max_running > 10  # a slow server does not delay later requests
    assert report.duration == pytest.approx(arrivals[-1] + 0.3, abs=0.5)


def test_warmup_is_not_counted_and_has_other_prompts() -> None:
    with StubServer() as server:
        report = run_benchmark(LoadOptions(url=server.url, model="m", num_requests=3, warmup=2))
    assert report.num_requests == 3
    prompts = [seen.body["prompt"] for seen in server.requests]
    assert len(prompts) == len(set(prompts)) == 5


# Several tokens in a chunk.


@pytest.mark.parametrize("with_token_ids", [True, False])
def test_chunks_of_several_tokens(with_token_ids: bool) -> None:
    script = Script([["a", "b", "c", "d"]] * 4, delay=0.08, with_token_ids=with_token_ids)
    with StubServer(script) as server:
        report = run_benchmark(LoadOptions(url=server.url, model="m", num_requests=2))
    assert report.output_tokens == 32
    assert report.inter_token_latency_ms
    assert 15 <= report.inter_token_latency_ms.mean < 75  # 80 ms for four tokens


def test_without_usage_chunks_are_counted() -> None:
    with StubServer(Script([["a"], ["b"]], with_usage=False)) as server:
        report = run_benchmark(LoadOptions(url=server.url, model="m", num_requests=2))
    assert (report.input_tokens, report.output_tokens) == (0, 4)


def test_summaries() -> None:
    assert summarize([]) is None
    one = summarize([0.25])
    assert one
    assert (one.mean, one.p50, one.p99) == (250.0, 250.0, 250.0)
    many = summarize([value / 1000 for value in range(101)])
    assert many
    assert (many.mean, many.p50, many.p90, many.p99) == (50.0, 50.0, 90.0, 99.0)


def test_a_report_of_failures_only_is_valid_json() -> None:
    failed = Exchange(1.0, 2.0, error="timeout")
    report = make_report(LoadOptions(url="", model="m"), "m", [failed])
    assert report.errors == {"timeout": 1}
    assert report.time_to_first_token_ms is None
    decoded = json.loads(msgspec.json.encode(report))
    assert all(not isinstance(value, float) or math.isfinite(value) for value in decoded.values())


# Failures.


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(status=429, error="queue full"), "HTTP 429: queue full"),
        (Script(error="engine died"), "the answer failed: engine died"),
        (Script(with_done=False), "stream cut off"),
        (Script(with_done=False, is_chunked=False), "stream cut off"),
        (Script(close_early=True), "connection broken"),
    ],
)
def test_failures_are_counted(script: Script, error: str) -> None:
    with StubServer(script) as server:
        report = run_benchmark(LoadOptions(url=server.url, model="m", num_requests=3))
    assert report.num_completed == 0
    assert report.errors == {error: 3}


def test_time_out() -> None:
    with StubServer(Script(never_ends=True)) as server:
        report = run_benchmark(LoadOptions(url=server.url, model="m", num_requests=2, timeout=0.2))
        assert report.errors == {"timeout": 2}
        assert server.disconnected.wait(2)


def test_no_server() -> None:
    url = free_url()
    for model in ("m", None):
        with pytest.raises(RemoteError, match=f"no server answers at {url}"):
            run_benchmark(LoadOptions(url=url, model=model))


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
        for _ in range(2):
            main(["bench", "--url", server.url, "--num-requests", "1", "--json"])
        for _ in range(2):
            main(["bench", "--url", server.url, "--num-requests", "1", "--json", "--seed", "1"])
    prompts = [seen.body["prompt"] for seen in server.requests]
    assert len(set(prompts)) == 3
    assert prompts[2] == prompts[3]


def test_the_command_fails_where_all_requests_do(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer(Script(status=401, error="wrong\x1b[31m key")) as server:
        assert main(["bench", "--url", server.url, "--num-requests", "2"]) == 1
    output = capsys.readouterr().out
    assert "failed: 2 x HTTP 401: wrong[31m key" in output
    assert "\x1b" not in output


def test_the_command_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    url = free_url()
    assert main(["bench", "--url", url]) == 1
    assert capsys.readouterr().err == f"lightwell: error: no server answers at {url} (`lightwell serve` starts one)\n"


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTWELL_API_KEY", "first,second")
    with StubServer() as server:
        main(["bench", "--url", server.url, "--num-requests", "1", "--json"])
        main(["bench", "--url", server.url, "--num-requests", "1", "--json", "--api-key", "mine"])
    assert [seen.headers["authorization"] for seen in server.seen] == ["Bearer first"] * 2 + ["Bearer mine"] * 2
