"""Rotation of heads and the KV cache of all kernels: against float64, and all groups in one memory."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import KVShape
from engine.kernels.interface import HeadNorms, Rotations
from tests.support.examples import num_examples
from tests.support.kernel_choice import code_paths
from tests.support.kernel_device import ALSO_ON_A_GPU
from tests.support.kernel_kinds import CPP_CACHES, Kind, record
from tests.support.paged_attention import fill, stored
from tests.support.recorded_kernels import assert_close
from tests.support.tensors import random_tensor


class Heads(NamedTuple):
    """Sizes of queries, keys and values, and what norms they have."""

    num_rows: int
    nums: tuple[int, int]  # of queries, and of keys and values
    size: int
    block_size: int
    norm: str
    has_v_norm: bool
    values_are_keys: bool


def heads_of(sizes: list[int]) -> st.SearchStrategy[Heads]:
    return st.builds(
        Heads,
        st.integers(5, 21),
        st.sampled_from([(1, 1), (4, 2), (3, 3), (16, 1)]),
        st.sampled_from(sizes),
        st.sampled_from([16, 32, 128]),
        st.sampled_from(["none", "head", "all"]),
        st.booleans(),
        st.booleans(),
    )


def check_rope_and_store_kv(kind: Kind, shape: Heads, seed: int) -> list[Tensor]:
    """Check rotated queries, and what is stored; return both.

    The cache is the second of three layers whose blocks alternate; row 0 is not stored, nor are k and v of None. Keys
    have very different sizes, the values of row 1 are 0, and a key of row 3 is infinite.
    """
    (num_heads, num_kv_heads), size, num_rows = shape.nums, shape.size, shape.num_rows
    dtype = torch.float32 if kind.is_cpp else kind.dtype
    generator = torch.Generator().manual_seed(seed)
    nums, kernels = [num_heads, num_kv_heads, num_kv_heads], kind.new()
    heads = random_tensor(seed, num_rows, sum(nums), size, dtype=dtype)
    q, k, v = torch.split(heads, nums, dim=1)
    k *= torch.logspace(-2, 2, num_rows)[:, None, None].to(dtype)
    v[1], k[3, 0, 2] = 0.0, torch.inf
    sizes = {"none": [], "head": [size, size], "all": [num_heads * size, num_kv_heads * size]}[shape.norm]
    weights = [random_tensor(seed + 1 + n, num, dtype=dtype).to(kind.device) for n, num in enumerate([*sizes, size])]
    q_weight, k_weight = weights[:2] if sizes else (None, None)
    norms = HeadNorms(q_weight, k_weight, weights[-1] if shape.has_v_norm else None, 1e-3)
    rotations = [*(torch.rand(2, num_rows, size, generator=generator) * 2 - 1)]
    ((other, cache, _),) = kernels.new_kv_cache([[KVShape(num_kv_heads, size)] * 3], 4, shape.block_size)
    fill(cache, slice(None), torch.nan)
    slots = torch.randperm(4 * shape.block_size, generator=generator)[:num_rows]
    slots[0] = -1
    slots_on_device = slots.to(kind.device)

    def operation(rows: Tensor, x: Tensor, *rotations: Tensor, stores: bool) -> Tensor:
        q, k, v = torch.split(x[:, : sum(nums) * size].view(len(x), -1, size), nums, dim=1)
        keys, values = (k, k if shape.values_are_keys else v) if stores else (None, None)
        out = kernels.rope_and_store_kv(q, keys, values, Rotations(*rotations), slots_on_device, cache, norms)
        return out.flatten(1)

    # In rows that are longer than the heads.
    tables = [table.to(kind.device) for table in (F.pad(heads.flatten(1), (0, 5)), *rotations)]
    alone, rotated = (
        record(kernels, tables, partial(operation, stores=stores), num_rows)(range(num_rows)).cpu()
        for stores in (False, True)
    )
    assert torch.equal(alone, rotated)
    exact = rotate(normed(q, norms.q), rotations[0])
    bound = kind.bound(exact, 2e-6 * (1 + exact.abs().amax(dim=2, keepdim=True)))
    assert_close(rotated.view(q.shape), exact, bound)
    expected = rotate(normed(k, norms.k), rotations[1]), normed(k if shape.values_are_keys else v, norms.v)
    results, places = [rotated], slots[1:]
    for found, numbers, scales in zip(stored(cache), expected, (cache.key_scales, cache.value_scales), strict=True):
        by_slot = found.cpu().flatten(0, 1)
        of_heads, exact = by_slot[places].flatten(0, 1), numbers[1:].double().flatten(0, 1)
        is_finite = exact.isfinite().all(dim=1)
        assert not of_heads[~is_finite].isfinite().all(dim=1).any()
        results.append(of_heads)
        of_heads, exact = of_heads[is_finite], exact[is_finite]
        assert_close(of_heads, exact, bounds_of_stored(kind, exact))
        if scales is not None:
            found_scales = scales.cpu().transpose(1, 2).flatten(0, 1)[places].flatten()[is_finite].double()
            most = 448 if kind.kv_cache_dtype == "fp8" else 127
            torch.testing.assert_close(found_scales * most, exact.abs().amax(dim=1), rtol=1e-5, atol=0)
        by_slot[places] = torch.nan
        assert by_slot.isnan().all()
    assert not other.keys.view(torch.uint8).any()
    return results


def bounds_of_stored(kind: Kind, exact: Tensor) -> Tensor:
    """Return the allowed errors of stored heads: half a step of the cache's numbers, and a little of their largest."""
    largest = exact.abs().amax(dim=1, keepdim=True)
    if kind.kv_cache_dtype == "auto" and not kind.is_cpp:
        return kind.bound(exact)
    if kind.kv_cache_dtype == "fp8":
        step = torch.maximum(largest / 448 * 2**-9, 2**-3 * exact.abs())
    else:
        step = largest / 127 if kind.kv_cache_dtype == "int8" else exact.abs() * 2**-7 * (kind.dtype == torch.bfloat16)
    return 0.501 * step + 1e-6 * (1 + largest)


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return the RMS norm of each head, or of all together, in float64."""
    if weight is None:
        return x
    rows = x.double().reshape(-1, len(weight))
    return F.rms_norm(rows, (len(weight),), weight.double().cpu(), 1e-3).view(x.shape)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    first, second = x.double().chunk(2, dim=-1)
    c, s = table[:, None].double().chunk(2, dim=-1)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


@pytest.mark.parametrize("kind", [Kind("torch"), Kind("torch", torch.bfloat16), *CPP_CACHES], ids=str)
@settings(max_examples=num_examples(10, 60), deadline=None)
@given(shape=heads_of([16, 48, 64, 80, 96, 256, 576]), seed=st.integers(0, 2**32))
def test_rope_and_store_kv(kind: Kind, shape: Heads, seed: int) -> None:
    """All code paths compute the same bits."""
    results = check_rope_and_store_kv(kind, shape, seed)
    if kind.is_cpp:
        best = check_rope_and_store_kv(kind._replace(name=code_paths()[0]), shape, seed)
        torch.testing.assert_close(results, best, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"),
    [
        pytest.param(dtype, kv_cache_dtype, marks=ALSO_ON_A_GPU)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for kv_cache_dtype in ("auto", "int8", "fp8")
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by NumPy, in the interpreter
@settings(max_examples=num_examples(1, 15), deadline=None)
@given(shape=heads_of([10, 16, 64, 80, 96, 256, 576]), seed=st.integers(0, 2**32))
def test_rope_and_store_kv_in_triton(dtype: torch.dtype, kv_cache_dtype: str, shape: Heads, seed: int) -> None:
    if kv_cache_dtype != "auto":  # norms are rounded before
        shape = shape._replace(num_rows=6, norm="none", has_v_norm=False)
    check_rope_and_store_kv(Kind("triton", dtype, kv_cache_dtype=kv_cache_dtype), shape, seed)


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
