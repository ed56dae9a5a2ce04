"""The KV cache and paged attention in C++: the parameters of rotary embedding, attention plan and attention."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch.inputs import BatchInputs, Lengths
from engine.config import AttentionKind, KVShape
from engine.kernels.cpu.c_structs import (
    AttentionItem,
    AttentionMerge,
    AttentionPlan,
    CacheParameters,
    Heads,
    PagedAttentionParameters,
    PlanAttentionParameters,
    RopeAndStoreKvParameters,
)
from engine.kernels.cpu.recorder import ProgramRecorder
from engine.kernels.cpu.weights import ACTIVATION_GROUP
from engine.kernels.interface import AttentionScores, HeadNorms, LayerCache, Rotations, check_attention, check_heads
from engine.kernels.lazy_memory import lazy_zeros

CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # CacheType of kv_cache.h
CHUNK = 256  # tokens; the numbers below too are those of attention.h, kv_cache.h and simd.h
MAX_PACKED = 48
MAX_HEAD_DIM = 576
LANES = 16
MAX_PARTIALS = 1024  # results of a step that wait to be merged
NO_NORMS = HeadNorms(q=None, k=None, v=None, eps=0.0)


@dataclass(frozen=True)
class CpuAttentionPlan:
    """The plan that the program fills in each step."""

    parameters: ctypes.Structure  # AttentionPlan
    kind: AttentionKind


def kv_cache_bytes(dtype: torch.dtype, groups: Sequence[Sequence[KVShape]], block_size: int) -> int:
    """Return the bytes of one block."""
    num_values, num_scales = _block_sizes(dtype, groups, block_size)
    return dtype.itemsize * num_values + torch.float32.itemsize * num_scales


def new_kv_cache(
    dtype: torch.dtype, groups: Sequence[Sequence[KVShape]], num_blocks: int, block_size: int
) -> list[list[LayerCache]]:
    """Return an empty cache for each layer of each group, in the layout of kv_cache.h.

    A block of tokens is contiguous over all layers of its group, so that a few tokens take a page of memory, not one in
    each layer.
    """
    num_values, num_scales = _block_sizes(dtype, groups, block_size)
    blocks = lazy_zeros((num_blocks, num_values), dtype)
    scales = lazy_zeros((num_blocks, num_scales), torch.float32) if num_scales else None
    return [list(_layers_of(group, block_size, blocks, scales)) for group in groups]


def _block_sizes(dtype: torch.dtype, groups: Sequence[Sequence[KVShape]], block_size: int) -> tuple[int, int]:
    """Return the numbers of keys and values, and of their scales, in one block."""
    num_values = max(sum(shape.size for shape in group) for group in groups)
    num_scales = max(sum(shape.num_kv_heads for shape in group) for group in groups) if dtype == torch.int8 else 0
    return 2 * block_size * num_values, 2 * block_size * num_scales


def _layers_of(
    group: Sequence[KVShape], block_size: int, blocks: Tensor, scales: Tensor | None
) -> Iterator[LayerCache]:
    """Yield views of the blocks for each layer of a group: keys and values of one layer after the other."""
    sizes = [shape.size * block_size for shape in group for _ in range(2)]
    parts = iter(torch.split(blocks[:, : sum(sizes)], sizes, dim=1))
    num_scales = [shape.num_kv_heads * block_size for shape in group for _ in range(2)]
    scale_parts = iter(() if scales is None else torch.split(scales[:, : sum(num_scales)], num_scales, dim=1))
    for shape in group:
        keys_shape: tuple[int, ...] = (len(blocks), shape.num_kv_heads, shape.head_dim, block_size)
        values_shape: tuple[int, ...] = (len(blocks), shape.num_kv_heads, block_size, shape.head_dim)
        if blocks.dtype == torch.bfloat16:
            keys_shape = (len(blocks), shape.num_kv_heads, shape.head_dim // 2, block_size, 2)
            values_shape = (len(blocks), shape.num_kv_heads, block_size // 2, shape.head_dim, 2)
        scales_of_layer = [part.view(-1, shape.num_kv_heads, block_size) for part in itertools.islice(scale_parts, 2)]
        yield LayerCache(shape, next(parts).view(keys_shape), next(parts).view(values_shape), *scales_of_layer)


def cached_keys(cache: LayerCache, block_ids: Tensor) -> Tensor:
    """Return the keys in blocks [B'] in float32, one block after the other: [B' * N, KH, D]."""
    keys = cache.keys[block_ids].float()
    if cache.keys.dtype == torch.bfloat16:
        keys = keys.transpose(3, 4).flatten(2, 3)  # [B', KH, D / 2, N, 2] -> [B', KH, D, N]
    if cache.key_scales is not None:
        keys *= cache.key_scales[block_ids][:, :, None]
    return keys.permute(0, 3, 1, 2).flatten(0, 1)


def rope_and_store_kv(
    recorder: ProgramRecorder,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotations: Rotations,
    slot_mapping: Tensor,
    cache: LayerCache,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Add a call that norms and rotates q and k, and stores k and v at `slot_mapping`. Returns q."""
    norms = norms or NO_NORMS
    check_heads(q, k, v, rotations, slot_mapping, cache, norms)
    parameters = RopeAndStoreKvParameters(
        num_rows=recorder.buffer(q).num_rows,
        slot_mapping=slot_mapping.data_ptr(),
        num_heads=q.shape[1],
        q=_heads(recorder, q, norms.q),
        k=_heads(recorder, k, norms.k),
        v=_heads(recorder, v, norms.v),
        q_rotations=recorder.read(rotations.q),
        k_rotations=recorder.read(rotations.k),
        epsilon=norms.eps,
        cache=_cache_parameters(cache),
    )
    recorder.change(q)
    recorder.call("rope_and_store_kv", parameters, cache, norms)
    return q


