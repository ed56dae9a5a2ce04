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
    has_gate: bool = False  # outputs of the heads are multiplied by the sigmoid of a projection
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


class GatedDeltaNetSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A gated delta net (Yang et al. 2025) with a causal convolution: Qwen3-Next, Qwen 3.5.

    Each value head has a matrix that every token decays and writes to, in place of keys and values.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_size: int  # tokens that the convolution sees, its own included
    is_tiled: bool = False  # value head i has key head i % num_key_heads; False: adjacent ones share a key head

    @property
    def num_channels(self) -> int:
        """Inputs of the convolution: queries and keys, then values."""
        return 2 * self.num_key_heads * self.key_head_dim + self.num_value_heads * self.value_head_dim

    @property
    def row_size(self) -> int:
        """Numbers of a token that change the state: the channels, strengths of writing, time steps."""
        return self.num_channels + 2 * self.num_value_heads

    @property
    def matrix_size(self) -> int:
        return self.num_value_heads * self.key_head_dim * self.value_head_dim

    @property
    def description(self) -> str:
        heads = f"{self.num_value_heads} value heads of {self.value_head_dim}"
        return f"gated delta nets, {heads} and {self.num_key_heads} key heads of {self.key_head_dim}"


class ShortConvSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A gated causal convolution of each channel: LFM 2."""

    num_channels: int
    conv_size: int
    bias: bool = False

    @property
    def row_size(self) -> int:
        return self.num_channels

    @property
    def matrix_size(self) -> int:
        return 0

    @property
    def description(self) -> str:
        return f"short convolutions of {self.conv_size} tokens"


# What a layer has in place of attention: its state has a fixed size.
MixerSpec: TypeAlias = GatedDeltaNetSpec | ShortConvSpec


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
    shared_gate: bool = False  # its result is multiplied by the sigmoid of a projection to one number


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder layer: attention or another mixer, then an MLP or experts, each with norms before and after.

    If there are both, each reads the residual stream through norms of its own, so there is none before them.
    """

    attention: AttentionSpec | None
    mlp: MLPSpec | None
    mixer: MixerSpec | None = None  # in place of attention
    experts: ExpertsSpec | None = None
    input_layernorm: bool = True  # before attention
    post_attention_layernorm: bool = False  # of what attention adds to the residual stream
    pre_feedforward_layernorm: bool = True
    post_feedforward_layernorm: bool = False
    is_parallel: bool = False  # the MLP reads what attention reads
    residual_scale: float = 1.0  # of what attention and MLP add
    has_layer_scalar: bool = False  # the residual stream is multiplied by a number at the end

    @property
    def stores(self) -> bool:
        """True if tokens leave something for later ones: keys and values, or a state."""
        return self.attention is None or self.attention.kv_source is None


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
    """Return the KV groups of a model: layers of one shape and window that need about the same memory for a token.

    So any group can use any block of one pool, as in vLLM's hybrid KV cache manager. A model whose layers all have the
    same shape and window has one group. Layers that store no keys and values are in none.
    """
    kinds: dict[tuple[KVShape, int | None], list[int]] = {}
    for index, layer in enumerate(layers):
        if layer.attention is not None and layer.attention.kv_source is None:
            kinds.setdefault((layer.attention.kv_shape, layer.attention.window), []).append(index)
    token_size = _token_size([(shape.size, len(members)) for (shape, _), members in kinds.items()])
    groups: list[KVGroup] = []
    for (shape, window), members in kinds.items():
        num_groups = -(-len(members) // max(1, token_size // shape.size))
        group_size = -(-len(members) // num_groups)
        groups += [
            KVGroup(tuple(members[start : start + group_size]), window) for start in range(0, len(members), group_size)
        ]
    return tuple(groups)


def _token_size(kinds: list[tuple[int, int]]) -> int:
    """Return how many numbers of keys, and of values, a block holds for a token. Kinds: (those of a layer, layers).

    That is the largest size that leaves at most MAX_UNUSED of the memory unused, or else the one that leaves least.
    """
    total = sum(size * count for size, count in kinds)

    def unused(token_size: int) -> float:
        num_groups = sum(-(-count // (token_size // size)) for size, count in kinds)
        return num_groups * token_size / total - 1

    largest = max(size for size, _ in kinds)
    sizes = {size * number for size, count in kinds for number in range(1, count + 1) if size * number >= largest}
    return max(sizes, key=lambda token_size: (-max(MAX_UNUSED, unused(token_size)), token_size))
