"""The comparison with peers, on stub servers: the requests, the failures and the arithmetic."""

import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from server.cli.load_generator import LoadOptions
from tests.bench.peers import Comparison, Workload, compare, measure_target, parse_arguments
from tests.bench.peers_results import Outcome, different_prompts, make_rows, print_results
from tests.bench.peers_setup import make_shape, shape_files
from tests.bench.peers_targets import MemoryWatch, Target
from tests.bench.random_gguf import bytes_per_token
from tests.bench.read_bandwidth import measure_read_bandwidth
from tests.support.gguf_files import LLAMA, write_gguf

STUB = Path(__file__).with_name("stub_peer.py")
WORKLOADS = (
    Workload("talk", LoadOptions(url="", num_requests=4, concurrency=2, input_len=8, output_len=3)),
    Workload("read", LoadOptions(url="", num_requests=2, concurrency=2, input_len=8, output_len=1), is_prefill=True),
)
SILENT = Console(quiet=True)

# A stub with the interface of `peers_openvino.py`, which reports that each token took a second.
PIPED = """
import json, sys
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    load = json.loads(line)
    chunks = [(i + 1.0, 1) for i in range(load["output_len"])]
    requests = [dict(start=0, end=chunks[-1][0], chunks=chunks, num_prompt_tokens=9) for _ in load["prompts"]]
    print(json.dumps(requests), flush=True)
"""


def python(*arguments: object) -> str:
    return shlex.join([sys.executable, *map(str, arguments)])


def comparison(folder: Path, *targets: Target, rounds: int = 1, seed: int = 1) -> Comparison:
    return Comparison(folder, targets, WORKLOADS, rounds=rounds, temperature=0.0, seed=seed)


def stub(name: str, prompts: Path, *arguments: str) -> Target:
    return Target(name, f"{python(STUB)} {{port}} {shlex.quote(str(prompts))} {' '.join(arguments)}")


def test_all_get_the_same_prompts_and_none_twice(tmp_path: Path) -> None:
    targets = [stub("a", tmp_path / "a"), stub("b", tmp_path / "b")]
    results = compare(comparison(tmp_path, *targets, rounds=2), SILENT)
    assert [outcome.failure for outcome in results.outcomes] == [None] * 8
    prompts = [sorted((tmp_path / name).read_text().splitlines()) for name in "ab"]
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0])) == len(prompts[0]) == 2 * (2 + 4 + 2 + 2)  # warm-ups and loads
    for outcome in results.outcomes:
        assert outcome.report
        assert outcome.memory_gb
        assert outcome.ready_seconds
        talks = outcome.workload == "talk"
        assert (outcome.report.input_tokens, outcome.report.output_tokens) == ((32, 12) if talks else (16, 2))
        speeds = outcome.report.output_tokens_per_second, outcome.report.input_tokens_per_second
        assert outcome.tokens_per_second == speeds[0 if talks else 1]


def test_seed_chooses_the_prompts(tmp_path: Path) -> None:
    seeds = {comparison(tmp_path, seed=seed).load(WORKLOADS[0], 1).seed for seed in range(10)}
    assert len(seeds) == 10


def test_a_target_without_http(tmp_path: Path) -> None:
    target = Target("piped", python("-c", PIPED), speaks_http=False)
    talk, read = measure_target(comparison(tmp_path, target), target, 1)
    assert talk.report
    assert (talk.report.input_tokens, talk.report.output_tokens, talk.report.duration) == (36, 12, 3.0)
    assert talk.tokens_per_second == 4.0
    assert read.tokens_per_second == 18.0


