"""The operations of a decoder, with one signature for each on every device.

`engine.kernels.load` chooses an implementation once, at start. An implementation whose `deterministic` is true is
batch invariant: the result for a row depends on that row and on its sequence's keys and values, never on the number of
rows or on other sequences.

Shapes use these letters. T: rows (tokens) of the batch; S: sequences; H: query heads; KH: KV heads; G = H / KH: query
heads that share a KV head (grouped-query attention); D: head size; B: blocks; N: tokens of a block; V: vocabulary size;
E: experts; P = T * experts of a token: pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.batch.inputs import AttentionPlanner, BatchInputs, Lengths
from engine.config import AttentionKind, KVShape, RouterSpec
from engine.sampling.sampler import SamplerOutput
from engine.scheduling.request import SamplingRow
from engine.weights import Weight


@dataclass(frozen=True)
class KernelOptions:
    """The model and settings that kernels are made for."""

    dtype: torch.dtype
    quantization: str = "auto"  # auto: as in the checkpoint; none: dtype; int8: groups of 32
    kv_cache_dtype: str = "auto"  # auto: dtype; int8, fp8: with a scale for each token and head
    max_num_rows: int = 0  # of a batch
    head_dims: frozenset[int] = frozenset({64})  # of all kinds of layers
    has_special_scores: bool = False  # whether attention has sinks or soft caps
    block_size: int = 32
    batch_invariant: bool = True
    enforce_eager: bool = False
    allow_slow_kernels: bool = False  # plain torch on a GPU, if Triton does not work


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, in the layout of the kernels. Layers of other KV groups share the same memory."""

    shape: KVShape
    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None  # float32 [B, KH, N] if keys and values have 8 bits
    value_scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rotations:
    """The rotation of each pair of dimensions (i, i + D / 2): cosines, then sines, float32 [T, D] each.

    Those of queries may be scaled by a factor for their position, so a pair that is not rotated may still be scaled.
    """

    q: Tensor
    k: Tensor  # often the same tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The RMS norms of queries, keys and values before the rotation.

    A weight of H * D or KH * D numbers covers all heads at once, one of D each head by itself.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionScores:
    """How attention turns products of queries and keys into scores."""

    scale: float
    softcap: float | None = None  # scores become softcap * tanh(score / softcap), once scaled
    sinks: Tensor | None = None  # float32 [H]: a score of each head that takes part in the softmax, without a value


class LinearOp(Protocol):
    """A matrix product with fixed weights: x [T, K] -> [T, M]."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the product, or add it to `residual` in place and return that."""


class ExpertLinearOp(Protocol):
    """Matrix products with the fixed weights of experts."""

    def __call__(self, x: Tensor, routing: Any) -> Tensor:
        """Return the products [P, M] for x [T, K], or for x [P, K] that an earlier such product led to.

        Only the kernels know the order of the P rows, which is that of the routing.
        """


class TokenSampler(Protocol):
    """The sampler of `engine.sampling.sampler`, or another with the same results."""

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], masks: Mapping[int, bytes] = ...) -> SamplerOutput:
        """Sample the next token of each row from its logits, float32 [R, V]. May change the logits in place."""


