"""Rotation of heads and the KV cache of plain torch and of Triton: against float64, and all groups in one memory.

tests/engine/kernels/cpu/test_attention.py tests those of the C++ kernels, which have a layout of their own.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import KVShape
from engine.kernels.interface import HeadNorms, Rotations
from tests.support.examples import num_examples
from tests.support.kernel_choice import code_paths
from tests.support.kernel_device import (
    ALSO_ON_A_GPU,
    DEVICE,
    HAS_FLOAT8,
    IS_INTERPRETED,
    assert_close,
    random_tensor,
)
from tests.support.kernel_kinds import Kind
from tests.support.tensors import random_tensor as random_on_cpu

each_triton = pytest.mark.parametrize("kind", [pytest.param("triton", marks=ALSO_ON_A_GPU)])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = torch.float8_e4m3fn if HAS_FLOAT8 and not IS_INTERPRETED else torch.uint8  # its bits


class Heads(NamedTuple):
    """Sizes of queries, keys and values, and what norms they have."""

    num_rows: int
    nums: tuple[int, int]  # of queries, and of keys and values
    size: int
    block_size: int
    norm: str
    has_v_norm: bool
    values_are_keys: bool


heads_of_any_size = st.builds(
    Heads,
    st.integers(1, 9),
    st.sampled_from([(1, 1), (4, 2), (3, 3), (16, 1)]),
    st.sampled_from([10, 16, 64, 80, 96, 256, 576]),
    st.sampled_from([16, 32, 128]),
    st.sampled_from(["none", "head", "all"]),
    st.booleans(),
    st.booleans(),
)


def check_rope_and_store_kv(kind: Kind, shape: Heads, seed: int) -> None:
    """The cache is the second of three layers whose blocks alternate; row 0 is not stored, nor are k and v of None."""
    (num_heads, num_kv_heads), size, dtype = shape.nums, shape.size, kind.dtype
    heads = [num_heads, num_kv_heads, num_kv_heads]

    def random_tensor(seed: int, *shape: int) -> Tensor:
        return random_on_cpu(seed, *shape, dtype=dtype).to(kind.device)

    q, k, v = torch.split(random_tensor(seed, shape.num_rows, sum(heads), size), heads, dim=1)
    v = k if shape.values_are_keys else v
    generator = torch.Generator().manual_seed(seed)
    rotations = Rotations(*(torch.rand(2, shape.num_rows, size, generator=generator).to(kind.device) * 2 - 1))
    sizes = {"none": [], "head": [size, size], "all": [num_heads * size, num_kv_heads * size]}[shape.norm]
    q_weight, k_weight = map(random_tensor, (seed + 1, seed + 2), sizes) if sizes else (None, None)
    norms = HeadNorms(q_weight, k_weight, random_tensor(seed + 3, size) if shape.has_v_norm else None, 1e-3)
    kernels = kind.new()
    ((other, cache, _),) = kernels.new_kv_cache([[KVShape(num_kv_heads, size)] * 3], 4, shape.block_size)
    slots = torch.randperm(4 * shape.block_size, generator=generator)[: shape.num_rows].to(kind.device)
    slots[0] = -1
    rotated = kernels.rope_and_store_kv(q, k, v, rotations, slots, cache, norms)
    assert_close(rotated, rotate(normed(q, norms.q), rotations.q))
    alone = kernels.rope_and_store_kv(q, None, None, rotations, slots, cache, norms)
    assert torch.equal(alone, rotated)
    blocks, offsets = slots[1:] // shape.block_size, slots[1:] % shape.block_size
    assert_close(cache.keys[blocks, offsets], rotate(normed(k, norms.k), rotations.k)[1:])
    assert_close(cache.values[blocks, offsets], normed(v, norms.v)[1:])
    assert not other.keys.any()
    cache.keys[blocks, offsets] = cache.values[blocks, offsets] = 0.0
    assert not cache.keys.any()
    assert not cache.values.any()


@settings(max_examples=num_examples(20, 100), deadline=None)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), shape=heads_of_any_size, seed=st.integers(0, 2**32))
def test_rope_and_store_kv_in_torch(dtype: torch.dtype, shape: Heads, seed: int) -> None:
    check_rope_and_store_kv(Kind("torch", dtype), shape, seed)


@each_triton
@settings(max_examples=num_examples(2, 40), deadline=None)
@given(dtype=st.sampled_from(DTYPES), shape=heads_of_any_size, seed=st.integers(0, 2**32))
def test_rope_and_store_kv_in_triton(kind: str, dtype: torch.dtype, shape: Heads, seed: int) -> None:
    check_rope_and_store_kv(Kind(kind, dtype), shape, seed)


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the RMS norm of each head, or of all together, in float64."""
    if weight is None:
        return x
    rows = x.double().reshape(-1, len(weight))
    return torch.nn.functional.rms_norm(rows, (len(weight),), weight.double(), 1e-3).view(x.shape)


