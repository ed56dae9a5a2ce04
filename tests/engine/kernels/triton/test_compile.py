"""The Triton kernels compile for real cards, without having one, and the machine code is as intended.

Compile gate: registers, shared memory and programs of a multiprocessor, the instructions of tensor cores, and that
memory is read ahead of what is computed. Bit gate: kernels that must agree to the bit compute the same expressions with
the same instructions (`tests/support/kernel_arithmetic.py`), which another version of the compiler might change.
"""

from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.kernels.triton.tiles import TABLE
from tests.support.compiled_kernels import MULTIPROCESSORS, RESERVED_SHARED, Compiled, compile_kernels
from tests.support.kernel_arithmetic import SUMS, Arithmetic, load_key
from tests.support.kernel_variants import HEADS, HEADS_WITH_SINKS, PACKED, tiles_of, variants_of

# Bytes of shared memory that one program may have: NVIDIA's tables of compute capabilities; AMD's CDNA 3 manual.
SHARED = {f"cuda {version}": limits.shared - RESERVED_SHARED for version, limits in MULTIPROCESSORS.items()}
SHARED["hip gfx942"] = 64 * 1024
INSTRUCTIONS = {"cuda 9.0": "wgmma", "cuda 10.0": "tcgen05"}  # of products of 16-bit numbers; others have mma.sync


class Limit(NamedTuple):
    kernels: str  # pattern of their names
    registers: int  # of a thread, at most
    programs: int  # of a multiprocessor, at least
    spilled: int = 0  # bytes of a thread, at most


SAMPLER = [Limit("forbid", 64, 2), Limit("collect", 128, 1), Limit("draw", 128, 1), Limit("top *", 128, 1)]
NORMED = Limit("rope_and_store_kv with norms*", 255, 6, 64)
OTHERS = [*SAMPLER, NORMED, Limit("reduce *", 64, 6), Limit("shrink", 128, 6), Limit("*", 80, 4)]
OTHERS_WITH_FEWER_WARPS = [*SAMPLER, NORMED, Limit("reduce *", 64, 3), Limit("shrink", 136, 4), Limit("*", 80, 3)]
MMA_SYNC = [
    Limit("linear 32x32*", 176, 2),
    Limit("linear 64*", 168, 1),
    Limit("linear * 32x32", 96, 2),
    Limit("linear * 64x64", 168, 1),
    Limit("linear*", 255, 1, 16),
    Limit("expert_linear*", 255, 1, 16),
    Limit("attend 256*", 255, 1, 224),
    Limit("attend 5*", 255, 1, 224),
    Limit("attend *", 255, 2, 240),
]
# The first that matches a kernel holds for it.
LIMITS = {
    "cuda 8.0": [*MMA_SYNC, *OTHERS],
    "cuda 8.6": [*MMA_SYNC, *OTHERS_WITH_FEWER_WARPS],
    "cuda 8.9": [*MMA_SYNC, *OTHERS_WITH_FEWER_WARPS],
    "cuda 9.0": [
        Limit("linear 64x32 unaligned", 232, 2),
        Limit("linear 64*", 128, 2),
        Limit("linear 128x128", 128, 2),
        Limit("linear 128*", 192, 1),
        Limit("linear * 64x32", 72, 1),
        Limit("linear * 64x128", 200, 2),
        Limit("linear *", 152, 1),
        Limit("expert_linear*", 208, 1),
        Limit("attend 64*", 248, 2),
        Limit("attend 5*", 255, 1, 136),
        Limit("attend 256*", 255, 1, 136),
        Limit("attend *", 255, 2, 40),
        *OTHERS,
    ],
    "cuda 10.0": [
        Limit("linear 64x32 unaligned", 255, 1),
        Limit("linear 64*", 112, 1),
        Limit("linear *", 200, 1),
        Limit("expert_linear*", 255, 1, 16),
        Limit("attend *", 255, 1, 256),
        *OTHERS,
    ],
    "cuda 12.0": [*MMA_SYNC, *OTHERS_WITH_FEWER_WARPS],
}


class Target(NamedTuple):
    name: str
    dtype: str
    kernels: tuple[str, ...] = ("*",)  # patterns of their names


