"""SmolLM2 on a GPU: the distributions of the CPU engine, and batch invariance with real kernels and graphs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine.config import EngineConfig, load_model_config
from engine.loading import LoadedModel, load_model
from engine.parts.triton.cuda_graphs import SIZES, GraphedExecution
from engine.sampling.logprobs import gather_logprobs
from engine.shared.messages import SamplingParams, Submit
from engine.startup import capture_graphs
from server.text.tokenizer import Tokenizer
from tests.bench.quality import TEXT
from tests.engine.test_promise import requests
from tests.support.answers import assert_same, make_engine, run, run_alone
from tests.support.kernel_device import ON_A_GPU
from tests.support.lora_adapters import save_random_adapter
from tests.support.outputs import all_logits, fingerprint_of

pytestmark = ON_A_GPU
MAX_MODEL_LEN = 1024
SETTINGS: list[dict[str, Any]] = [
    {},
    {"quantization": "none"},
    {"quantization": "int8"},
    {"kv_cache_dtype": "int8"},
    {"kv_cache_dtype": "fp8"},
    {"enforce_eager": True},
]
# Torch warns when the mode that detects waits is first used.
ignores_warning = pytest.mark.filterwarnings("ignore:Synchronization debug mode")
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def load(path: Path, **settings: Any) -> LoadedModel:
    loaded = load_model(
        EngineConfig(model_path=str(path), max_model_len=MAX_MODEL_LEN, kv_cache_memory=2**30, **settings)
    )
    capture_graphs(loaded.runner)
    return loaded


@pytest.fixture(scope="module")
def submits() -> list[Submit]:
    return requests((5, 8, 17, 31, 32, 33, 64, 100, 128, 200, 255, 256, 257, 400, 700, 900))


@each_setting
def test_distributions_of_the_cpu(smollm2_path: Path, settings: dict[str, Any]) -> None:
    token_ids = Tokenizer.from_model(smollm2_path).encode(TEXT.read_text(), add_special_tokens=False)[:500]
    expected = all_logits(load(smollm2_path, device="cpu", dtype="float32", quantization="none"), token_ids)
    found = all_logits(load(smollm2_path, device="cuda", **settings), token_ids).cpu()
    expected, found = expected.double().log_softmax(dim=1), found.double().log_softmax(dim=1)
    assert float((expected.exp() * (expected - found)).sum(dim=1).mean()) < 0.006
    assert float((expected.argmax(dim=1) == found.argmax(dim=1)).double().mean()) > 0.94


@each_setting
def test_the_same_answer_in_any_company(
    smollm2_path: Path, submits: Sequence[Submit], settings: dict[str, Any]
) -> None:
    """Answers are the same alone and together, in chunks, after preemption, with a warm cache, and in graphs."""
    loaded = load(smollm2_path, device="cuda", **settings)
    assert loaded.runner.kernels.deterministic
    expected = run_alone(loaded, submits)
    assert_same(run(make_engine(loaded), submits), expected)
    assert_same(run(make_engine(loaded, chunk=60, seqs=3), submits), expected)
    engine = make_engine(loaded, num_blocks=MAX_MODEL_LEN // 32)
    engine.scheduler.kv.watermark = 0
    assert_same(run(engine, submits), expected)
    assert engine.scheduler.current_stats().preemptions_total > 0
    assert_same(run(engine, submits), expected)
    execution = engine.runner.execution
    assert isinstance(execution, GraphedExecution) != settings.get("enforce_eager", False)
    if isinstance(execution, GraphedExecution):
        assert not execution.uncaptured
        assert sorted(execution.graphs) == [(size, False) for size in SIZES if size <= 128]  # max_num_seqs


def test_adapters_in_any_company(smollm2_path: Path, tmp_path: Path, submits: Sequence[Submit]) -> None:
    """Rows with one of two adapters and without share batches, in graphs and in steps with prompts."""
    config = load_model_config(smollm2_path)
    modules = {
        name: str(save_random_adapter(tmp_path / name, config, seed, ranks={"": rank}))
        for seed, (name, rank) in enumerate({"a": 16, "b": 5}.items())
    }
    loaded = load(smollm2_path, device="cuda", lora_modules=modules, max_loras=2)
    names = ("", "a", "b")
    fingerprints = {name: fingerprint_of(loaded, name) for name in names}
    mixed = [
        msgspec.structs.replace(submit, lora_name=names[i % 3], lora_fingerprint=fingerprints[names[i % 3]])
        for i, submit in enumerate(submits)
    ]
    expected = run_alone(loaded, mixed)
    assert run_alone(loaded, submits) != expected
    for _ in range(2):
        assert_same(run(make_engine(loaded, chunk=60), mixed), expected)


def test_steps_that_run_out_of_memory(
    smollm2_path: Path, submits: Sequence[Submit], caplog: pytest.LogCaptureFixture
) -> None:
    """They are taken back and halved, and all answers stay the same."""
    loaded = load(smollm2_path, device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    expected = run(make_engine(loaded), submits)
    needed = torch.cuda.max_memory_allocated() - held
    assert "needs more memory" not in caplog.text
    with room_for(needed // 2):
        found = run(make_engine(loaded), submits)
    assert "needs more memory than the device has free" in caplog.text
    assert_same(found, expected)


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Return a context in which this process may allocate so many bytes of device memory, and no more."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    held = torch.cuda.memory_reserved()
    fillers = []
    try:
        torch.cuda.set_per_process_memory_fraction(held / total)
        for size in (2**24, 2**22, 2**20):  # what is free within the memory that torch holds
            with suppress(torch.OutOfMemoryError):
                while True:
                    fillers.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        torch.cuda.set_per_process_memory_fraction((held + num_bytes) / total)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@ignores_warning
def test_steps_are_launched_without_a_wait(
    smollm2_path: Path, submits: Sequence[Submit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After kernels are compiled and graphs captured. tests/engine/parts/triton/test_waits.py tests all settings."""
    loaded = load(smollm2_path, device="cuda")
    not_waiting = [submit for submit in submits if not uses_mirostat(submit.params)]
    expected = run(make_engine(loaded), not_waiting)
    engine = make_engine(loaded)
    for name in ("forward", "sample"):
        monkeypatch.setattr(engine.runner, name, without_waits(getattr(engine.runner, name)))
    assert_same(run(engine, not_waiting), expected)


def uses_mirostat(params: SamplingParams) -> bool:
    """Return whether the host reads each token before it sets the limit for the next one."""
    return params.extra_samplers is not None and params.extra_samplers.mirostat > 0


def without_waits(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return method(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


@ignores_warning
def test_log_probabilities_are_those_of_the_cpu_and_do_not_wait() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 49_152, generator=generator).round(decimals=2)  # with many ties
    token_ids = torch.randint(49_152, (9,), generator=generator)
    num_top, named_ids = [20, 0, 5, 1, 2, 3, 4, 5, 20], [(), (7, 9), (), (), (), (), (), (), ()]
    expected = gather_logprobs(logits, token_ids, num_top, named_ids).read()
    on_device = logits.cuda(), token_ids.cuda()
    pending = without_waits(gather_logprobs)(*on_device, num_top, named_ids)
    for entry, found in zip(expected, pending.read(), strict=True):
        assert (found.rank, found.top_token_ids) == (entry.rank, entry.top_token_ids)
        assert [found.logprob, *found.top_logprobs] == pytest.approx([entry.logprob, *entry.top_logprobs], abs=1e-4)
