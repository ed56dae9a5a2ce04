"""The Triton kernels compile for real cards, without having one, and the machine code is as intended.

Compile gate: registers, shared memory and programs of a multiprocessor, the instructions of tensor cores, and that
memory is read ahead of what is computed. Bit gate: kernels that must agree to the bit compute the same expressions with
the same instructions (`tests/support/kernel_arithmetic.py`), which another version of the compiler might change.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.parts.triton.tiles import TABLE
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
LARGER = [*SAMPLER, Limit("rope_and_store_kv with norms*", 255, 6, 64), Limit("advance", 208, 9)]
OTHERS = [*LARGER, Limit("reduce *", 64, 6), Limit("shrink", 128, 6), Limit("*", 80, 4)]
OTHERS_WITH_FEWER_WARPS = [*LARGER, Limit("reduce *", 64, 3), Limit("shrink", 136, 4), Limit("*", 80, 3)]
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
    kernels: tuple[str, ...]  # patterns of their names
    limited: tuple[str, ...] = ()  # of those whose limits are known


PRODUCTS, ATTENTION = ("linear [0-9]*", "add_splits"), ("attend 128", "reduce 128")
# All but experts and heads of more than 256 dimensions, which nobody has compiled for most targets yet.
MOST = ("[!ae]*", "a[!t]*", "attend [!5]*", "expand*")
MIXERS = ("advance", "convolve*")
# What takes much shared memory, or has bits.
LARGE = (*PRODUCTS, *MIXERS, "attend [!5]*", "reduce [!5]*", "shrink", "expand")
# A kernel compiles for one to four seconds, so `make test` compiles one. Each table of tiles and each type is compiled
# once, and each format of weights by a card that converts float8 (8.9, 9.0 and later) and by one that does not.
TARGETS = [
    Target("cuda 9.0", "*bf16", ("linear 64x128",), ("*",)),
    Target("cuda 9.0", "*bf16", ("*",), ("*",)),
    Target("cuda 8.0", "*fp16", MOST, (*PRODUCTS, *ATTENTION, "linear int4 of 128*")),
    Target("cuda 8.6", "*fp16", ("linear 128x128", "attend 128", *MIXERS), ("*",)),
    Target("cuda 8.9", "*bf16", (*LARGE, "linear float*", "linear int8 with*"), ("linear 128x128", "attend 128")),
    Target("cuda 10.0", "*bf16", (*LARGE, "linear int*"), (*PRODUCTS, *ATTENTION)),
    Target("cuda 12.0", "*fp16", (*PRODUCTS, *ATTENTION, *MIXERS), MIXERS),
    Target("hip gfx942", "*fp16", (*LARGE, "linear float*")),
    Target("cuda 9.0", "*fp32", (*LARGE, "linear int8 of*")),
]


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


@pytest.mark.parametrize(
    "target",
    [pytest.param(target, marks=[pytest.mark.long] if index else []) for index, target in enumerate(TARGETS)],
    ids=lambda target: " ".join([*target[:2], *target.kernels[:1]]),
)
def test_what_is_compiled(target: Target, tmp_path: Path) -> None:
    """All is checked of one compilation, in an empty folder, so that nothing compiled before is taken for new."""
    variants = [some for some in variants_of(target.name, target.dtype) if matches(some.name, target.kernels)]
    found = compile_kernels(target.name, variants, tmp_path)
    assert found
    check_resources(target, found)
    if target.name.startswith("cuda") and target.dtype != "*fp32":
        check_instructions(target, found)
        if "add_splits" in found:
            check_products_of_all_tiles(target, found)
            check_splits(found)
            check_bias_and_residual(found)
            check_merged_segments(target, found)


def check_resources(target: Target, found: dict[str, Compiled]) -> None:
    assert [kernel.name for kernel in found.values() if kernel.shared > SHARED[target.name]] == []
    beyond = []
    for kernel in found.values():
        if matches(kernel.name, target.limited):
            limit = next(limit for limit in LIMITS[target.name] if fnmatch(kernel.name, limit.kernels))
            if kernel.registers > limit.registers or kernel.programs < limit.programs or kernel.spilled > limit.spilled:
                beyond.append((kernel.name, kernel.registers, kernel.programs, kernel.spilled, limit))
    assert beyond == []


def check_instructions(target: Target, found: dict[str, Compiled]) -> None:
    """Products use tensor cores and read ahead."""
    products = [kernel for name, kernel in found.items() if name.startswith(("linear", "expert", "attend"))]
    assert products
    for kernel in products:
        (instruction,) = kernel.instructions
        is_small = kernel.name.startswith("attend 5")  # tiles of 16 rows for heads of more than 256
        expected = "mma.sync" if is_small else INSTRUCTIONS.get(target.name, "mma.sync")
        assert instruction.startswith(expected), kernel.name
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


def check_products_of_all_tiles(target: Target, found: dict[str, Compiled]) -> None:
    """A row is added up in the same way whatever the number of rows and the alignment of pointers and strides."""
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


def check_splits(found: dict[str, Compiled]) -> None:
    """Splits are added in the same way in one kernel and in two."""
    whole = [kernel for name, kernel in found.items() if name.endswith("of 2 splits")]
    assert_same(whole, "out")
    (split,) = (kernel for name, kernel in found.items() if name.endswith(" split"))
    assert (split.instructions, split.nums_products) == (whole[0].instructions, whole[0].nums_products)
    (partial,) = arithmetic(split).stored("partial")
    (added,) = arithmetic(found["add_splits"]).stored("out")
    key, both = arithmetic(found["add_splits"]).replace(added, {load_key("partial"): partial}, arithmetic(split))
    assert [both.describe(key)] == lines(whole[0], "out")


def check_bias_and_residual(found: dict[str, Compiled]) -> None:
    """Both are added to the same sums."""
    (size,) = {name.removesuffix(" alone") for name in found if name.endswith(" alone")}
    alone = arithmetic(found[f"{size} alone"])
    (rounded,) = alone.stored("out")
    (sums,) = alone.expressions[rounded].operands
    for name in (size, f"{size} with bias"):
        assert sums in arithmetic(found[name]).expressions, name


def check_merged_segments(target: Target, found: dict[str, Compiled]) -> None:
    """Segments are merged in the same way in one kernel and in two."""
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


# No offset overflows 32 bits: with a KV cache of 192 GB, 256 rows of 256k logits, prompts of 64k rows.


KERNELS = {"linear", "add_splits", "attend", "reduce", "norm", "act_and_mul", "rope_and_store_kv"}
KERNELS |= {"advance", "convolve", "shrink", "expand", "top", "forbid", "add_biases", "penalise", "collect", "draw"}


@pytest.mark.long
def test_no_kernel_has_an_offset_that_overflows() -> None:
    """In a process of its own, in which kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.triton_offsets"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    assert {name for name, texts in found.items() if texts} == set(), found
    assert found.keys() >= KERNELS
