"""KV groups: which layers share blocks, and how many blocks a request holds at a time."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import AttentionSpec, KVGroup, LayerSpec, MLPSpec
from engine.config.layers import group_layers

ATTENTION: dict[str, Any] = {"num_heads": 8, "scale": 1.0}


def layers_of(*kinds: tuple[int, int, int | None]) -> tuple[LayerSpec, ...]:
    """Return a layer for each (KV heads, head size, window)."""
    return tuple(
        LayerSpec(
            attention=AttentionSpec(num_kv_heads=heads, head_dim=size, window=window, **ATTENTION),
            mlp=MLPSpec(intermediate_size=8),
        )
        for heads, size, window in kinds
    )


def test_layers_of_one_kind_are_one_group() -> None:
    for window in (None, 4096):
        assert group_layers(layers_of(*[(2, 64, window)] * 30)) == (KVGroup(tuple(range(30)), window),)


def test_two_kinds_of_layers() -> None:
    """Of 18 layers, every sixth sees everything: one group of these 3, and the 15 others in groups as large."""
    sliding = [index for index in range(18) if index % 6 != 5]
    groups = {KVGroup(tuple(sliding[start : start + 3]), 512) for start in range(0, 15, 3)}
    found = group_layers(layers_of(*[(1, 256, 512 if index % 6 != 5 else None) for index in range(18)]))
    assert len(found) == 6
    assert set(found) == groups | {KVGroup((5, 11, 17), None)}


def test_layers_without_keys_of_their_own_are_in_no_group() -> None:
    shared = AttentionSpec(num_kv_heads=1, head_dim=64, kv_source=0, **ATTENTION)
    layers = (*layers_of((1, 64, None)), LayerSpec(attention=shared, mlp=MLPSpec(intermediate_size=8)))
    assert group_layers(layers) == (KVGroup((0,), None),)


def test_shapes_that_differ() -> None:
    """A group never mixes shapes, and blocks as large as the largest group waste little."""
    kinds = [*[(4, 32, 512)] * 5, (1, 512, None)] * 2
    groups = group_layers(layers_of(*kinds))
    assert next(group for group in groups if group.window is None).layers == (5, 11)
    assert sorted(index for group in groups for index in group.layers) == list(range(12))
    assert unused(groups, kinds) == pytest.approx(1 / 9)  # no other division leaves less


def unused(groups: tuple[KVGroup, ...], kinds: list[tuple[int, int, int | None]]) -> float:
    """Return the share of memory that is not used if all blocks are as large as the largest group."""
    sizes = [sum(kinds[index][0] * kinds[index][1] for index in group.layers) for group in groups]
    return len(sizes) * max(sizes) / sum(sizes) - 1


@given(
    kinds=st.lists(
        st.tuples(st.sampled_from([1, 2]), st.sampled_from([16, 32, 64]), st.sampled_from([None, 8, 128])),
        min_size=1,
        max_size=40,
    )
)
def test_every_layer_is_in_one_group_of_its_kind(kinds: list[tuple[int, int, int | None]]) -> None:
    groups = group_layers(layers_of(*kinds))
    assert sorted(index for group in groups for index in group.layers) == list(range(len(kinds)))
    for group in groups:
        assert {kinds[index] for index in group.layers} == {kinds[group.layers[0]]}
        assert group.window == kinds[group.layers[0]][2]
    largest = max(heads * size for heads, size, _ in kinds)
    small = sum(-(-kinds.count(kind) // (largest // (kind[0] * kind[1]))) for kind in set(kinds)) * largest
    assert unused(groups, kinds) <= max(0.1, small / sum(heads * size for heads, size, _ in kinds) - 1) + 1e-9


@pytest.mark.parametrize("window", [None, 1, 7, 32, 100])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("max_in_flight", [1, 20])
def test_blocks_that_a_request_holds(window: int | None, block_size: int, max_in_flight: int) -> None:
    """It is the most that any order of steps leads to: blocks go once no token after the settled ones sees them."""
    group = KVGroup((0,), window)
    for num_tokens in (1, 5, 33, 150):
        most = 0
        for settled in range(num_tokens):
            last = min(num_tokens, settled + max_in_flight)
            first = 0 if window is None else max(0, settled - window + 1) // block_size
            most = max(most, -(-last // block_size) - first)
        found = group.num_blocks_for(num_tokens, block_size, max_in_flight)
        assert most <= found <= most + 1
        assert found <= -(-num_tokens // block_size)
