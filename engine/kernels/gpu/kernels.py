"""The operations on a GPU. What has no kernel of its own here (embedding, gathering rows) is plain torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from engine.batch import BatchInputs, Lengths
from engine.kernels import LayerCache, LinearOp
from engine.kernels.gpu import attention, rows
from engine.kernels.gpu.attention import AttentionPlan
from engine.kernels.gpu.linear import linear
from engine.kernels.gpu.tiles import card_name, tiles_for
from engine.kernels.reference import TorchKernels, adding


class TritonKernels(TorchKernels):
    """Kernels in Triton, whose results depend on no other row.

    If they need not, products are the library's, which chooses another order of additions for another number of rows.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, max_num_rows: int = 0, *, batch_invariant: bool = True
    ) -> None:
        super().__init__(device, dtype, max_num_rows)
        self.deterministic = batch_invariant
        self.tiles = tiles_for(device, dtype)
        self.name = f"triton {triton.__version__} {card_name(device)}"

    def linear(self, matrix: Tensor, bias: Tensor | None = None) -> LinearOp:
        if not self.deterministic:
            return adding(lambda x: F.linear(x, matrix, bias))
        return adding(lambda x: linear(x, matrix, bias, self.tiles.linear))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rows.rms_norm(x, weight, eps)

    def act_and_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        return rows.act_and_mul(gate_up, activation)

    def rope_and_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: LayerCache
    ) -> Tensor:
        return rows.rope_and_store_kv(q, k, v, cos, sin, slots, cache)

    def plan_attention(  # type: ignore[override]
        self, batch: BatchInputs, query_lens: Lengths, num_heads: int, num_kv_heads: int, cache: LayerCache
    ) -> AttentionPlan:
        group_size = num_heads // num_kv_heads
        return attention.plan_attention(
            query_lens,
            batch.seq_lens,
            batch.block_tables,
            group_size,
            num_kv_heads,
            self.tiles.attention,
        )

    def paged_attention(  # type: ignore[override]
        self, q: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float, window: int | None
    ) -> Tensor:
        return attention.paged_attention(q.contiguous(), cache, plan, scale, window, self.tiles.attention)
