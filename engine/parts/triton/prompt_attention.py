"""Attention of prompts by torch's flash attention, which is faster, but adds up in an order that depends on the batch.

It knows neither sinks nor soft caps, and needs contiguous keys and values. (Paged ones would have to be in blocks of
256 tokens, and gave wrong results in torch 2.13: pytorch#194167.) So those of the prompts' sequences are gathered from
the cache, by groups of heads if they are many. A prompt may be whole or a chunk that follows cached tokens.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import varlen

from engine.batch.inputs import BatchInputs, Lengths
from engine.batch.transfer import to_device
from engine.config import AttentionKind
from engine.kernels.interface import KernelOptions, LayerCache

MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)
MIN_ROWS = 64  # of a sequence: fewer read its keys so few times that gathering them would take longer
MAX_GATHERED_BYTES = 256 * 2**20  # keys and values; an MLP takes about as much for a few thousand rows
PARAMETERS = {"scale", "window_size", "enable_gqa"}


@dataclass(frozen=True)
class PromptPlan:
    """The last sequences of a batch, as torch's flash attention takes them, and which of their tokens it reads."""

    first_sequence: int  # the first of them: those before, with few rows, are left to Triton's kernel
    first_row: int
    # Of the tokens that some row sees, int64 [K]: the row and column of its block in the block tables, and its place in
    # the block.
    sequences: Tensor
    columns: Tensor
    offsets: Tensor
    query_starts: Tensor  # int32 [P + 1]
    key_starts: Tensor  # int32 [P + 1]
    longest_query: int
    longest_key: int  # tokens of the longest sequence
    num_heads: int  # KV heads whose keys and values are gathered at a time
    window: int | None


def unsupported_reason(options: KernelOptions, capability: tuple[int, int] | None) -> str | None:
    """Return why torch's flash attention cannot compute a model's prompts; None if it can.

    `capability` is that of an NVIDIA GPU, None for other devices.
    """
    if capability is None or capability < MIN_CAPABILITY:
        return "it needs an NVIDIA GPU of compute capability 8.0 or higher"
    if options.dtype not in (torch.float16, torch.bfloat16):
        return f"it does not compute in {str(options.dtype).removeprefix('torch.')}"
    if options.kv_cache_dtype != "auto":
        return f"it does not read a KV cache of {options.kv_cache_dtype}"
    for head_dim in sorted(options.head_dims):
        if head_dim > MAX_HEAD_DIM or head_dim % 8:
            return f"the head size must be a multiple of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    if options.has_special_scores:
        return "it knows neither sinks nor soft caps"
    if not set(inspect.signature(varlen.varlen_attn).parameters) >= PARAMETERS:
        return f"that of PyTorch {torch.__version__} lacks one of {', '.join(sorted(PARAMETERS))}"
    return None


def plan_prompts(
    batch: BatchInputs, query_lens: Lengths, kind: AttentionKind, block_size: int, dtype: torch.dtype
) -> PromptPlan | None:
    """Return the plan for the last `query_lens` rows of each sequence, from the first one with many rows on.

    Returns None if there is none, or if the keys and values of one head are too many to be gathered.
    """
    has_many = query_lens >= MIN_ROWS
    first = int(has_many.argmax())
    first_row = int(query_lens[:first].sum())
    query_lens, seq_lens = np.stack((query_lens, batch.seq_lens))[:, first:]
    # Of a sequence, tokens before the window of its first row are not gathered: their blocks may hold anything.
    key_lens = seq_lens if kind.window is None else np.minimum(seq_lens, query_lens + kind.window - 1)
    num_keys = int(key_lens.sum())
    num_heads = _heads_at_a_time(kind, num_keys, dtype)
    if not has_many.any() or num_heads is None:
        return None
    starts = np.zeros((2, len(query_lens) + 1), dtype=np.int64)
    np.cumsum((query_lens, key_lens), axis=1, out=starts[:, 1:])
    device = batch.slot_mappings[0].device
    query_starts, key_starts = to_device(starts, np.int32, device)
    skipped = to_device(starts[1, :-1] - (seq_lens - key_lens), np.int64, device)
    tokens = torch.arange(num_keys, device=device)
    sequences = torch.searchsorted(key_starts[1:], tokens, right=True)
    positions = tokens - skipped[sequences]
    return PromptPlan(
        first,
        first_row,
        sequences + first,
        positions // block_size,
        positions % block_size,
        query_starts,
        key_starts,
        int(query_lens.max()),
        int(key_lens.max()),
        num_heads,
        kind.window,
    )


def _heads_at_a_time(kind: AttentionKind, num_tokens: int, dtype: torch.dtype) -> int | None:
    """Return the largest number of KV heads, a divisor of all, whose keys and values may be gathered together."""
    head_bytes = 2 * num_tokens * kind.head_dim * dtype.itemsize
    numbers = (num for num in range(kind.num_kv_heads, 0, -1) if kind.num_kv_heads % num == 0)
    return next((num for num in numbers if num * head_bytes <= MAX_GATHERED_BYTES), None)


def prompt_attention(q: Tensor, cache: LayerCache, plan: PromptPlan, block_tables: Tensor, scale: float) -> None:
    """Replace the rows of the plan's sequences in q [T, H, D] by their causal attention.

    A row at position p sees positions max(0, p - window + 1) .. p.
    """
    _, _, num_kv_heads, _ = cache.keys.shape
    group_size = q.shape[1] // num_kv_heads
    visible = (-1 if plan.window is None else plan.window - 1, 0)  # tokens before and after the row's own
    lengths = (plan.query_starts, plan.key_starts, plan.longest_query, plan.longest_key)
    tokens = (block_tables[plan.sequences, plan.columns], plan.offsets)
    for first in range(0, num_kv_heads, plan.num_heads):
        last = first + plan.num_heads
        rows = q[plan.first_row :, first * group_size : last * group_size]
        keys, values = (stored[:, :, first:last][tokens] for stored in (cache.keys, cache.values))
        out = varlen.varlen_attn(rows, keys, values, *lengths, scale=scale, window_size=visible, enable_gqa=True)
        assert isinstance(out, Tensor)
        rows.copy_(out)
