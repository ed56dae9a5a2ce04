"""Which batches torch's attention computes, and its arguments: on a CPU, with a plain attention instead."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from engine.kernels.interface import KernelOptions
from engine.kernels.triton import prompt_attention
from engine.kernels.triton.kernels import TritonKernels
from tests.parity.test_families import SHAPE
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.tiny_models import save_random_model
from tests.support.triton_models import SEED, load, prompt_of


class Library:
    """Replaces `varlen_attn`, and records the lengths that it is called with."""

    def __init__(self) -> None:
        self.signature = inspect.signature(varlen.varlen_attn)
        self.calls: list[tuple[list[int], list[int]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        call = self.signature.bind(*args, **kwargs).arguments
        q, k, v = call["query"], call["key"], call["value"]
        starts = [call[name] for name in ("cu_seq_q", "cu_seq_k")]
        assert (call["window_size"], call["enable_gqa"]) == ((-1, 0), True)
        assert [start.dtype for start in starts] == [torch.int32] * 2
        lens = [start.diff().tolist() for start in starts]
        assert [call["max_q"], call["max_k"]] == [max(some) for some in lens]
        self.calls.append((lens[0], lens[1]))
        parts = zip(q.split(lens[0]), k.split(lens[1]), v.split(lens[1]), strict=True)
        return torch.cat([self._one(*part, call["scale"]) for part in parts])

    def _one(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return the attention of the last rows of a sequence."""
        mask = torch.ones((len(q), len(k)), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).transpose(0, 1)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    stand_in = Library()
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(prompt_attention, "can_attend", lambda device, dtype: True)
    return stand_in


def model(window: int | None = None) -> PreTrainedModel:
    if window is None:
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window))


def test_whole_prompts(library: Library, tmp_path: Path) -> None:
    llama = model()
    loaded = load(save_random_model(llama, tmp_path, SEED), batch_invariant=False)
    texts = [prompt_of(length) for length in (40, 9, 21)]
    outputs = greedy_outputs(loaded, texts, 3)
    # The last layer computes only rows whose logits are needed; only the first step has nothing but prompts.
    *layers, last = library.calls
    assert layers == [([40, 9, 21], [40, 9, 21])] * (SHAPE["num_hidden_layers"] - 1)
    assert last == ([1, 1, 1], [40, 9, 21])
    for text, output in zip(texts, outputs, strict=True):
        with torch.inference_mode():
            expected = llama(torch.tensor([text + output])).logits[0]
        assert output == expected[len(text) - 1 : -1].argmax(dim=-1).tolist()
    torch.testing.assert_close(all_logits(loaded, texts[0]), expected_logits(llama, texts[0]), rtol=0, atol=1e-3)


def expected_logits(llama: PreTrainedModel, text: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = llama(torch.tensor([text])).logits[0]
    return logits


@pytest.mark.parametrize("settings", [{}, {"batch_invariant": False, "kv_cache_dtype": "int8"}], ids=str)
def test_not_where_answers_must_not_vary_or_the_cache_has_codes(
    library: Library, tmp_path: Path, settings: dict[str, Any]
) -> None:
    loaded = load(save_random_model(model(), tmp_path, SEED), **settings)
    greedy_outputs(loaded, [prompt_of(20)], 1)
    assert not library.calls


def test_not_with_a_window(library: Library, tmp_path: Path) -> None:
    loaded = load(save_random_model(model(window=37), tmp_path, SEED), batch_invariant=False)
    greedy_outputs(loaded, [prompt_of(20)], 1)
    assert not library.calls


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_only_on_a_gpu_in_half_precision(batch_invariant: bool) -> None:
    assert prompt_attention.IS_COMPLETE
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert prompt_attention.can_attend(torch.device("cuda"), dtype) == (dtype != torch.float32)
        kernels = TritonKernels(KernelOptions(dtype, batch_invariant=batch_invariant), torch.device("cpu"))
        assert not kernels.attends_to_prompts
