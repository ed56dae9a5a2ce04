"""Attention of whole prompts by torch's flash attention.

It is faster for long prompts, but adds up in a different order. It needs contiguous keys and values, so it is used for
batches in which every sequence begins: their keys and values are those that the batch itself stores.
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
from engine.kernels.interface import LayerCache

MAX_HEAD_DIM = 256
IS_COMPLETE = {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen.varlen_attn).parameters)


@dataclass(frozen=True)
class PromptPlan:
    """The lengths of whole prompts, as torch's flash attention takes them."""

    slot_mapping: Tensor  # [T], of all keys and values
    query_starts: Tensor  # int32 [S + 1]
    key_starts: Tensor  # int32 [S + 1]
    longest_query: int
    longest_key: int  # tokens of the longest sequence


def can_attend(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch's flash attention runs on a device with a dtype."""
    return IS_COMPLETE and device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def plan_prompts(batch: BatchInputs, query_lens: Lengths, cache: LayerCache) -> PromptPlan | None:
    """Return the plan of `prompt_attention` for the last `query_lens` rows of each sequence.

    Returns None if the head size is not supported, there are no rows, or a sequence began in an earlier batch.
    """
    head_dim = cache.keys.shape[3]
    is_supported = head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0 and query_lens.any()
    if not is_supported or (batch.query_lens != batch.seq_lens).any():
        return None
    starts = np.zeros((2, len(query_lens) + 1), dtype=np.int32)
    np.cumsum((query_lens, batch.seq_lens), axis=1, out=starts[:, 1:])
    query_starts, key_starts = to_device(starts, np.int32, batch.slot_mapping.device)
    return PromptPlan(batch.slot_mapping, query_starts, key_starts, int(query_lens.max()), int(batch.seq_lens.max()))


def prompt_attention(q: Tensor, cache: LayerCache, plan: PromptPlan, scale: float) -> Tensor:
    """Return causal attention of q [T, H, D] to the keys and values that the batch has stored: [T, H, D]."""
    keys, values = (stored.flatten(0, 1)[plan.slot_mapping] for stored in (cache.keys, cache.values))
    lengths = (plan.query_starts, plan.key_starts, plan.longest_query, plan.longest_key)
    out = varlen.varlen_attn(q, keys, values, *lengths, scale=scale, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(out, Tensor)
    return out
