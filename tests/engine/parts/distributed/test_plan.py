"""The sharding plan: which numbers of ranks work, and where parameters are cut."""

import re
from typing import Any

import pytest
from msgspec.structs import replace

from engine.config import GatedDeltaNetSpec, ModelConfig, ShortConvSpec
from engine.parts.distributed.plan import Axis, ShardingPlan, check_num_ranks, divide
from tests.support.model_configs import TINY, llama_config


def config(num_heads: int, num_kv_heads: int, width: int = 1536) -> ModelConfig:
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    sizes = {"vocab_size": 288, "num_token_ids": 288, "hidden_size": 64, "intermediate_size": width}
    return llama_config(**TINY | heads | sizes)


def changed(**changes: Any) -> ModelConfig:
    """Return a model with changes to all layers."""
    model = config(8, 2)
    return replace(model, layers=tuple(replace(layer, **changes) for layer in model.layers))


def delta_net(num_keys: int, *, is_tiled: bool = False) -> ModelConfig:
    """Return a model with three value heads for each key head."""
    sizes = {"num_key_heads": num_keys, "num_value_heads": 3 * num_keys, "key_head_dim": 16, "value_head_dim": 32}
    return changed(attention=None, mixer=GatedDeltaNetSpec(**sizes, conv_size=4, is_tiled=is_tiled))


def plans(num_ranks: int, model: ModelConfig, column_block: int = 32) -> list[ShardingPlan]:
    return [ShardingPlan(model, rank, num_ranks, column_block) for rank in range(num_ranks)]


def test_parts_are_whole_blocks_that_cover_all() -> None:
    assert divide(10, 3, 1) == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert divide(288, 2, 32) == [slice(0, 128), slice(128, 288)]
    assert divide(70, 2, 32) == [slice(0, 32), slice(32, 70)]


@pytest.mark.parametrize(
    ("model", "refused", "told"),
    [
        (config(9, 3), (2, 4, 6), "9 attention heads and 3 KV heads, which divide among 3 or 9"),
        (config(8, 2), (3, 16), "8 attention heads and 2 KV heads, which divide among 2, 4 or 8"),
        (config(12, 4), (3,), "12 attention heads and 4 KV heads, which divide among 2, 4 or 12"),
        # A norm of all heads needs each KV head once.
        (changed(attention=replace(config(8, 2).attentions[0], qk_norm="all")), (4,), "divide among 2"),
        (delta_net(4), (3, 8), "layers of 4 key heads, which divide among 2 or 4"),
        (changed(attention=None, mixer=ShortConvSpec(num_channels=3, conv_size=3)), (4,), "divide among 2 or 3"),
    ],
)
def test_numbers_of_ranks(model: ModelConfig, refused: tuple[int, ...], told: str) -> None:
    for num_ranks in (1, *map(int, re.findall(r"\d+", told.rpartition("among")[2]))):
        check_num_ranks(model, num_ranks)
    for num_ranks in refused:
        with pytest.raises(ValueError, match=f"--tensor-parallel-size {num_ranks}: .*{told} ranks only"):
            check_num_ranks(model, num_ranks)


@pytest.mark.parametrize("is_tiled", [False, True])
def test_a_rank_has_the_value_heads_of_its_key_heads(is_tiled: bool) -> None:
    def rows(first: int, size: int, heads: list[int]) -> list[int]:
        return [first + head * size + row for head in heads for row in range(size)]

    for plan in plans(2, delta_net(4, is_tiled=is_tiled)):
        keys = [2 * plan.rank, 2 * plan.rank + 1]
        values = [head for head in range(12) if (head % 4 if is_tiled else head // 3) in keys]
        assert plan.part("model.layers.0.linear_attn.out_proj.weight", Axis.VALUES, 384).tolist() == rows(0, 32, values)
        expected = rows(0, 16, keys) + rows(64, 16, keys) + rows(128, 32, values)
        assert plan.part("model.layers.0.linear_attn.conv1d.weight", Axis.KEYS_AND_VALUES, 512).tolist() == expected
        assert plan.local_config().mixers[0].num_channels == len(expected)


def test_ranks_share_kv_heads_with_their_neighbours() -> None:
    parts = plans(4, config(8, 2))[0].parts("model.layers.0.self_attn.k_proj.weight", Axis.KV_HEADS, 32)
    assert parts == [[slice(0, 16)]] * 2 + [[slice(16, 32)]] * 2


@pytest.mark.parametrize(
    ("width", "num_ranks", "column_block", "sizes"),
    [
        (1536, 3, 256, [512, 512, 512]),
        (1536, 4, 256, [256, 512, 256, 512]),
        (1536, 9, 256, [160, 160, 192] * 3),  # fewer blocks than ranks
        (1536, 2, 32, [768, 768]),
        (44, 2, 256, [22, 22]),
    ],
)
def test_widths_are_cut_on_the_borders_of_blocks(
    width: int, num_ranks: int, column_block: int, sizes: list[int]
) -> None:
    local = [plan.local_config().layers[0].mlp for plan in plans(num_ranks, config(36, 36, width), column_block)]
    assert [mlp.intermediate_size for mlp in local if mlp is not None] == sizes
