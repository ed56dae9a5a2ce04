"""Which rows torch's flash attention computes, and its arguments: on a CPU, with a plain attention instead."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from transformers import MistralConfig, MistralForCausalLM

from engine.config import AttentionKind, KVShape
from engine.kernels.interface import KernelOptions
from engine.parts.triton import prompt_attention
from engine.parts.triton.kernels import TritonKernels, new_kv_cache
from engine.parts.triton.prompt_attention import plan_prompts, unsupported_reason
from tests.engine.parts.triton.test_waits import Waits
from tests.support.kernel_device import ON_A_GPU
from tests.support.kernel_kinds import Kind
from tests.support.outputs import all_logits, greedy_outputs
from tests.support.paged_attention import Paged, Shape, batch_of
from tests.support.tiny_models import SHAPE, save_random_model
from tests.support.triton_models import SEED, load, prompt_of

HALF = KernelOptions(torch.bfloat16)


class Library:
    """Replaces `varlen_attn`, and records the lengths that it is called with, and the number of KV heads."""

    def __init__(self) -> None:
        self.signature = inspect.signature(varlen.varlen_attn)
        self.calls: list[tuple[list[int], list[int]]] = []
        self.num_heads: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        call = self.signature.bind(*args, **kwargs).arguments
        q, k, v = call["query"], call["key"], call["value"]
        assert q.stride(2) == 1
        assert k.is_contiguous()
        assert v.is_contiguous()
        starts = [call[name] for name in ("cu_seq_q", "cu_seq_k")]
        assert call["enable_gqa"]
        assert [start.dtype for start in starts] == [torch.int32] * 2
        lens = [start.diff().tolist() for start in starts]
        assert [call["max_q"], call["max_k"]] == [max(some) for some in lens]
        self.calls.append((lens[0], lens[1]))
        self.num_heads.append(k.shape[1])
        left, right = call["window_size"]
        assert right == 0
        num_keys, outs = lens[1], []
        parts = [torch.split(x, n) for x, n in ((q, lens[0]), (k, num_keys), (v, num_keys))]
        for some in zip(*parts, strict=True):
            q, k, v = (part.transpose(0, 1) for part in some)
            num_before = k.shape[1] - q.shape[1]
            mask = torch.ones((q.shape[1], k.shape[1]), dtype=torch.bool).tril(num_before)
            mask = mask if left == -1 else mask.triu(num_before - left)  # keys up to `left` tokens before a row's own
            outs.append(F.scaled_dot_product_attention(q, k, v, mask, scale=call["scale"], enable_gqa=True))
        return torch.cat(outs, dim=1).transpose(0, 1)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    stand_in = Library()
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(prompt_attention, "unsupported_reason", lambda options, capability: None)
    monkeypatch.setattr(prompt_attention, "MIN_ROWS", 4)
    return stand_in


def paged(seq_lens: list[int], window: int | None = None, num_kv_heads: int = 2) -> Paged:
    return Paged(Kind("triton"), Shape(num_kv_heads, 2, 16, 16, window), seq_lens, SEED, batch_invariant=False)


def assert_right(paged: Paged, spans: list[tuple[int, int, int]]) -> None:
    for out, (sequence, start, end) in zip(paged.attend(spans), spans, strict=True):
        if start < end:
            torch.testing.assert_close(out.double(), paged.expected(sequence, start, end), rtol=2e-5, atol=2e-5)


MIXED = [(0, 39, 40), (1, 8, 9), (2, 0, 20), (3, 20, 50), (4, 33, 35)]  # sequence, first row, row after the last


@pytest.mark.parametrize("window", [None, 1, 11, 100])
def test_chunks_among_other_rows(library: Library, window: int | None) -> None:
    """Rows of generating requests come first, and stay with Triton's kernel; chunks follow cached tokens.

    What lies before the window is not read.
    """
    some = paged([40, 9, 20, 50, 35], window)
    if window is not None:
        some.forget_before(3, 20 - window + 1)
        some.forget_before(4, 33 - window + 1)
    assert_right(some, MIXED)
    before = 50 if window is None else window - 1  # tokens that a sequence's first row sees
    key_lens = [20, min(50, 30 + before), min(35, 2 + before)]
    assert library.calls == [([20, 30, 2], key_lens)]


@pytest.mark.parametrize(
    ("spans", "calls"),
    [
        ([(0, 0, 40)], [([40], [40])]),
        ([(0, 36, 40)], [([4], [40])]),
        ([(0, 37, 40)], []),  # too few rows
        ([(0, 39, 40), (1, 8, 9)], []),
        ([(0, 40, 40), (1, 0, 9), (2, 19, 20)], [([9, 1], [9, 20])]),  # no row of the first is computed
        ([(1, 0, 9), (0, 40, 40)], [([9, 0], [9, 40])]),
    ],
    ids=str,
)
def test_which_rows(
    library: Library, spans: list[tuple[int, int, int]], calls: list[tuple[list[int], list[int]]]
) -> None:
    assert_right(paged([40, 9, 20]), spans)
    assert library.calls == calls


KEY_BYTES = 2 * 105 * 16 * 4  # of one head of the chunks in MIXED and their values


@pytest.mark.parametrize(("num_at_a_time", "found"), [(6, [6]), (5, [3, 3]), (2, [2, 2, 2]), (1, [1] * 6), (0, [])])
def test_heads_are_gathered_by_groups_if_they_are_many(
    library: Library, num_at_a_time: int, found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one head is too much, Triton's kernel computes all."""
    monkeypatch.setattr(prompt_attention, "MAX_GATHERED_BYTES", num_at_a_time * KEY_BYTES + KEY_BYTES // 2)
    assert_right(paged([40, 9, 20, 50, 35], num_kv_heads=6), MIXED)
    assert library.num_heads == found


def test_nothing_waits_for_the_device(library: Library) -> None:
    some = paged([40, 9])
    lens = np.array([9, 9])
    batch = batch_of(lens, np.array([40, 9]))
    q, tables = torch.randn(18, 4, 16), torch.zeros((2, 3), dtype=torch.int64)
    waits = Waits()
    with waits:
        plan = plan_prompts(batch, lens, some.shape.kind, 16, torch.float32)
        assert plan is not None
        with torch._C.DisableTorchFunction():
            prompt_attention.prompt_attention(q, some.cache, plan, tables, 1.0)
    assert waits.found == []
    assert library.calls == [([9, 9], [40, 9])]


@pytest.mark.parametrize("most_gathered", [2**28, 2**20], ids=["all heads", "one at a time"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=ON_A_GPU) for dtype in (torch.bfloat16, torch.float16)])
def test_same_as_triton(
    dtype: torch.dtype, window: int | None, most_gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding rows, a whole prompt, and chunks after cached tokens: the last row must see the last key."""
    monkeypatch.setattr(prompt_attention, "MAX_GATHERED_BYTES", most_gathered)
    kind, shape, seq_lens = Kind("triton", dtype), Shape(2, 4, 128, 32, window), [700, 33, 300, 1000, 90]
    options: dict[str, Any] = {"head_dims": frozenset({128})}
    expected, found = (Paged(kind, shape, seq_lens, SEED, batch_invariant=some, **options) for some in (True, False))
    assert not expected.kernels.uses_flash_attention
    assert found.kernels.uses_flash_attention
    spans = [(0, 699, 700), (1, 32, 33), (2, 0, 300), (3, 800, 1000), (4, 87, 90)]
    expected_out, out = (torch.cat(some.attend(spans)) for some in (expected, found))
    torch.testing.assert_close(out, expected_out, rtol=2e-2, atol=2e-2)
    assert not torch.equal(out, expected_out)
    assert torch.equal(out[:2], expected_out[:2])


@pytest.mark.parametrize("window", [None, 11])
def test_torch_takes_the_arguments(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where torch checks them and computes nothing."""
    monkeypatch.setattr(prompt_attention, "MIN_ROWS", 4)
    meta = torch.device("meta")
    cache = new_kv_cache([[KVShape(2, 64)]], 5, 16, torch.bfloat16, meta)[0][0]
    lens = np.array([20])
    kind = AttentionKind(8, 2, 64, window)
    plan = plan_prompts(batch_of(lens, lens), lens, kind, 16, torch.bfloat16)
    assert plan is not None
    names = ("sequences", "columns", "offsets", "query_starts", "key_starts")
    tensors: dict[str, Any] = {name: getattr(plan, name).to(meta) for name in names}
    plan = dataclasses.replace(plan, **tensors)
    q = torch.empty((20, 8, 64), dtype=torch.bfloat16, device=meta)
    prompt_attention.prompt_attention(q, cache, plan, torch.zeros((1, 2), dtype=torch.int64, device=meta), 0.1)


@pytest.mark.long
def test_a_whole_model(library: Library, tmp_path: Path) -> None:
    """The second prompt is computed in two steps, beside the first request's tokens."""
    llama = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=13))
    folder = save_random_model(llama, tmp_path, SEED)
    loaded = load(folder, batch_invariant=False, max_num_batched_tokens=32, max_num_seqs=4)
    texts = [prompt_of(length) for length in (24, 21)]
    outputs = greedy_outputs(loaded, texts, 3)
    # The last layer computes only rows whose logits are needed, which are few.
    num_layers = SHAPE["num_hidden_layers"] - 1
    assert library.calls == [([24, 8], [24, 8])] * num_layers + [([13], [21])] * num_layers
    for text, output in zip(texts, outputs, strict=True):
        with torch.inference_mode():
            expected = llama(torch.tensor([text + output])).logits[0]
        assert output == expected[len(text) - 1 : -1].argmax(dim=-1).tolist()
    logits = all_logits(loaded, texts[0])
    with torch.inference_mode():
        torch.testing.assert_close(logits, llama(torch.tensor([texts[0]])).logits[0], rtol=0, atol=1e-3)
    library.calls.clear()
    greedy_outputs(load(folder), texts[:1], 1)  # where answers must not vary
    assert not library.calls


