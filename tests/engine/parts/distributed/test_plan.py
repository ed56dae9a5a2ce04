"""The sharding plan: which numbers of ranks work, and where parameters are cut."""

import msgspec
import pytest

from engine.config import ModelConfig
from engine.parts.distributed.plan import Axis, ShardingPlan, check_num_ranks, divide
from tests.support.model_configs import TINY, llama_config


def config(num_heads: int, num_kv_heads: int, width: int = 1536) -> ModelConfig:
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    sizes = {"vocab_size": 288, "num_token_ids": 288, "hidden_size": 64, "intermediate_size": width}
    return llama_config(**TINY | heads | sizes)


def plans(num_ranks: int, model: ModelConfig, column_block: int = 32) -> list[ShardingPlan]:
    return [ShardingPlan(model, rank, num_ranks, column_block) for rank in range(num_ranks)]


def test_parts_are_whole_blocks_that_cover_all() -> None:
    assert divide(10, 3, 1) == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert divide(288, 2, 32) == [slice(0, 128), slice(128, 288)]
    assert divide(70, 2, 32) == [slice(0, 32), slice(32, 70)]


@pytest.mark.parametrize(
    ("heads", "working", "refused"),
    [((9, 3), (3, 9), {2: "3 or 9", 4: "3 or 9", 6: "3 or 9"}), ((8, 2), (2, 4, 8), {3: "2, 4 or 8", 16: "2, 4 or 8"})],
)
def test_numbers_of_ranks(heads: tuple[int, int], working: tuple[int, ...], refused: dict[int, str]) -> None:
    for num_ranks in (1, *working):
        check_num_ranks(config(*heads), num_ranks)
    for num_ranks, numbers in refused.items():
        with pytest.raises(
            ValueError, match=f"--tensor-parallel-size {num_ranks}: .*divide among {numbers} ranks only"
        ):
            check_num_ranks(config(*heads), num_ranks)


def test_kv_heads_that_would_be_divided_between_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"12 attention heads and 4 KV heads.* among 2, 4 or 12 ranks only"):
        check_num_ranks(config(12, 4), 3)


def test_a_norm_of_all_heads_needs_each_kv_head_once() -> None:
    model = config(8, 2)
    layers = tuple(
        msgspec.structs.replace(layer, attention=msgspec.structs.replace(model.attentions[0], qk_norm="all"))
        for layer in model.layers
    )
    normed = msgspec.structs.replace(model, layers=layers)
    check_num_ranks(normed, 2)
    with pytest.raises(ValueError, match="among 2 ranks only"):
        check_num_ranks(normed, 4)


def test_ranks_share_kv_heads_with_their_neighbours() -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    parts = [plan.part(name, Axis.KV_HEADS, 32) for plan in plans(4, config(8, 2))]
    assert parts == [slice(0, 16)] * 2 + [slice(16, 32)] * 2


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