@each_triton
@settings(max_examples=num_examples(2, 30), deadline=None)
@given(
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([10, 64, 80]),
    dtype=st.sampled_from(DTYPES),
    kv_cache_dtype=st.sampled_from(["int8", "fp8"]),
    seed=st.integers(0, 2**32),
)
def test_a_cache_of_8_bits(
    kind: str, num_kv_heads: int, head_dim: int, dtype: torch.dtype, kv_cache_dtype: str, seed: int
) -> None:
    """Codes are the nearest in -127 .. 127, or in float8; the scale of a head is that of its largest number."""
    q, k, v = torch.split(random_tensor(seed, 6, 3 * num_kv_heads, head_dim, dtype=dtype), num_kv_heads, dim=1)
    k *= torch.logspace(-3, 3, 6, device=DEVICE)[:, None, None].to(dtype)
    v[1] = 0.0
    k[3, 0, 2] = torch.inf
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(6, head_dim // 2, generator=generator).to(DEVICE)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    slot_mapping = torch.randperm(2 * 16, generator=generator)[:6].to(DEVICE)
    slot_mapping[2] = -1  # not stored
    kernels = Kind(kind, dtype).new(kv_cache_dtype=kv_cache_dtype)
    ((_, cache),) = kernels.new_kv_cache([[KVShape(num_kv_heads, head_dim)] * 2], 2, 16)
    kernels.rope_and_store_kv(q, k, v, Rotations(table, table), slot_mapping, cache)
    heads = (
        (rotate(k, table), cache.keys, cache.key_scales),
        (v, cache.values, cache.value_scales),
    )
    for numbers, stored, scales in heads:
        assert stored.dtype == (torch.int8 if kv_cache_dtype == "int8" else FLOAT8)
        assert scales is not None
        codes = stored if kv_cache_dtype == "int8" else stored.view(torch.float8_e4m3fn)
        for row, slot in enumerate(slot_mapping.tolist()):
            if slot < 0:
                continue
            block, offset = divmod(slot, 16)
            is_finite = numbers[row].isfinite().all(dim=1)
            assert scales[block, ~is_finite, offset].isnan().all()
            of_head, expected = scales[block, is_finite, offset].double(), numbers[row, is_finite].double()
            most = 127 if kv_cache_dtype == "int8" else 448
            torch.testing.assert_close(of_head * most, expected.abs().amax(dim=1), rtol=1e-5, atol=0)
            errors = (codes[block, offset, is_finite].double() * of_head[:, None] - expected).abs()
            bounds = 0.501 * of_head[:, None].expand_as(errors)  # half of the step between codes
            if kv_cache_dtype == "fp8":
                bounds = torch.maximum(bounds * 2**-9, 1.001 * 2**-4 * expected.abs())
            assert (errors <= bounds).all()
    is_empty = torch.ones(32, dtype=torch.bool, device=DEVICE)
    is_empty[slot_mapping[slot_mapping >= 0]] = False
    assert not cache.keys.view(torch.uint8).flatten(0, 1)[is_empty].any()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    first, second = x.double().chunk(2, dim=-1)
    c, s = table[:, None].double().chunk(2, dim=-1)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


GROUPS = [[KVShape(2, 64), KVShape(2, 64)], [KVShape(1, 512)], [KVShape(3, 16)]]  # the second is the largest
NUM_BLOCKS, BLOCK_SIZE = 5, 16


@pytest.mark.parametrize(
    ("name", "dtype", "kv_cache_dtype"),
    [
        *(
            pytest.param("triton", torch.float16, kv_cache_dtype, marks=ALSO_ON_A_GPU)
            for kv_cache_dtype in ("auto", "int8", "fp8")
        ),
        *((path, torch.bfloat16, "auto") for path in code_paths()[:1]),
        *((path, torch.float32, "int8") for path in code_paths()[:1]),
    ],
)
def test_groups_share_the_memory(name: str, dtype: torch.dtype, kv_cache_dtype: str) -> None:
    """Blocks that different groups hold do not overlap, nor do the layers of a group."""
    kernels = Kind(name, dtype).new(kv_cache_dtype=kv_cache_dtype)
    has_scales = kv_cache_dtype != "auto"
    bytes_per_token = 2 * 512 + 2 * 4 * 4 if has_scales else 2 * 2 * 512
    assert kernels.kv_cache_bytes(GROUPS, BLOCK_SIZE) == BLOCK_SIZE * bytes_per_token
    caches = kernels.new_kv_cache(GROUPS, NUM_BLOCKS, BLOCK_SIZE)
    parts: list[Tensor] = []
    for block, (group, shapes) in enumerate(zip(caches, GROUPS, strict=True)):
        for layer, shape in zip(group, shapes, strict=True):
            assert layer.keys.numel() == NUM_BLOCKS * BLOCK_SIZE * shape.num_kv_heads * shape.head_dim
            scales = [some for some in (layer.key_scales, layer.value_scales) if some is not None]
            assert [some.shape for some in scales] == [(NUM_BLOCKS, shape.num_kv_heads, BLOCK_SIZE)] * 2 * has_scales
            parts += [tensor[block].view(torch.uint8) for tensor in (layer.keys, layer.values, *scales)]
    assert not any(part.any() for part in parts)
    for number, part in enumerate(parts):
        part.fill_(number + 1)
    for number, part in enumerate(parts):
        assert (part == number + 1).all()