class Kernels(Protocol):
    """The operations of a decoder on one device."""

    name: str
    device: torch.device
    dtype: torch.dtype
    deterministic: bool  # whether the kernels are batch invariant
    keep_packed: frozenset[str]  # GGML types that `pack` accepts without dequantizing
    vector_dtype: torch.dtype  # of norms and biases
    num_threads: int  # that the kernels run on
    num_torch_threads: int  # to set for torch's own operations
    is_graphed: bool  # whether a model runs on these kernels in CUDA graphs
    warm_up_rows: frozenset[int]  # numbers of rows with which a model runs all kernels that most requests need

    @property
    def separates_prompts(self) -> bool:
        """True if a token of a prompt gets keys and values with different bits from the same token when generated."""

    @property
    def formats(self) -> str:
        """The number formats of weights and KV cache, for the log and the fingerprint."""

    def pack(self, weights: Sequence[Weight], dtype: torch.dtype | None = None) -> Any:
        """Return the weights, stacked vertically to [M, K], in the layout of `linear` and `embed`.

        `dtype`: unpack them to this type, in which `linear` then computes; None: as the options say.
        """

    def linear(self, matrix: Any, bias: Tensor | None = None, *, is_float32: bool = False) -> LinearOp:
        """Return an operation that computes x W^T + b, in the dtype of x or in float32.

        Products of torch are computed in the dtype of x, and then converted.
        """

    def head_linear(self, matrices: Tensor) -> LinearOp:
        """Return an operation that multiplies each head of x [T, H * K] with a matrix of its own: [T, H * M].

        `matrices` is [H, M, K] in float32, and need not be on the device. The operation takes no residual stream.
        """

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the columns of tensors [T, ...], which may be columns of others, side by side."""

    def embed(self, token_ids: Tensor, matrix: Any, scale: float = 1.0) -> Tensor:
        """Return the rows `token_ids` [T] of a packed matrix [M, K], times `scale`: the residual stream [T, K]."""

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        """Return table[rows]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        """Return x [T, K] divided by its root mean square, times weight (Zhang and Sennrich 2019).

        With `residual`, add it to that in place and return that.
        """

    def layer_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x [T, K] minus its mean, divided by its standard deviation, times weight (Ba et al. 2016)."""

    def add(self, residual: Tensor, x: Tensor, scale: float) -> None:
        """Add scale * x to `residual` [T, K], in place."""

    def scale(self, x: Tensor, factor: float, softcap: float | None = None) -> None:
        """Multiply x [T, K] by a factor, in place; then, with a soft cap, replace x by softcap * tanh(x / softcap)."""

    def kv_cache_bytes(self, groups: Sequence[Sequence[KVShape]], block_size: int) -> int:
        """Return the bytes of one block, which holds the layers of any one of the groups."""

    def new_kv_cache(
        self, groups: Sequence[Sequence[KVShape]], num_blocks: int, block_size: int
    ) -> list[list[LayerCache]]:
        """Return an empty cache for each layer of each group.

        The groups share the memory: a block belongs to one group at a time, and holds the layers of that group.
        """

    def cached_keys(self, cache: LayerCache, block_ids: Tensor) -> Tensor:
        """Return the keys in blocks, int64 [B'], one after the other: float32 [B' * N, KH, D]."""

    def rope_and_store_kv(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        rotations: Rotations,
        slot_mapping: Tensor,
        cache: LayerCache,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """Norm and rotate q [T, H, D] and k [T, KH, D] by their positions (Su et al. 2021, halves as in Hugging Face's
        Llama), store k and v in the cache at `slot_mapping` [T] (block id * N + offset), and return the rotated q.

        k and v are None if the layer reads keys and values that another layer has stored. Slot -1 stores nothing.
        """

    def attention_planner(self, kind: AttentionKind) -> AttentionPlanner | None:
        """Return what makes the work lists of attention on the host; None if these kernels take none."""

    def plan_attention(self, batch: BatchInputs, query_lens: Lengths, kind: AttentionKind, kind_index: int) -> Any:
        """Prepare `paged_attention` of one kind for the last `query_lens` rows of each sequence, once a step.

        `kind_index` is the place of the kind in `batch.attention_work`.
        """

    def paged_attention(
        self, q: Tensor, cache: LayerCache, plan: Any, block_tables: Tensor, scores: AttentionScores
    ) -> Tensor:
        """Return causal attention of q [T, H, D] to the keys and values in each row's blocks: [T, H, D].

        A row at position p sees positions max(0, p - window + 1) .. p of the kind's window, all up to p if it is None.
        The softmax is computed in float32. The result may replace q. A block that no row of a sequence sees may hold
        anything, NaN included, and its entry in the table any block.
        """

    def act_and_mul(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """Return act(gate) * up for gate and up [T, I], maybe columns of one tensor (GLU variants, Shazeer 2020).

        `activation` is silu (SwiGLU), gelu, gelu_pytorch_tanh, sigmoid, identity, or swigluoai (gpt-oss: gate is at
        most 7, up within -7 .. 7; gate * sigmoid(1.702 gate) * (up + 1)).
        """

    def gate_rows(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return each row of x [T, K] times the sigmoid of its number in gate, float32 [T, 1]."""
        ...

    # Mixture of experts (Shazeer et al. 2017).

    def pack_experts(self, weights: Sequence[Sequence[Weight]]) -> Any:
        """Return the weights of each expert, stacked vertically to [M, K], in the layout of `expert_linear`."""

    def route(
        self, logits: Tensor, router: RouterSpec, bias: Tensor | None = None, expert_scales: Tensor | None = None
    ) -> Any:
        """Return the experts of each row by its router logits, float32 [T, E]: the routing of products of experts.

        The highest scores win, ties go to the lowest expert. `bias` [E] is added to the scores for the choice, not to
        the weights. `expert_scales` [E] multiply the weights at the end.
        """

    def expert_linear(self, matrices: Any, bias: Tensor | None = None) -> ExpertLinearOp:
        """Return an operation that multiplies each pair's row with the matrix of its expert. `bias` is [E, M]."""

    def combine_experts(self, x: Tensor, routing: Any, residual: Tensor | None = None) -> Tensor:
        """Return the sum [T, K] of the results x [P, K] of each row's experts, times their weights.

        With `residual`, add it to that in place and return that. The experts of a row are added up in descending order
        of their scores, whatever the other rows are.
        """

    def temporaries(self) -> AbstractContextManager[None]:
        """Return a context manager. Tensors that operations return inside it may be overwritten once it exits;
        additions to the residual stream remain.
        """

    def new_sampler(self, vocab_size: int, eos_token_ids: Sequence[int]) -> TokenSampler:
        """Return a sampler for a vocabulary."""


# Checks of attention's tensors against each other, for kernels that take a size from one and use it for another.


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
