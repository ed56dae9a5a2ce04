"""Torch's flash attention of prompts on a GPU, compared with Triton's kernel, for whole prompts and for chunks."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs
from engine.config import AttentionKind, KVShape
from engine.kernels.interface import AttentionScores, KernelOptions, LayerCache
from engine.kernels.triton import prompt_attention
from engine.kernels.triton.kernels import TritonKernels
from tests.support.kernel_device import DEVICE, ON_A_GPU

pytestmark = ON_A_GPU
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 2, 128, 32


def attend(
    options: KernelOptions, q: Tensor, cache: LayerCache, query_lens: list[int], seq_lens: list[int], window: int | None
) -> Tensor:
    kernels = TritonKernels(options, DEVICE)
    assert kernels.uses_flash_attention != options.batch_invariant
    blocks = -(-max(seq_lens) // BLOCK_SIZE)
    tables = torch.randperm(len(cache.keys), generator=torch.Generator().manual_seed(3))[: len(seq_lens) * blocks]
    row = torch.zeros(len(q), dtype=torch.int64, device=DEVICE)
    lens, block_tables = np.array(query_lens), tables.view(-1, blocks).to(DEVICE)
    batch = BatchInputs(*(row,) * 8, [row], [block_tables], lens, lens, np.array(seq_lens))
    plan = kernels.plan_attention(batch, lens, AttentionKind(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, window), 0)
    # It may replace q.
    return kernels.paged_attention(q.clone(), cache, plan, block_tables, AttentionScores(HEAD_DIM**-0.5))


@pytest.mark.parametrize("most_gathered", [2**28, 2**20], ids=["all heads", "one at a time"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_as_triton(
    dtype: torch.dtype, window: int | None, most_gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding rows, a whole prompt, and chunks after cached tokens: the last row must see the last key."""
    monkeypatch.setattr(prompt_attention, "MAX_GATHERED_BYTES", most_gathered)
    query_lens, seq_lens = [1, 1, 300, 200, 3], [700, 33, 300, 1000, 90]
    generator = torch.Generator(DEVICE).manual_seed(3)
    q = torch.randn((sum(query_lens), NUM_HEADS, HEAD_DIM), dtype=dtype, device=DEVICE, generator=generator)
    size = (2, 200, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    stored = torch.randn(size, dtype=dtype, device=DEVICE, generator=generator)
    cache = LayerCache(KVShape(NUM_KV_HEADS, HEAD_DIM), *stored)
    options = KernelOptions(dtype, head_dims=frozenset({HEAD_DIM}))
    varying = dataclasses.replace(options, batch_invariant=False)
    expected, found = (attend(some, q, cache, query_lens, seq_lens, window) for some in (options, varying))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert not torch.equal(found, expected)
    assert torch.equal(found[:2], expected[:2])