@pytest.mark.parametrize(
    ("changes", "capability", "reason"),
    [
        ({}, (8, 0), None),
        ({"dtype": torch.float16, "head_dims": frozenset({64, 256})}, (9, 0), None),
        ({}, None, "it needs an NVIDIA GPU of compute capability 8.0 or higher"),
        ({}, (7, 5), "it needs an NVIDIA GPU of compute capability 8.0 or higher"),
        ({"dtype": torch.float32}, (9, 0), "it does not compute in float32"),
        ({"has_special_scores": True}, (9, 0), "it knows neither sinks nor soft caps"),
        ({"kv_cache_dtype": "int8"}, (9, 0), "it does not read a KV cache of int8"),
        ({"head_dims": frozenset({100})}, (9, 0), "the head size must be a multiple of 8 up to 256, not 100"),
        ({"head_dims": frozenset({64, 264})}, (9, 0), "the head size must be a multiple of 8 up to 256, not 264"),
    ],
)
def test_what_it_lacks(changes: dict[str, Any], capability: tuple[int, int] | None, reason: str | None) -> None:
    assert unsupported_reason(dataclasses.replace(HALF, **changes), capability) == reason


def test_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *, scale: None)
    reason = unsupported_reason(HALF, (9, 0))
    assert reason == f"that of PyTorch {torch.__version__} lacks one of enable_gqa, scale, window_size"


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_the_log_says_why_it_is_not_used(batch_invariant: bool, caplog: pytest.LogCaptureFixture) -> None:
    options = dataclasses.replace(HALF, batch_invariant=batch_invariant)
    assert not TritonKernels(options, torch.device("cpu")).uses_flash_attention
    messages = [message for message in caplog.messages if "flash attention, which is faster" in message]
    assert len(messages) == (not batch_invariant)