@pytest.mark.parametrize("speaks_http", [True, False])
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (python("-c", "raise SystemExit('no weights')"), "the process exited with status 1: no weights"),
        ("/nowhere/server", "cannot be started: "),
    ],
)
def test_a_target_that_does_not_start(
    command: str, message: str, speaks_http: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Target("broken", command, speaks_http=speaks_http)
    results = compare(comparison(tmp_path, stub("well", tmp_path / "prompts"), target), SILENT)
    failures = {outcome.workload: outcome.failure for outcome in results.outcomes if outcome.target == "broken"}
    assert failures.keys() == {"talk", "read"}
    assert all(message in str(failure) for failure in failures.values())
    assert [row.num_failed for row in results.rows] == [0, 1, 0, 1]
    print_results(results, Console(width=120))
    printed = capsys.readouterr().out
    assert printed.count("round 1, broken, ") == printed.count(message) == 2


def test_a_target_that_breaks_under_load(tmp_path: Path) -> None:
    target = Target(
        "piped", python("-c", PIPED.replace("load =", "raise SystemExit('no memory') #")), speaks_http=False
    )
    outcomes = list(measure_target(comparison(tmp_path, target), target, 1))
    assert [outcome.failure for outcome in outcomes] == ["no answer; the process exited with status 1: no memory"] * 2
    assert all(outcome.ready_seconds for outcome in outcomes)


def test_short_answers_do_not_count(tmp_path: Path) -> None:
    target = stub("short", tmp_path / "prompts", "2")
    talk, _ = measure_target(comparison(tmp_path, target), target, 1)
    assert talk.failure == "received 8 of 12 tokens"
    assert talk.tokens_per_second is None


def outcomes(target: str, *speeds: float | None) -> list[Outcome]:
    return [
        Outcome(
            round=number,
            target=target,
            workload="c1",
            tokens_per_second=speed,
            memory_gb=speed and number / 2,
            failure="broke" if speed is None else None,
        )
        for number, speed in enumerate(speeds, start=1)
    ]


def test_rows() -> None:
    found = outcomes("slow", 10, 30, 20) + outcomes("fast", 40, None, 60) + outcomes("ours", 75, 80, 65)
    found += outcomes("broken", None, None, None)
    rows = make_rows(found, ["c1"], {"slow": True, "fast": True, "ours": False, "broken": True})
    assert [row.target for row in rows] == ["slow", "fast", "ours", "broken"]
    assert [row.tokens_per_second for row in rows] == [20, 50, 75, None]
    assert [row.to_best_peer for row in rows] == [0.4, 1.0, 1.5, None]
    assert [(row.least, row.most) for row in rows] == [(10, 30), (40, 60), (65, 80), (None, None)]
    assert [row.num_failed for row in rows] == [0, 1, 0, 3]
    assert [row.memory_gb for row in rows] == [1.5, 1.5, 1.5, None]


def test_speed_of_reading_weights_at_one_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stub takes a second for each token."""
    gguf = write_gguf(tmp_path / "model.gguf", LLAMA, {"output_norm.weight": np.ones(20_000_000, np.float32)})
    assert bytes_per_token(gguf) == 80e6
    monkeypatch.setattr("tests.bench.peers.measure_read_bandwidth", lambda: 160e6)
    one, two = (
        Workload(name, LoadOptions(url="", num_requests=4, concurrency=concurrency, input_len=8, output_len=3))
        for concurrency, name in enumerate(("one", "two"), start=1)
    )
    targets = [
        Target("reads", python("-c", PIPED), speaks_http=False, gguf=gguf),
        Target("other", python("-c", PIPED), speaks_http=False),
    ]
    results = compare(Comparison(tmp_path, targets, [one, two], rounds=2, temperature=0.0, seed=1), SILENT)
    assert [outcome.read_bandwidth for outcome in results.outcomes] == [0.16, 0.16, None, None] * 2
    figures = {(row.target, row.workload): (row.weights_read, row.of_bandwidth) for row in results.rows}
    assert figures.pop(("reads", "one")) == (0.08, 0.5)
    assert set(figures.values()) == {(None, None)}
    print_results(results, Console(width=160))
    printed = capsys.readouterr().out
    assert printed.count("0.1 (50%)") == printed.count("memory reads: 0.2 GB/s") == 1


def test_read_bandwidth_is_that_of_the_fastest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0, 23.0, 30.0, 35.0, 40.0, 44.0])  # passes of 9, 2, 3, 5 and 4 seconds
    monkeypatch.setattr("tests.bench.read_bandwidth.time", SimpleNamespace(perf_counter=ticks.__next__))
    assert measure_read_bandwidth(num_bytes=8000) == 4000


def test_rows_without_a_peer() -> None:
    (row,) = make_rows(outcomes("ours", 5), ["c1"], {"ours": False})
    assert row.to_best_peer is None


def test_prompts_with_different_numbers_of_tokens(tmp_path: Path) -> None:
    piped = Target("piped", python("-c", PIPED), speaks_http=False)  # reports 9 tokens where the stub reports 8
    results = compare(comparison(tmp_path, stub("stub", tmp_path / "prompts"), piped), SILENT)
    assert different_prompts(results.outcomes) == [
        "round 1, talk: the number of prompt tokens differs between targets: {'stub': 32, 'piped': 36}",
        "round 1, read: the number of prompt tokens differs between targets: {'stub': 16, 'piped': 18}",
    ]


def test_memory_is_that_of_the_whole_tree() -> None:
    hold = "import sys, time; held = b'x' * 40_000_000; print('held', flush=True); sys.stdin.read()"
    both = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}]); "
    with subprocess.Popen([sys.executable, "-c", both], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        with MemoryWatch(process.pid) as memory:
            pass
        process.communicate()
    assert 45e6 < memory.num_bytes < 120e6


def parse(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Comparison:
    monkeypatch.setattr("sys.argv", ["peers", "compare", "/peers", *arguments])
    found = parse_arguments().comparison
    assert isinstance(found, Comparison)
    return found


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    found = parse(monkeypatch)
    assert [target.name for target in found.targets] == ["openvino", "llamacpp", "vllm", "lightwell"]
    assert [workload.name for workload in found.workloads] == ["c1", "c8", "c32", "prefill"]
    found = parse(monkeypatch, "--ours", "a=env X=1 serve --port {port}", "--ours", "b=serve {port}", "--workloads=c8")
    assert [target.name for target in found.targets] == ["openvino", "llamacpp", "vllm", "a", "b"]
    assert [target.is_peer for target in found.targets] == [True, True, True, False, False]
    assert found.targets[3].command == "env X=1 serve --port {port}"
    found = parse(monkeypatch, "--targets=vllm,lightwell", "--ours", "b=serve {port}", "--temperature=0.5")
    assert [target.name for target in found.targets] == ["vllm", "lightwell", "b"]
    assert found.load(found.workloads[0], 1).temperature == 0.5


def test_arguments_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    found = parse(monkeypatch, "--shape=3b:q4_k_m")
    assert [target.name for target in found.targets] == ["openvino", "llamacpp", "lightwell"]
    assert [workload.name for workload in found.workloads] == ["c1", "c4", "c16", "prefill"]
    openvino, llamacpp, lightwell = found.targets
    assert openvino.gguf is None
    assert "/peers/shapes/3b-q4_k_m-ov-int4 " in openvino.command
    assert llamacpp.gguf == lightwell.gguf == Path("/peers/shapes/3b-q4_k_m.gguf")
    assert "--model /peers/shapes/3b-q4_k_m.gguf " in llamacpp.command
    assert lightwell.command.endswith("serve /peers/shapes/3b-q4_k_m.gguf --port {port} --speculative off")
    found = parse(monkeypatch, "--shape=moe:q4_0", "--ours", "a=serve {model} {port}", "--ours", "b=serve {port}")
    assert [target.name for target in found.targets] == ["llamacpp", "a", "b"]
    assert found.targets[1].command == "serve /peers/shapes/moe-q4_0.gguf {port}"
    assert [target.gguf is None for target in found.targets] == [False, False, True]


def test_files_of_a_shape_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(*command: str | Path) -> None:
        commands.append(command)
        Path(command[-1]).write_text("written")

    monkeypatch.setattr("tests.bench.peers_setup.run", run)
    monkeypatch.setattr("tests.bench.peers_setup.resolve_model", lambda _: SimpleNamespace(path="tokenizer.gguf"))
    for _ in range(2):
        make_shape(tmp_path, "1b:q4_0", ["llamacpp", "lightwell"])
    assert [command[1:5] for command in commands] == [("-m", "tests.bench.random_gguf", "1b:q4_0", "tokenizer.gguf")]
    assert shape_files(tmp_path, "1b:q4_0").gguf.read_text() == "written"
    (tmp_path / "convert").mkdir()
    (tmp_path / "convert/installed").touch()
    for _ in range(2):
        make_shape(tmp_path, "1b:q4_0", ["openvino", "lightwell"])
    assert [Path(command[0]).name for command in commands[1:]] == ["python", "optimum-cli"]
    assert shape_files(tmp_path, "1b:q4_0").openvino.read_text() == "written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape=7b:q4_0"], "--shape: expected SHAPE:TYPES with one of 1b, 3b, moe and one of q4_0, q4_k_m, got"),
        (["--targets=vlm"], "unknown target 'vlm': expected one of openvino, llamacpp, vllm, lightwell"),
        (["--workloads=c1,c2"], "unknown workload 'c2'"),
        (["--targets="], "at least one target and one round"),
        (["--ours=serve {port}"], "--ours: expected NAME=COMMAND with {port} in COMMAND, got 'serve {port}'"),
        (["--ours=a=serve"], "--ours: expected NAME=COMMAND"),
        (["--ours=vllm=serve {port}"], "two targets have the same name"),
        (["--rounds=0"], "at least one target and one round"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(monkeypatch, *arguments)
    assert message in capsys.readouterr().err