def _heads(recorder: ProgramRecorder, x: Tensor | None, norm: Tensor | None) -> ctypes.Structure:
    if x is None:
        return Heads()
    return Heads(recorder.read(x), x.stride(0), *((norm.data_ptr(), norm.numel()) if norm is not None else (None, 0)))


def plan_attention(
    recorder: ProgramRecorder, batch: BatchInputs, query_lens: Lengths, kind: AttentionKind, kind_index: int
) -> CpuAttentionPlan:
    """Add a call that divides the attention of a step's rows among the threads."""
    group_size = kind.num_heads // kind.num_kv_heads
    num_packed = max(1, MAX_PACKED // group_size) * group_size
    items = lazy_zeros((len(batch.token_ids) + MAX_PARTIALS, ctypes.sizeof(AttentionItem)), torch.uint8)
    merges = lazy_zeros((MAX_PARTIALS, ctypes.sizeof(AttentionMerge)), torch.uint8)
    # Calls of attention share these buffers.
    partials_shape = (MAX_PARTIALS, kind.num_kv_heads, num_packed, kind.head_dim + 2)
    partials = recorder.shared("partials", partials_shape, torch.float32)
    scratch_size = num_packed * (2 * kind.head_dim + 2) + LANES
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
        num_heads=kind.num_heads,
        num_kv_heads=kind.num_kv_heads,
        window=kind.window or 0,
        plan=ctypes.addressof(plan),
    )
    recorder.call("plan_attention", parameters, plan, items, merges)
    return CpuAttentionPlan(plan, kind)


def paged_attention(
    recorder: ProgramRecorder,
    q: Tensor,
    cache: LayerCache,
    plan: CpuAttentionPlan,
    block_tables: Tensor,
    scores: AttentionScores,
) -> Tensor:
    """Add a call that computes the attention of q [T, H, D], and return its result."""
    check_attention(q, cache, plan.kind, scores)
    num_rows = recorder.buffer(q).num_rows
    out = recorder.new(num_rows, *q.shape)
    parameters = PagedAttentionParameters(
        num_rows=num_rows,
        q=recorder.read(q),
        q_stride=q.stride(0),
        num_heads=q.shape[1],
        scale=scores.scale,
        window=plan.kind.window or 0,
        softcap=scores.softcap or 0.0,
        sinks=scores.sinks.data_ptr() if scores.sinks is not None else None,
        block_tables=block_tables.data_ptr(),
        table_stride=block_tables.stride(0),
        plan=ctypes.addressof(plan.parameters),
        cache=_cache_parameters(cache),
        output=out.tensor.data_ptr(),
        output_stride=out.tensor.stride(0),
    )
    if q.shape[2] % ACTIVATION_GROUP == 0:
        out.producer = parameters
    recorder.call("paged_attention", parameters, cache, plan, block_tables, scores)
    return out.tensor


def _cache_parameters(cache: LayerCache) -> ctypes.Structure:
    return CacheParameters(
        type=CACHE_TYPES[cache.keys.dtype],
        keys=cache.keys.data_ptr(),
        values=cache.values.data_ptr(),
        key_scales=cache.key_scales.data_ptr() if cache.key_scales is not None else None,
        value_scales=cache.value_scales.data_ptr() if cache.value_scales is not None else None,
        block_size=cache.keys.shape[3],
        num_kv_heads=cache.shape.num_kv_heads,
        head_dim=cache.shape.head_dim,
        block_stride=cache.keys.stride(0),
        scale_stride=cache.key_scales.stride(0) if cache.key_scales is not None else 0,
    )
