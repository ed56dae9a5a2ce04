"""What the layers of a decoder are made of, as data: the model is built from it and asks nothing else about the family.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """How rotary frequencies are scaled for contexts longer than those of the pretraining.

    linear: Chen et al. 2023; llama3: Llama 3.1; yarn: Peng et al. 2023; longrope: Ding et al. 2024, or factors that a
    GGUF file stores as a tensor. Fields that a type does not use are ignored.
    """

    rope_type: str = "default"  # default, linear, llama3, yarn, longrope
    factor: float = 1.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0  # of all sines and cosines
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: round the bounds of the interpolation to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: divide the frequencies, up to the original context ...
    long_factor: tuple[float, ...] = ()  # ... and beyond it


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A table of rotary position embeddings (Su et al. 2021)."""

    head_dim: int
    rotary_dim: int  # dimensions of a head that are rotated; 0: none
    theta: float = 10000.0
    # Pairs are half a head apart, and frequencies those of a whole head, even if only some are rotated (Gemma 4).
    is_proportional: bool = False
    scaling: RopeScaling = RopeScaling()
    first_pair: int = 0  # of those that are rotated
    query_beta: float = 0.0  # queries at position p are multiplied by 1 + beta * log(1 + floor(p / context))
    query_context: int = 8192


QKNorm: TypeAlias = Literal["none", "head", "all"]


class LatentSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Latent attention (MLA, DeepSeek-V2 2024): keys and values of all heads are products of one latent vector."""

    q_lora_rank: int | None  # of the product that computes queries; None: it is one matrix
    kv_lora_rank: int  # numbers of the latent vector
    nope_head_dim: int  # dimensions of a head that are not rotated
    rope_head_dim: int  # rotated dimensions, whose key all heads share
    v_head_dim: int


class AttentionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Grouped-query attention of one layer.

    Latent attention has one KV head: the latent vector and the rotated key, which are keys and values of all heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: int = 0  # index in `ModelConfig.ropes`
    window: int | None = None  # tokens that a query attends to, its own included; None: all
    softcap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QKNorm = "none"  # RMS norm of each head of queries and keys, or of all heads together
    v_norm: bool = False  # RMS norm of each head of values, without weights
    has_sinks: bool = False
    values_are_keys: bool = False  # values are the keys before norm and rotation
    latent: LatentSpec | None = None
    kv_source: int | None = None  # the layer whose keys and values this one reads; None: its own

    @property
    def kind(self) -> AttentionKind:
        return AttentionKind(self.num_heads, self.num_kv_heads, self.head_dim, self.window)

    @property
    def kv_shape(self) -> KVShape:
        return KVShape(self.num_kv_heads, self.head_dim)


class AttentionKind(msgspec.Struct, frozen=True):
    """The attention layers that share one plan."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None


class KVShape(msgspec.Struct, frozen=True):
    """The keys, and the values, of one token in one layer."""

    num_kv_heads: int
    head_dim: int

    @property
    def size(self) -> int:
        return self.num_kv_heads * self.head_dim


class MLPSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A gated feed-forward network."""

    intermediate_size: int
    activation: str = "silu"  # see Kernels.act_and_mul
    bias: bool = False


class RouterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a row's experts are chosen from its router logits, and weighted."""

    num_experts: int
    num_experts_per_tok: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # divide the weights of the chosen experts by their sum
    scale: float = 1.0  # of the weights
    # Groups of experts, of which the best `topk_group` are kept. A group's score is the sum of its two highest scores,
    # or just the highest.
    num_groups: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2"] = "max"


class ExpertsSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts (Shazeer et al. 2017)."""

    router: RouterSpec
    intermediate_size: int  # of each expert
    activation: str = "silu"
    bias: bool = False
    router_bias: bool = False  # of the router's logits
    correction_bias: bool = False  # of the scores, for the choice alone
    expert_scales: bool = False  # of the weights, one for each expert
    shared: MLPSpec | None = None  # for every token


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder layer: attention, then an MLP or experts, each with norms before and after.

    If there are both, each reads the residual stream through norms of its own, so there is none before them.
    """

    attention: AttentionSpec
    mlp: MLPSpec | None
    experts: ExpertsSpec | None = None
    input_layernorm: bool = True  # before attention
    post_attention_layernorm: bool = False  # of what attention adds to the residual stream
    pre_feedforward_layernorm: bool = True
    post_feedforward_layernorm: bool = False
    is_parallel: bool = False  # the MLP reads what attention reads
    residual_scale: float = 1.0  # of what attention and MLP add
    has_layer_scalar: bool = False  # the residual stream is multiplied by a number at the end


MAX_UNUSED = 0.1  # of the KV cache, so that there are few groups


class KVGroup(msgspec.Struct, frozen=True):
    """Layers whose keys and values of the same tokens are in the same blocks."""

    layers: tuple[int, ...]
    window: int | None

    def num_blocks_for(self, num_tokens: int, block_size: int, max_in_flight: int) -> int:
        """Return the most blocks that a request of `num_tokens` holds at a time.

        Blocks that have slid out of the window are released; `max_in_flight` tokens may be computed before that.
        """
        num_blocks = -(-num_tokens // block_size)
        if self.window is None:
            return num_blocks
        return min(num_blocks, -(-(self.window - 1 + max_in_flight) // block_size) + 1)


def group_layers(layers: tuple[LayerSpec, ...]) -> tuple[KVGroup, ...]:
    """Return the KV groups of a model: layers of one kind, in groups that need about the same memory for a token.

    So any group can use any block of one pool, as in vLLM's hybrid KV cache manager. A model whose layers are all of
    one kind has one group.
    """
    kinds: dict[tuple[KVShape, int | None], list[int]] = {}
    for index, layer in enumerate(layers):
        if layer.attention.kv_source is None:
            kinds.setdefault((layer.attention.kv_shape, layer.attention.window), []).append(index)
    block_size = _block_size([(shape.size, len(members)) for (shape, _), members in kinds.items()])
    groups: list[KVGroup] = []
    for (shape, window), members in kinds.items():
        num_groups = -(-len(members) // max(1, block_size // shape.size))
        group_size = -(-len(members) // num_groups)
        groups += [
            KVGroup(tuple(members[start : start + group_size]), window) for start in range(0, len(members), group_size)
        ]
    return tuple(groups)


def _block_size(kinds: list[tuple[int, int]]) -> int:
    """Return how many numbers a token takes in a block, for kinds of (numbers of a layer, layers).

    That is the largest size that leaves at most MAX_UNUSED of the memory unused, or else the one that leaves least.
    """
    total = sum(size * count for size, count in kinds)

    def unused(block_size: int) -> float:
        num_groups = sum(-(-count // (block_size // size)) for size, count in kinds)
        return num_groups * block_size / total - 1

    largest = max(size for size, _ in kinds)
    sizes = {size * number for size, count in kinds for number in range(1, count + 1) if size * number >= largest}
    return max(sizes, key=lambda block_size: (-max(MAX_UNUSED, unused(block_size)), block_size))
