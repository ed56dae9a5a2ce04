"""The KV cache and paged attention in C++: the parameters of rotary embedding, attention plan and attention."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.kernels.cpu.c_structs import (
    AttentionItem,
    AttentionMerge,
    AttentionPlan,
    CacheParameters,
    PagedAttentionParameters,
    PlanAttentionParameters,
    RopeAndStoreKvParameters,
)
from engine.kernels.cpu.recorder import ProgramRecorder
from engine.kernels.cpu.weights import ACTIVATION_GROUP
from engine.kernels.interface import LayerCache
from engine.kernels.lazy_memory import lazy_zeros

CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # CacheType of kv_cache.h
CHUNK = 256  # tokens; the numbers below too are those of attention.h, kv_cache.h and simd.h
MAX_PACKED = 48
MAX_HEAD_DIM = 512
LANES = 16
MAX_PARTIALS = 1024  # results of a step that wait to be merged


@dataclass(frozen=True)
class CpuAttentionPlan:
    """The plan that the program fills in each step, and the batch's block tables."""

    parameters: AttentionPlan
    block_tables: Tensor
    window: int | None


def kv_cache_bytes(dtype: torch.dtype, block_size: int, num_kv_heads: int, head_dim: int) -> int:
    """Return the bytes of one block in one layer."""
    scale_bytes = 4 if dtype == torch.int8 else 0
    return 2 * block_size * num_kv_heads * (head_dim * dtype.itemsize + scale_bytes)


def new_kv_cache(
    dtype: torch.dtype, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> list[LayerCache]:
    """Return an empty cache for each layer, in the layout of kv_cache.h.

    A block of tokens is contiguous over all layers, so that a few tokens take a page of memory, not one in each layer.
    """
    keys_shape: tuple[int, ...] = (num_blocks, num_kv_heads, head_dim, block_size)
    values_shape: tuple[int, ...] = (num_blocks, num_kv_heads, block_size, head_dim)
    if dtype == torch.bfloat16:
        keys_shape = (num_blocks, num_kv_heads, head_dim // 2, block_size, 2)
        values_shape = (num_blocks, num_kv_heads, block_size // 2, head_dim, 2)
    all_layers = lazy_zeros((num_blocks, num_layers, 2, num_kv_heads * head_dim * block_size), dtype)
    pairs = [(layer[:, 0].view(keys_shape), layer[:, 1].view(values_shape)) for layer in all_layers.unbind(1)]
    if dtype != torch.int8:
        return [LayerCache(*pair) for pair in pairs]
    scales = lazy_zeros((num_blocks, num_layers, 2, num_kv_heads, block_size), torch.float32)
    return [LayerCache(*pair, *layer.unbind(1)) for pair, layer in zip(pairs, scales.unbind(1), strict=True)]


def rope_and_store_kv(
    recorder: ProgramRecorder,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    cache: LayerCache,
) -> Tensor:
    """Add a call that rotates q and k, and stores k and v at `slot_mapping`. Returns q."""
    parameters = RopeAndStoreKvParameters(
        num_rows=recorder.buffer(q).num_rows,
        slot_mapping=slot_mapping.data_ptr(),
        q=recorder.read(q),
        k=recorder.read(k),
        v=recorder.read(v),
        row_stride=q.stride(0),
        num_heads=q.shape[1],
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        cache=_cache_parameters(cache),
    )
    recorder.call("rope_and_store_kv", parameters, cache)
    return q


def plan_attention(
    recorder: ProgramRecorder,
    batch: BatchInputs,
    query_lens: Lengths,
    num_heads: int,
    num_kv_heads: int,
    cache: LayerCache,
    window: int | None,
) -> CpuAttentionPlan:
    """Add a call that divides the attention of a step's rows among the threads."""
    head_dim = _cache_parameters(cache).head_dim
    group_size = num_heads // num_kv_heads
    num_packed = max(1, MAX_PACKED // group_size) * group_size
    # All plans of a program share these buffers: a plan is made when the attention of the previous one is done.
    max_items = len(batch.token_ids) + MAX_PARTIALS
    items = recorder.shared("items", (max_items, ctypes.sizeof(AttentionItem)), torch.uint8)
    merges = recorder.shared("merges", (MAX_PARTIALS, ctypes.sizeof(AttentionMerge)), torch.uint8)
    partials = recorder.shared("partials", (MAX_PARTIALS, num_kv_heads, num_packed, head_dim + 2), torch.float32)
    scratch_size = num_packed * (2 * head_dim + 2) + LANES
    scratch = recorder.shared("scratch", (recorder.team.num_threads, scratch_size), torch.float32)
    plan = AttentionPlan(
        items=items.data_ptr(),
        merges=merges.data_ptr(),
        max_partials=MAX_PARTIALS,
        partials=partials.data_ptr(),
        scratch=scratch.data_ptr(),
        scratch_stride=scratch.stride(0),
    )
    parameters = PlanAttentionParameters(
        num_seqs=recorder.num_seqs,
        query_lens=query_lens.ctypes.data,
        seq_lens=batch.seq_lens.ctypes.data,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        plan=ctypes.addressof(plan),
    )
    recorder.call("plan_attention", parameters, plan)
    return CpuAttentionPlan(plan, batch.block_tables, window)


def paged_attention(
    recorder: ProgramRecorder, q: Tensor, cache: LayerCache, plan: CpuAttentionPlan, scale: float
) -> Tensor:
    """Add a call that computes the attention of q [T, H, D], and return its result."""
    num_rows = recorder.buffer(q).num_rows
    out = recorder.new(num_rows, *q.shape)
    parameters = PagedAttentionParameters(
        num_rows=num_rows,
        q=recorder.read(q),
        q_stride=q.stride(0),
        num_heads=q.shape[1],
        scale=scale,
        window=plan.window or 0,
        softcap=0.0,
        block_tables=plan.block_tables.data_ptr(),
        table_stride=plan.block_tables.stride(0),
        plan=ctypes.addressof(plan.parameters),
        cache=_cache_parameters(cache),
        output=out.tensor.data_ptr(),
        output_stride=out.tensor.stride(0),
    )
    if q.shape[2] % ACTIVATION_GROUP == 0:
        out.producer = parameters
    recorder.call("paged_attention", parameters, cache, plan)
    return out.tensor


def _cache_parameters(cache: LayerCache) -> CacheParameters:
    dtype = cache.keys.dtype
    return CacheParameters(
        type=CACHE_TYPES[dtype],
        keys=cache.keys.data_ptr(),
        values=cache.values.data_ptr(),
        key_scales=cache.key_scales.data_ptr() if cache.key_scales is not None else None,
        value_scales=cache.value_scales.data_ptr() if cache.value_scales is not None else None,
        block_size=cache.keys.shape[3],
        num_kv_heads=cache.keys.shape[1],
        head_dim=cache.keys.shape[2] * (2 if dtype == torch.bfloat16 else 1),
        block_stride=cache.keys.stride(0) // cache.keys.stride(1),
    )
