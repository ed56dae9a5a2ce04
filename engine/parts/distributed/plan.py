"""The sharding plan: which parameters are divided among the ranks, and along what (Shoeybi et al. 2019).

What makes heads, the inner numbers of an MLP or the channels of a convolution is divided by rows, and what reads them
by columns: so the results of `o_proj`, `out_proj`, `down_proj` and the experts are parts of a sum. All else is the same
on each rank.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate, pairwise
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import (
    AttentionSpec,
    ExpertsSpec,
    GatedDeltaNetSpec,
    LayerSpec,
    MixerSpec,
    MLPSpec,
    ModelConfig,
    ShortConvSpec,
)
from engine.parts.lora.checkpoint import LoraMatrices
from engine.shared.ggml import GGML_TYPES
from engine.shared.gguf import GGUFFile
from engine.weights import Weight
from engine.weights.layout import EMBEDDING, HEAD
from engine.weights.packed import FLOAT8_BLOCK, PackedTensor, select_rows

VECTOR_BLOCK = 32  # the smallest number of columns that all kernels like; blocks of most packed formats


class Axis(Enum):
    """What a dimension of a parameter counts, and hence where it may be cut."""

    HEADS = auto()  # of queries
    KV_HEADS = auto()  # if there are more ranks than these, several ranks have the same one
    KEYS_AND_VALUES = auto()  # of the heads of a gated delta net: queries, keys and values, one after the other
    VALUES = auto()  # of these heads, of which a rank has those of its key heads
    # Inner numbers of an MLP or of each expert, or channels of a short convolution: in whole blocks, so that parts may
    # differ in size.
    WIDTH = auto()
    THREE_WIDTHS = auto()  # one after the other
    VOCABULARY = auto()


@dataclass(frozen=True)
class Split:
    dim: int  # 0: rows, which are outputs; 1: columns, which are inputs, or in biases of experts outputs
    axis: Axis


class OnFirstRank:
    """A bias of a sum, which is added once: it is zero on the other ranks."""


# Regular expression for names of the model -> how such a parameter is divided.
_MLP = r"\.mlp\.(shared_experts\.|experts\.\d+\.)?"
PLAN: Sequence[tuple[str, Split | OnFirstRank]] = (
    (r"lm_head\.weight", Split(0, Axis.VOCABULARY)),
    (r".*\.self_attn\.(q_proj|g_proj|q_b_proj|k_b_proj|v_b_proj|sinks)\.(weight|bias)", Split(0, Axis.HEADS)),
    (r".*\.self_attn\.[kv]_proj\.(weight|bias)", Split(0, Axis.KV_HEADS)),
    (r".*\.self_attn\.o_proj\.weight", Split(1, Axis.HEADS)),
    (rf".*{_MLP}(gate|up)_proj\.weight", Split(0, Axis.WIDTH)),
    (r".*\.mlp\.(shared_experts\.)?(gate|up)_proj\.bias", Split(0, Axis.WIDTH)),
    (r".*\.mlp\.experts\.(gate|up)_proj\.bias", Split(1, Axis.WIDTH)),
    (rf".*{_MLP}down_proj\.weight", Split(1, Axis.WIDTH)),
    (r".*\.linear_attn\.(in_proj_qkv|conv1d)\.weight", Split(0, Axis.KEYS_AND_VALUES)),
    (r".*\.linear_attn\.(in_proj_[zba]\.weight|decay|dt\.bias)", Split(0, Axis.VALUES)),
    (r".*\.linear_attn\.out_proj\.weight", Split(1, Axis.VALUES)),
    (r".*\.conv\.in_proj\.(weight|bias)", Split(0, Axis.THREE_WIDTHS)),
    (r".*\.conv\.conv\.(weight|bias)", Split(0, Axis.WIDTH)),
    (r".*\.conv\.out_proj\.weight", Split(1, Axis.WIDTH)),
    (r".*\.(o_proj|out_proj|down_proj)\.bias", OnFirstRank()),
)
LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ShardingPlan:
    """The part of one rank in a model.

    `config` is that of the whole model, and `column_block` the largest number of columns that its files pack together.
    """

    config: ModelConfig
    rank: int
    num_ranks: int
    column_block: int

    def rule(self, name: str) -> Split | OnFirstRank | None:
        """Return how a parameter is divided; None if it is not."""
        return next((rule for pattern, rule in PLAN if re.fullmatch(pattern, name)), None)

    def part(self, name: str, axis: Axis, size: int) -> NDArray[np.int64]:
        """Return the indices of this rank's part in a dimension of a parameter."""
        return _indices(self.parts(name, axis, size)[self.rank])

    def parts(self, name: str, axis: Axis, size: int) -> list[list[slice]]:
        """Return the parts of all ranks in a dimension of a parameter, of which `size` is the whole.

        They are those of its sections, which follow each other and are divided one by one. If the size is wrong, so is
        that of some part.
        """
        match = LAYER.match(name)
        layer = self.config.layers[int(match[1])] if match and int(match[1]) < len(self.config.layers) else None
        mixer, attention = (layer.mixer, layer.attention) if layer else (None, None)
        sections = _sections(axis, size, mixer)
        divided = [self._divide(axis, section, attention) for section in sections]
        starts = list(accumulate(sections, initial=0))
        return [
            [slice(start + part.start, start + part.stop) for start, part in zip(starts, parts, strict=False)]
            for parts in zip(*divided, strict=True)
        ]

    def _divide(self, axis: Axis, size: int, attention: AttentionSpec | None) -> list[slice]:
        if axis in (Axis.WIDTH, Axis.THREE_WIDTHS):
            return self.width_parts(size)
        if axis is Axis.VOCABULARY:
            return divide(size, self.num_ranks, VECTOR_BLOCK)
        num_pieces = self.num_ranks
        if axis is Axis.KV_HEADS and attention is not None:
            num_pieces = min(num_pieces, attention.num_kv_heads)
        pieces = divide(size, num_pieces, 1)
        return [pieces[rank * num_pieces // self.num_ranks] for rank in range(self.num_ranks)]

    def width_parts(self, width: int) -> list[slice]:
        """Return the parts of all ranks in the width of an MLP, or the channels of a short convolution.

        They are whole blocks of the files' formats if these are enough, so that packed weights stay packed.
        """
        blocks = (self.column_block, VECTOR_BLOCK)
        block = next((block for block in blocks if width % block == 0 and width // block >= self.num_ranks), 1)
        return divide(width, self.num_ranks, block)

    @property
    def vocabulary_sizes(self) -> list[int]:
        """The numbers of logits that the ranks compute."""
        return [_size(part) for part in divide(self.config.vocab_size, self.num_ranks, VECTOR_BLOCK)]

    def local_config(self) -> ModelConfig:
        """Return the shape of this rank's part, from which its decoder is built.

        It takes no matrix for the LM head, whose rows `parallelize` takes instead.
        """
        layers = tuple(self._local_layer(layer) for layer in self.config.layers)
        return msgspec.structs.replace(self.config, layers=layers, tie_word_embeddings=True)

    def _local_layer(self, layer: LayerSpec) -> LayerSpec:
        return msgspec.structs.replace(
            layer,
            attention=self._local_attention(layer.attention),
            mixer=self._local_mixer(layer.mixer),
            mlp=self._local_mlp(layer.mlp),
            experts=self._local_experts(layer.experts),
        )

    def _local_attention(self, attention: AttentionSpec | None) -> AttentionSpec | None:
        return attention and msgspec.structs.replace(
            attention,
            num_heads=attention.num_heads // self.num_ranks,
            num_kv_heads=max(1, attention.num_kv_heads // self.num_ranks),
            qk_norm="none" if attention.qk_norm == "all" else attention.qk_norm,  # see `parallelize`
        )

    def _local_mixer(self, mixer: MixerSpec | None) -> MixerSpec | None:
        if isinstance(mixer, ShortConvSpec):
            return msgspec.structs.replace(mixer, num_channels=self._width(mixer.num_channels))
        return mixer and msgspec.structs.replace(
            mixer,
            num_key_heads=mixer.num_key_heads // self.num_ranks,
            num_value_heads=mixer.num_value_heads // self.num_ranks,
        )

    def _local_mlp(self, mlp: MLPSpec | None) -> MLPSpec | None:
        return mlp and msgspec.structs.replace(mlp, intermediate_size=self._width(mlp.intermediate_size))

    def _local_experts(self, experts: ExpertsSpec | None) -> ExpertsSpec | None:
        if experts is None:
            return None
        shared = self._local_mlp(experts.shared)
        width = self._width(experts.intermediate_size)
        return msgspec.structs.replace(experts, intermediate_size=width, shared=shared)

    def _width(self, width: int) -> int:
        return _size(self.width_parts(width)[self.rank])


def _sections(axis: Axis, size: int, mixer: MixerSpec | None) -> list[int]:
    """Return the sizes of what is divided one by one in a dimension of a parameter; if they do not add up, its own."""
    sections = [size // 3] * 3 if axis is Axis.THREE_WIDTHS else [size]
    if axis in (Axis.KEYS_AND_VALUES, Axis.VALUES) and isinstance(mixer, GatedDeltaNetSpec):
        keys = [mixer.num_key_heads * mixer.key_head_dim] * 2 if axis is Axis.KEYS_AND_VALUES else []
        # Tiles have one value head of each key head.
        num_tiles = mixer.num_value_heads // mixer.num_key_heads if mixer.is_tiled else 1
        sections = [*keys, *[(size - sum(keys)) // num_tiles] * num_tiles]
    return sections if sum(sections) == size and min(sections) > 0 else [size]


def _indices(pieces: Sequence[slice]) -> NDArray[np.int64]:
    indices: NDArray[np.int64] = np.r_[tuple(pieces)]
    return indices


def divide(size: int, num_parts: int, block: int) -> list[slice]:
    """Cut `size` into parts of whole blocks that are as equal as they can be. The last block may be shorter."""
    num_blocks = -(-size // block)
    borders = [min(size, number * num_blocks // num_parts * block) for number in range(num_parts + 1)]
    return [slice(*pair) for pair in pairwise(borders)]


def _size(part: slice) -> int:
    size: int = part.stop - part.start
    return size


def check_num_ranks(config: ModelConfig, num_ranks: int) -> None:
    """Raise ValueError, with the numbers that work, unless each layer divides among `num_ranks` ranks."""
    specs = list(dict.fromkeys(layer.attention or layer.mixer for layer in config.layers))
    most = _least_width(config)
    if num_ranks <= most and all(_divides(spec, num_ranks) for spec in specs):
        return
    working = [n for n in range(2, most + 1) if all(_divides(spec, n) for spec in specs)]
    heads = " and of ".join(dict.fromkeys(filter(None, map(_heads, specs))))
    raise ValueError(
        f"--tensor-parallel-size {num_ranks}: the model has layers of {heads}, "
        f"which {f'divide among {_listed(working)} ranks only' if working else 'do not divide'}"
    )


def _divides(spec: AttentionSpec | MixerSpec | None, num_ranks: int) -> bool:
    """Return whether each rank gets as many heads as any other, and these share KV heads as all heads do.

    A norm of all heads at once needs each KV head once.
    """
    if isinstance(spec, GatedDeltaNetSpec):
        return spec.num_key_heads % num_ranks == 0
    if not isinstance(spec, AttentionSpec):
        return True
    num_heads, num_kv_heads = spec.num_heads, spec.num_kv_heads
    repeats = num_ranks % num_kv_heads == 0 and spec.qk_norm != "all"
    return num_heads % num_ranks == 0 and (num_kv_heads % num_ranks == 0 or repeats)


def _heads(spec: AttentionSpec | MixerSpec | None) -> str:
    if isinstance(spec, AttentionSpec):
        return f"{spec.num_heads} attention heads and {spec.num_kv_heads} KV heads"
    return f"{spec.num_key_heads} key heads" if isinstance(spec, GatedDeltaNetSpec) else ""


def _least_width(config: ModelConfig) -> int:
    mlps = [layer.mlp for layer in config.layers] + [layer.experts and layer.experts.shared for layer in config.layers]
    specs: list[MLPSpec | ExpertsSpec | None] = [*mlps, *(layer.experts for layer in config.layers)]
    channels = [mixer.num_channels for mixer in config.mixers.values() if isinstance(mixer, ShortConvSpec)]
    return min(channels + [spec.intermediate_size for spec in specs if spec is not None])


def _listed(numbers: Sequence[int]) -> str:
    return (
        " or ".join(map(str, numbers)) if len(numbers) < 3 else f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
    )


logger = logging.getLogger("lightwell.engine")


def column_block(path: Path, config: ModelConfig) -> int:
    """Return the largest number of columns that a model's files pack together in blocks."""
    if path.is_dir():
        return FLOAT8_BLOCK if config.quantization is not None else VECTOR_BLOCK
    with GGUFFile(path) as file:
        return max(GGML_TYPES[tensor.ggml_type].block_size for tensor in file.tensors.values())


def shard(
    weights: Iterable[tuple[str, Weight]], plan: ShardingPlan, dtype: torch.dtype
) -> Iterator[tuple[str, Weight]]:
    """Yield the part of this rank of each weight.

    Packed columns that would be cut within a block are unpacked to `dtype`. A rank has the rows of the LM head for its
    part of the vocabulary, even if they are rows of the embedding too, which each rank has in full.
    """
    num_unpacked = 0
    for name, weight in weights:
        part = _part(name, weight, plan, dtype)
        num_unpacked += isinstance(part, Tensor) and not isinstance(weight, Tensor)
        yield name, part
        if name == EMBEDDING and plan.config.tie_word_embeddings:
            yield HEAD, _part(HEAD, weight, plan, dtype)
    if num_unpacked:
        logger.info("%d packed matrices are unpacked, because %d ranks cut their blocks", num_unpacked, plan.num_ranks)


def _part(name: str, weight: Weight, plan: ShardingPlan, dtype: torch.dtype) -> Weight:
    rule = plan.rule(name)
    if isinstance(rule, OnFirstRank):
        assert isinstance(weight, Tensor)
        return weight if plan.rank == 0 else torch.zeros_like(weight)
    if rule is None or rule.dim >= len(weight.shape):
        return weight
    parts = plan.parts(name, rule.axis, weight.shape[rule.dim])
    own = parts[plan.rank]
    if rule.dim == 0:
        is_view = isinstance(weight, PackedTensor) and len(own) == 1  # of a mapped file; others would keep the rest
        return select_rows(weight, own[0] if is_view else _indices(own))
    if isinstance(weight, Tensor):
        return torch.cat([weight[:, piece] for piece in own], dim=1)
    if any(border % weight.column_block for some in parts for piece in some for border in (piece.start, piece.stop)):
        return weight.dequantize(dtype)[:, _indices(own)]
    return weight.select_columns(_indices(own))


def shard_lora(name: str, matrices: LoraMatrices, plan: ShardingPlan) -> LoraMatrices:
    """Return the part of this rank of the update of a projection: rows of B, or columns of A."""
    rule = plan.rule(f"{name}.weight")
    if rule is None or isinstance(rule, OnFirstRank):
        return matrices
    a, b = matrices.a, matrices.b
    if rule.dim == 0:
        return LoraMatrices(a, b[plan.part(name, rule.axis, len(b))])
    return LoraMatrices(a[:, plan.part(name, rule.axis, a.shape[1])], b)
