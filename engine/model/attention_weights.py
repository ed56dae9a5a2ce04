"""The attention weights of rows, computed in full from queries and cached keys, as in the textbook."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.interface import AttentionScores


def attention_weights(q: Tensor, keys: Tensor, first: int, scores: AttentionScores, window: int | None) -> Tensor:
    """Return the weights, float32 [R, H, n], with which the values at n positions are added up for each row and head.

    `q` [R, H, D] are the rotated queries of the positions from `first` on, `keys` [n, KH, D] those of positions 0 to
    n - 1. A head's weights add up to 1, or with an attention sink to less.
    """
    num_rows, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = keys.shape[:2]
    grouped = q.float().view(num_rows, num_kv_heads, -1, head_dim)
    products = torch.einsum("rkgd,nkd->rkgn", grouped, keys).reshape(num_rows, num_heads, num_keys) * scores.scale
    if scores.softcap is not None:
        products = (products / scores.softcap).tanh() * scores.softcap
    rows = torch.arange(first, first + num_rows, device=q.device)[:, None]
    distance = rows - torch.arange(num_keys, device=q.device)
    is_hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    products.masked_fill_(is_hidden[:, None], float("-inf"))
    if scores.sinks is None:
        return products.softmax(dim=-1)
    sinks = scores.sinks.float()[None, :, None].expand(num_rows, -1, 1)
    return torch.cat((products, sinks), dim=-1).softmax(dim=-1)[..., :-1]