# A kernel compiles for one to four seconds, so `make test` compiles one.
SOON = [Target("cuda 9.0", "*bf16", ("linear 64x128",))]
PRODUCTS, ATTENTION = ("linear [0-9]*", "add_splits"), ("attend 128", "reduce 128")
WITH_LIMITS = [
    Target("cuda 9.0", "*bf16"),
    Target("cuda 8.0", "*fp16", (*PRODUCTS, *ATTENTION, "linear int4 of 128*")),
    Target("cuda 8.6", "*fp16", ("linear 128x128", "attend 128")),
    Target("cuda 8.9", "*bf16", ("linear 128x128", "attend 128")),
    Target("cuda 10.0", "*bf16", (*PRODUCTS, *ATTENTION)),
]
# All but experts and heads of more than 256 dimensions, which nobody has compiled for these targets yet.
COMPILED = ("[!ae]*", "a[!t]*", "attend [!5]*", "expand*")
LATER = [Target(name, dtype, COMPILED) for name in SHARED for dtype in ("*fp16", "*bf16", "*fp32")]
LATER = [*WITH_LIMITS, *(target for target in LATER if (target.name, target.dtype) != ("cuda 9.0", "*bf16"))]
WITH_ALL_PRODUCTS = [
    target
    for target in LATER
    if target.name.startswith("cuda") and target.dtype != "*fp32" and {*target.kernels} & {"*", *PRODUCTS, *COMPILED}
]


def for_targets(soon: list[Target], later: list[Target]) -> pytest.MarkDecorator:
    """Return a decorator that runs a test for targets, some of them only in `make test-long`."""
    targets = [*soon, *(pytest.param(target, marks=pytest.mark.long) for target in later)]
    return pytest.mark.parametrize("target", targets, ids=lambda target: " ".join([*target[:2], *target.kernels[:1]]))


