"""The benchmark of GPUs as a whole, with a tiny model on a CPU, beside a vLLM that is made of a few lines."""

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench import gpu, gpu_timing
from tests.support.gpu_cards import CARDS
from tests.support.gpu_shapes import SHAPES, decode_attention_name, decode_name, prefill_name, prompt_attention_name

ARGUMENTS = ["gpu", "--shape", "tiny", "--device", "cpu", "--streams", "1", "3", "--context", "16", "--prompt", "40"]

# Its clock says 4 ms for each token, half as much in its batch-invariant mode. Checks what it is called with.
FAKE_VLLM = """
import os, time
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, *, model, skip_tokenizer_init, dtype, enable_prefix_caching, **sizes):
        assert os.path.isfile(os.path.join(model, "model.safetensors.index.json"))
        self.seconds = 0.004 / (1 + (os.environ["VLLM_BATCH_INVARIANT"] == "1"))
        self.now = 0.0
        time.perf_counter = lambda: self.now

    def generate(self, prompts, params, use_tqdm):
        assert all(len(prompt["prompt_token_ids"]) in (16, 40) for prompt in prompts)
        self.now += self.seconds * params.max_tokens
        print("other output")
        ids = [0] * params.max_tokens
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for _ in prompts]
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> gpu.Results:
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "vllm.py").write_text(FAKE_VLLM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setattr(gpu, "NUM_GENERATED", 5)
        patch.setattr(gpu_timing, "REPLAYS", 2)
        arguments = gpu.make_parser().parse_args([*ARGUMENTS[1:], "--attention", "2", "64", "--vllm", sys.executable])
        return gpu.measure(gpu.bench_of(arguments), arguments.attention, arguments.vllm)


def test_everything_is_measured(results: gpu.Results) -> None:
    steps = {decode_name(1), decode_name(3), prefill_name(40)}
    attention = {decode_attention_name(2, 64), prompt_attention_name(40)}
    expected = {
        gpu.OURS: steps | attention,
        gpu.FASTER: steps,
        gpu.TRANSFORMERS: {decode_name(3)},
        gpu.VLLM: steps,
        gpu.VLLM_INVARIANT: steps,
    }
    assert {mode: {f.name for f in results.figures if f.mode == mode} for mode in expected} == expected
    assert all(figure.seconds > 0 and figure.floor > 0 for figure in results.figures)
    assert (results.device, results.model) == ("cpu", "tiny")


def test_the_limits_are_those_of_the_shape(results: gpu.Results) -> None:
    """Each matrix but the embeddings once, in bfloat16, and keys and values of 16 tokens and half of the generated."""
    size, kv_size, inner, vocab_size = 256, 2 * 64, 512, 1024
    num_weights = 2 * (2 * size * size + 2 * kv_size * size + 3 * inner * size + 2 * size) + size + vocab_size * size
    num_bytes = 2 * num_weights + 3 * 18 * 2 * 2 * 2 * kv_size
    figure = next(figure for figure in results.figures if figure.name == decode_name(3))
    assert figure.floor * results.copy_bytes_per_second == pytest.approx(num_bytes)
    assert SHAPES["tiny"].num_weights_read == num_weights


def test_vllm_runs_in_each_mode(results: gpu.Results) -> None:
    found = {mode: [f.seconds for f in results.figures if f.mode == mode] for mode in (gpu.VLLM, gpu.VLLM_INVARIANT)}
    assert found[gpu.VLLM] == pytest.approx([0.004] * 3)
    assert found[gpu.VLLM_INVARIANT] == pytest.approx([0.002] * 3)
    others = [ratio.name for ratio in results.ratios if "vLLM" in ratio.name]
    assert len(others) == 4
    assert {ratio.target for ratio in results.ratios} == {None, 1.5, 0.9}


def test_figures_have_targets_and_what_is_expected() -> None:
    figure = gpu.Figure(decode_name(64), gpu.OURS, 2.0, 1.0)
    found = gpu.with_target(figure, {decode_name(64): 0.7})
    assert (found.share, found.target, found.expected) == (0.5, 0.85, 0.7)
    other = gpu.Figure(decode_name(64), gpu.VLLM, 2.0, 1.0)
    assert gpu.with_target(other, {decode_name(64): 0.7}) == other


def test_what_is_expected_of_a_known_card() -> None:
    bench = gpu.Bench("tiny", torch.device("cpu"), [1, 2], 64, 128, copy=1.0, product=1.0)
    found = gpu.expected_shares(bench, "NVIDIA H100 80GB HBM3", (2, 96))
    attention = {decode_attention_name(2, 96), prompt_attention_name(128)}
    assert set(found) == {decode_name(1), decode_name(2), prefill_name(128)} | attention
    assert all(0 < share < 1 for share in found.values())
    for name, is_known in (("A100-SXM4-80GB", True), ("L4", True), ("L40S", False), ("Other 3000", False)):
        assert bool(gpu.expected_shares(bench, f"NVIDIA {name}", (2, 96))) == is_known, name
    assert [card.name.split()[0] for card in CARDS.values()] == ["H100", "A100", "L4"]


def test_output(results: gpu.Results, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "measure", lambda *_: results)
    monkeypatch.setattr("sys.argv", [*ARGUMENTS, "--json"])
    gpu.main()
    assert len(json.loads(capsys.readouterr().out)["figures"]) == len(results.figures)
    monkeypatch.setattr("sys.argv", ARGUMENTS)
    gpu.main()
    printed = capsys.readouterr().out
    assert "beside vLLM" in printed
    assert "target" in printed


def test_steps_and_gaps_are_times_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps: work of 3 + 1 ms and a gap of 2, a gap of 4, then work of 5 + 1 ms."""
    times = iter([0.0, 0.003, 0.005, 0.006, 0.010, 0.015, 0.015, 0.016])
    monkeypatch.setattr(gpu_timing, "time", SimpleNamespace(perf_counter=times.__next__))
    model: Any = SimpleNamespace(forward=lambda step, clock: None, sample=lambda step, batch, clock: None, kernels=1)
    runner = gpu_timing.TimedRunner(model, torch.device("cpu"))
    nothing: Any = SimpleNamespace(num_tokens=7)
    for _ in range(2):
        runner.forward(nothing, nothing)
        runner.sample(nothing, nothing, nothing)
    assert runner.kernels == 1
    assert runner.num_tokens == [7, 7]
    assert runner.step_seconds() == pytest.approx([0.010, 0.006])
    assert runner.idle_seconds(2) == pytest.approx(0.006)


def test_a_failure_leaves_the_other_figures(capsys: pytest.CaptureFixture[str]) -> None:
    def figures() -> Iterator[gpu.Figure]:
        yield gpu.Figure("decode", gpu.OURS, 0.0125, 0.01)
        raise RuntimeError("no memory")

    assert [figure.name for figure in gpu.until_failure(figures())] == ["decode"]
    printed = capsys.readouterr().err
    assert printed.startswith("decode, default: 12.500 ms\n")
    assert "RuntimeError: no memory" in printed
