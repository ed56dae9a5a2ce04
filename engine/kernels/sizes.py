"""Checks of attention's tensors against each other, for kernels that take a size from one and use it for another."""

from __future__ import annotations

from torch import Tensor

from engine.config import AttentionKind, KVShape
from engine.kernels.interface import AttentionScores, HeadNorms, LayerCache, Rotations


def check_attention(q: Tensor, cache: LayerCache, kind: AttentionKind, scores: AttentionScores) -> None:
    """Check that queries [T, H, D], cache and sinks have the sizes of the kind that attention was planned for."""
    assert q.shape[1:] == (kind.num_heads, kind.head_dim)
    assert cache.shape == KVShape(kind.num_kv_heads, kind.head_dim)
    assert scores.sinks is None or scores.sinks.shape == (kind.num_heads,)


def check_heads(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotations: Rotations,
    slot_mapping: Tensor,
    cache: LayerCache,
    norms: HeadNorms | None,
) -> None:
    """Check that queries, keys, values, their rotations and norms, and the cache have heads of one size."""
    num_rows, _, head_dim = q.shape
    assert head_dim == cache.shape.head_dim
    assert (k is None) == (v is None)
    for stored in (k, v):
        assert stored is None or stored.shape == (num_rows, cache.shape.num_kv_heads, head_dim)
    assert rotations.q.shape == rotations.k.shape == (num_rows, head_dim)
    assert k is None or slot_mapping.shape == (num_rows,)
    for x, weight in ((q, norms.q), (k, norms.k), (v, norms.v)) if norms is not None else ():
        assert x is None or weight is None or len(weight) in (head_dim, x.shape[1] * head_dim)
