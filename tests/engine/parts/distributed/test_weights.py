"""The parts of weights: those of all ranks together are the whole, in every format."""

import pytest
import torch
from torch import Tensor

from engine.parts.distributed.plan import ShardingPlan, shard
from engine.parts.quantized.weights import Float8Tensor, GroupQuantized
from engine.weights import Weight
from tests.engine.parts.distributed.test_plan import config, plans
from tests.support.packed_weights import random_weight
from tests.support.tensors import random_tensor

WIDTH = 1536
DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def numbers(weight: Weight) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize(torch.float32)


def float8(rows: int, columns: int) -> Float8Tensor:
    codes = random_tensor(1, rows, columns).to(torch.float8_e4m3fn)
    return Float8Tensor.from_scales(codes, random_tensor(2, -(-rows // 128), -(-columns // 128)).abs())


def weight_of(name: str, rows: int, columns: int) -> Weight:
    return float8(rows, columns) if name == "float8" else random_weight(name, rows, columns, seed=4)[0]


def parts_of(name: str, weight: Weight, all_plans: list[ShardingPlan]) -> list[Weight]:
    return [part for plan in all_plans for _, part in shard([(name, weight)], plan, torch.float32)]


@pytest.mark.parametrize("form", ["float32", "q4_k", "q6_k", "q8_0", "mxfp4", "uint4", "uint8", "float8"])
def test_parts_together_are_the_whole(form: str) -> None:
    column_block = 256 if form.endswith("_k") else 128
    all_plans = plans(3, config(9, 3, WIDTH), column_block)
    for name, dim, weight in ((DOWN, 1, weight_of(form, 64, WIDTH)), (UP, 0, weight_of(form, WIDTH, 256))):
        parts = parts_of(name, weight, all_plans)
        assert {type(part) for part in parts} == {type(weight)}
        assert [part.shape[dim] for part in parts] == [WIDTH // 3] * 3
        assert torch.equal(torch.cat([numbers(part) for part in parts], dim=dim), numbers(weight))


@pytest.mark.parametrize("form", ["float32", "uint4", "uint8", "float8"])
def test_parts_of_rows_do_not_keep_the_whole(form: str) -> None:
    for part in parts_of(UP, weight_of(form, WIDTH, 256), plans(3, config(9, 3, WIDTH))):
        assert isinstance(part, Tensor | GroupQuantized | Float8Tensor)
        tensors = [part] if isinstance(part, Tensor) else [part.codes, part.scales]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_packed_columns_are_unpacked_where_ranks_cut_their_blocks() -> None:
    weight = weight_of("q4_k", 64, WIDTH)
    parts = parts_of(DOWN, weight, plans(9, config(9, 3, WIDTH), 256))
    assert all(isinstance(part, Tensor) for part in parts)
    assert torch.equal(torch.cat([numbers(part) for part in parts], dim=1), numbers(weight))