@cache
def compiled(target: Target, folder: Path) -> dict[str, Compiled]:
    variants = variants_of(target.name, target.dtype)
    chosen = [variant for variant in variants if any(fnmatch(variant.name, kernels) for kernels in target.kernels)]
    return compile_kernels(target.name, chosen, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder for what Triton compiles, so that nothing compiled before is taken for new."""
    return tmp_path_factory.mktemp("triton")


@for_targets(SOON, LATER)
def test_resources(target: Target, folder: Path) -> None:
    found = compiled(target, folder)
    assert found
    assert [kernel.name for kernel in found.values() if kernel.shared > SHARED[target.name]] == []
    if target not in [*SOON, *WITH_LIMITS]:
        return
    beyond = []
    for kernel in found.values():
        limit = next(limit for limit in LIMITS[target.name] if fnmatch(kernel.name, limit.kernels))
        if kernel.registers > limit.registers or kernel.programs < limit.programs or kernel.spilled > limit.spilled:
            beyond.append((kernel.name, kernel.registers, kernel.programs, kernel.spilled, limit))
    assert beyond == []


@for_targets(SOON, WITH_ALL_PRODUCTS)
def test_products_use_tensor_cores_and_read_ahead(target: Target, folder: Path) -> None:
    found = compiled(target, folder)
    products = [kernel for name, kernel in found.items() if name.startswith(("linear", "expert", "attend"))]
    assert products
    for kernel in products:
        (instruction,) = kernel.instructions
        is_small = kernel.name.startswith("attend 5")  # tiles of 16 rows for heads of more than 256
        assert instruction.startswith("mma.sync" if is_small else INSTRUCTIONS.get(target.name, "mma.sync")), (
            kernel.name
        )
        assert kernel.num_copies_ahead or "unaligned" in kernel.name or "attend 576" in kernel.name, kernel.name


# Bit gate


def assert_same(kernels: Iterable[Compiled], pointer: str) -> None:
    """Compare what kernels store through a pointer, and their instructions."""
    first, *others = kernels
    assert others
    for other in others:
        assert other.instructions == first.instructions, (first.name, other.name)
        assert other.nums_products == first.nums_products, (first.name, other.name)
        assert lines(other, pointer) == lines(first, pointer), (first.name, other.name)


def arithmetic(kernel: Compiled) -> Arithmetic:
    assert kernel.arithmetic is not None
    return kernel.arithmetic


def lines(kernel: Compiled, pointer: str) -> list[list[str]]:
    return [arithmetic(kernel).describe(key) for key in arithmetic(kernel).stored(pointer)]


@for_targets([], WITH_ALL_PRODUCTS)
def test_products_of_all_tiles_are_the_same(target: Target, folder: Path) -> None:
    """A row is added up in the same way whatever the number of rows and the alignment of pointers and strides."""
    found = compiled(target, folder)
    tiles = tiles_of(target.name, target.dtype)
    assert f"linear {tiles.linear.tiles[0].rows}x{tiles.linear.tiles[0].columns} unaligned" in found
    for name in ("", *PACKED):
        table = tiles.packed_linear if name else tiles.linear
        names = [f"linear {name} {tile.rows}x{tile.columns}".replace("  ", " ") for tile in table.tiles]
        kernels = [found[name] for name in names if name in found]
        kernels += [found[f"{names[0]} unaligned"]] if f"{names[0]} unaligned" in found else []
        if len(kernels) > 1:
            assert_same(kernels, "out")
    assert not any(kernel.uses_fma for kernel in found.values() if kernel.arithmetic)


@for_targets([], WITH_ALL_PRODUCTS)
def test_splits_are_the_same_in_one_kernel_and_in_two(target: Target, folder: Path) -> None:
    found = compiled(target, folder)
    whole = [kernel for name, kernel in found.items() if name.endswith("of 2 splits")]
    assert_same(whole, "out")
    (split,) = (kernel for name, kernel in found.items() if name.endswith(" split"))
    assert (split.instructions, split.nums_products) == (whole[0].instructions, whole[0].nums_products)
    (partial,) = arithmetic(split).stored("partial")
    (added,) = arithmetic(found["add_splits"]).stored("out")
    key, both = arithmetic(found["add_splits"]).replace(added, {load_key("partial"): partial}, arithmetic(split))
    assert [both.describe(key)] == lines(whole[0], "out")


@for_targets([], WITH_ALL_PRODUCTS)
def test_bias_and_residual_are_added_to_the_same_sums(target: Target, folder: Path) -> None:
    found = compiled(target, folder)
    (size,) = {name.removesuffix(" alone") for name in found if name.endswith(" alone")}
    alone = arithmetic(found[f"{size} alone"])
    (rounded,) = alone.stored("out")
    (sums,) = alone.expressions[rounded].operands
    for name in (size, f"{size} with bias"):
        assert sums in arithmetic(found[name]).expressions, name


@for_targets([], WITH_ALL_PRODUCTS)
def test_segments_are_merged_in_the_same_way_in_one_kernel_and_in_two(target: Target, folder: Path) -> None:
    found = compiled(target, folder)
    sizes = [size for size in HEADS if f"attend {size}" in found]
    assert sizes
    for size in sizes:
        attend, reduce = arithmetic(found[f"attend {size}"]), arithmetic(found[f"reduce {size}"])
        (partial,), (_, total), (whole,) = (attend.stored(name) for name in ("partial", "states", "q"))
        (quotient,) = attend.expressions[whole].operands
        if size not in HEADS_WITH_SINKS:  # sinks come after all segments, so they are not in what is stored
            # What is stored for another kernel, or divided.
            assert attend.expressions[quotient].operands == (partial, total)
        keys = tiles_of(target.name, target.dtype).attention_for(size).keys
        # What a segment gives: loops over its keys, whose last step the compiler may have taken out under a condition.
        segments = {
            key
            for key, expression in attend.expressions.items()
            if expression.operation in (f"loop by {keys}", "if", *([SUMS] if is_weighted(attend, key) else []))
        }
        replaced = {key: load_key("partial" if is_weighted(attend, key) else "states") for key in segments}
        assert set(replaced.values()) == {load_key("partial"), load_key("states")}
        (merged,) = reduce.stored("q")
        key, both = attend.replace(whole, replaced, reduce)
        assert both.describe(key) == reduce.describe(merged)


def is_weighted(attend: Arithmetic, segment: str) -> bool:
    """Return whether a loop over the keys of a segment, or sums, are of values rather than of weights or scores."""
    return "load values" in {attend.expressions[key].operation for key in attend.below(segment)}


def test_segments_are_whole_steps() -> None:
    """Otherwise a step would cross the end of a segment, and count keys twice."""
    for tiles in TABLE.values():
        for sizes in (tiles.attention, tiles.attention_for(256)):
            assert sizes.segment % sizes.keys == 0
