"""The formulas of the GPU model against figures worked out by hand, and the tables that it prints."""

import json

import pytest

from tests.bench import gpu_model
from tests.bench.gpu_costs import COPY_SHARE, START, Cost, cost_of, time_of
from tests.support.gpu_cards import CARDS
from tests.support.gpu_shapes import SHAPES
from tests.support.gpu_trace import Launch
from tests.support.meta_models import Sequence, TracedStep, load_meta_model, model_config, traced_step

H100 = CARDS["h100"]
SHAPE = SHAPES["llama-3-8b"]


@pytest.fixture(scope="module")
def prefill() -> TracedStep:
    model = load_meta_model(model_config(SHAPE), H100, max_model_len=40960)
    return traced_step(model, [Sequence(0, 8192)])


@pytest.fixture(scope="module")
def decode() -> TracedStep:
    model = load_meta_model(model_config(SHAPE), H100, max_model_len=40960)
    return traced_step(model, [Sequence(1055)] * 8)


def launches(step: TracedStep, name: str) -> list[Launch]:
    return [launch for launch in step.launches if launch.name == name]


def test_a_prompt_computes_what_its_shape_says(prefill: TracedStep) -> None:
    """Two operations for a weight and a row, but in the last layer and the LM head, where one row is left."""
    found = sum(cost_of(launch, prefill, H100).tensor for launch in launches(prefill, "linear"))
    num_weights = SHAPE.num_weights_read - SHAPE.vocab_size * SHAPE.hidden_size
    layer = num_weights / SHAPE.num_layers
    kv_and_q = 3 / 2 * SHAPE.hidden_size**2
    expected = 2 * 8192 * (num_weights - layer + kv_and_q)
    assert found == pytest.approx(expected, rel=0.01)


def test_a_decoding_step_reads_what_its_shape_says(decode: TracedStep) -> None:
    names = ("linear", "attend")
    found = sum(cost_of(launch, decode, H100).memory for name in names for launch in launches(decode, name))
    assert found == pytest.approx(SHAPE.decode_bytes(8, 1056), rel=0.02)
    assert found > SHAPE.decode_bytes(8, 1056)


def test_keys_and_values_are_read_through_l2_for_each_tile(prefill: TracedStep) -> None:
    """Tiles of n packed rows of four heads read 8192 / 2 tokens of 8 heads on average."""
    launch = launches(prefill, "attend")[0]
    num_tiles = 8192 * 4 / launch.arguments["PACKED"]
    expected = num_tiles * 8192 / 2 * 8 * 2 * 128 * 2
    assert cost_of(launch, prefill, H100).l2 == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("shape", ["llama-3-8b"])
def test_every_kernel_has_a_formula(shape: str) -> None:
    params = {"temperature": 0.8, "top_p": 0.9, "logit_bias": {3: 1.0}, "presence_penalty": 0.5, "logprobs": 5}
    model = load_meta_model(model_config(SHAPES[shape]), H100, max_model_len=40960, max_loras=2)
    step = traced_step(model, [Sequence(1024)] * 3 + [Sequence(1024, 50)], 1, **params)
    assert {"draw", "collect", "penalise", "add_biases", "expand"} <= step.counts().keys()
    assert all(time_of(cost_of(launch, step, H100), H100).seconds >= START for launch in step.launches)


def test_time_is_that_of_the_slowest_part() -> None:
    assert time_of(Cost(memory=1e9, l2=1e9, programs=10**6), H100).bound == "memory"
    assert time_of(Cost(memory=1e9, l2=1e9), H100).seconds == pytest.approx(1e9 / (COPY_SHARE * 3.35e12) + START)
    assert time_of(Cost(l2=1e9), H100).bound == "L2"
    assert time_of(Cost(tensor=1e12, l2=1e6), H100).bound == "tensor cores"
    assert time_of(Cost(other=1e12), H100).bound == "arithmetic"
    assert time_of(Cost(memory=1e3, l2=1e3), H100).bound == "launch"


def test_few_programs_do_not_saturate_memory() -> None:
    """One program with 16 KiB in flight loads them once in each latency."""
    alone = time_of(Cost(memory=2**30, programs=1, in_flight=2**14), H100)
    assert alone.seconds == pytest.approx(2**30 / 2**14 * 0.7e-6, rel=0.01)
    many = time_of(Cost(memory=2**30, programs=1000, in_flight=2**14), H100)
    assert many.seconds < alone.seconds / 100


def test_a_long_program_keeps_the_others_waiting() -> None:
    cost = Cost(memory=2**30, programs=1000, in_flight=2**14, longest=2**24)
    assert time_of(cost, H100).bound == "longest program"
    assert time_of(cost, H100).seconds == pytest.approx(2**10 * 0.7e-6 + START)


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_model", "--card", "h100", "--shape", "tiny"])
    gpu_model.main()
    table = capsys.readouterr().out
    assert "tiny on H100 SXM, a model and not a measurement" in table
    assert all(f"| {name} |" in table for name in gpu_model.STEPS)
    assert "too few" not in table
    monkeypatch.setattr("sys.argv", ["gpu_model", "--card", "l4", "h100", "--shape", "tiny", "--json"])
    gpu_model.main()
    estimates = json.loads(capsys.readouterr().out)
    assert [found["card"] for found in estimates] == ["L4", "H100 SXM"]
    assert all(step["graph_seconds"] >= step["floor"] > 0 for found in estimates for step in found["steps"])


def test_steps_that_do_not_fit_are_named() -> None:
    """An L4 has 24 GB, of which 16 GB are weights: 5 GB for keys and values, of 128 KiB each token."""
    sequences = [Sequence(1055)] * 8
    found = gpu_model.estimate("llama-3-8b", CARDS["l4"], {"small": sequences, "large": sequences * 8})
    assert [step.name for step in found.steps] == ["small"]
    assert found.too_large == ["large"]
    assert 8 * 1056 < found.num_tokens < 64 * 1056
