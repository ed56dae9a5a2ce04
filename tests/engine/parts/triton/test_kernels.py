"""A small model on the Triton kernels, in Triton's interpreter: batch invariance.

tests/parity/test_model_families.py compares whole models with transformers.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.parts.triton import kernels as triton_kernels
from engine.parts.triton.kernels import TritonKernels
from engine.parts.triton.tiles import AttentionTiles
from engine.shared.messages import SamplingParams, Submit
from engine.startup import fingerprint
from tests.support.answers import run
from tests.support.outputs import all_logits
from tests.support.tiny_models import SHAPE, save_random_model
from tests.support.triton_models import SEED, load, prompt_of

pytestmark = pytest.mark.long


@pytest.mark.parametrize(("dtype", "kv_cache_dtype"), [("float32", "int8"), ("float16", "fp8")])
def test_the_same_request_gets_the_same_answer(
    dtype: str, kv_cache_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are the same alone with split tiles, and in batches, chunks and with a cached prefix with whole ones."""
    folder = save_random_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path, SEED)
    loaded = load(folder, dtype, kv_cache_dtype=kv_cache_dtype)

    def submit(length: int) -> Submit:
        params = SamplingParams(max_tokens=4, temperature=1.0, seed=length, logprobs=2, ignore_eos=True)
        return Submit(request_id=str(length), prompt_token_ids=prompt_of(length), params=params, arrival=0.0)

    def engine(chunk: int = 0) -> Engine:
        return Engine(EngineConfig(model_path="", long_prefill_token_threshold=chunk), loaded)

    submits = [submit(5), submit(40)]
    kernels = loaded.runner.kernels
    assert isinstance(kernels, TritonKernels)
    # Several segments for the longer prompts.
    sizes = AttentionTiles(16, 16, 32, 4, 2, programs=4)
    monkeypatch.setattr(kernels, "tiles", dataclasses.replace(kernels.tiles, attention=sizes))
    loaded.runner.builder.planners = ()  # they were made for other tiles
    expected = run(engine(), submits[:1]) | run(engine(), submits[1:])
    logits = all_logits(loaded, prompt_of(20))  # are not rounded to the type of the model
    assert logits.dtype == torch.float32
    assert (logits != logits.half().float()).float().mean() > 0.5
    monkeypatch.setattr(triton_kernels, "num_multiprocessors", lambda device: 0)  # one program for each KV head
    warm = engine(chunk=17)
    assert run(warm, submits) == run(warm, submits) == expected
    assert warm.scheduler.stats.prompt_tokens_cached_total > 0


def test_without_the_promise(tmp_path: Path) -> None:
    """Products are torch's, and the fingerprint says that answers may vary."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True))
    folder = save_random_model(model, tmp_path, SEED)
    invariant, varying = load(folder), load(folder, batch_invariant=False)
    prompt = prompt_of(50)
    torch.testing.assert_close(all_logits(varying, prompt), all_logits(invariant, prompt), rtol=0, atol=1e-3)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(SEED))
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(SEED + 1))
    assert torch.equal(varying.runner.kernels.linear([weight])(x), torch.nn.functional.linear(x, weight))
    names = [fingerprint(str(folder), loaded) for loaded in (invariant, varying)]
    assert ["-invariant-" in name for name in names] == [True, False]
    assert ["-varying-" in name for name in names] == [False, True]
