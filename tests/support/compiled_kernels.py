"""Compile Triton kernels for cards that are not here, and read what the compiler made of them.

A process in which kernels are interpreted cannot compile them, so a process of its own does:
`python -m tests.support.compiled_kernels TARGET` reads variants as JSON from its input and writes what it found.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.support.kernel_arithmetic import Arithmetic, KernelReader

# Integer arguments that are multiples of 16 for the usual models. Without it, loads are narrow, and nothing is
# prefetched to shared memory.
STRIDES = {"x_stride", "weights_stride", "scales_stride", "out_stride", "q_stride", "k_stride", "v_stride", "stride"}
STRIDES |= {"gate_stride", "up_stride", "bias_stride", "block_stride"}
ALIGNED = STRIDES | {"num_inputs", "num_columns", "size"}

REGISTERS = 64 * 1024  # of a multiprocessor
REGISTER_UNIT = 8  # a thread's registers are rounded up to it
RESERVED_SHARED = 1024  # bytes of shared memory that each program takes in addition


class Multiprocessor(msgspec.Struct, frozen=True):
    """Limits of a multiprocessor, from NVIDIA's table of compute capabilities."""

    shared: int  # bytes
    warps: int
    programs: int


MULTIPROCESSORS = {
    "8.0": Multiprocessor(164 * 1024, 64, 32),
    "8.6": Multiprocessor(100 * 1024, 48, 16),
    "8.9": Multiprocessor(100 * 1024, 48, 24),
    "9.0": Multiprocessor(228 * 1024, 64, 32),
    "10.0": Multiprocessor(228 * 1024, 64, 32),
    "12.0": Multiprocessor(100 * 1024, 48, 24),
}

# Instructions of tensor cores in PTX: family and what of their name determines the bits, and the first sum's register.
INSTRUCTIONS = {
    "wgmma": re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+(k\S+) \{\s*(%\w+)"),
    "mma.sync": re.compile(r"mma\.sync\.aligned\.(m\S+) \{\s*(%\w+)"),
    "tcgen05": re.compile(r"tcgen05\.mma\.cta_group::1\.(kind::\S+) (\[[^\]]+\])"),
}


class Variant(msgspec.Struct, frozen=True):
    """A kernel with the constants and types that it is compiled for."""

    name: str
    kernel: str  # module in engine.parts.triton and function
    constants: dict[str, Any]
    types: dict[str, str]  # of arguments that are not int32
    num_warps: int = 4
    num_stages: int = 2
    is_aligned: bool = True
    has_arithmetic: bool = False  # whether its arithmetic is read


class Compiled(msgspec.Struct, frozen=True):
    name: str
    shared: int  # bytes of shared memory of a program
    registers: int = 0  # of a thread
    spilled: int = 0  # bytes of a thread
    programs: int = 0  # that a multiprocessor holds
    instructions: list[str] = []  # of tensor cores, without their size in rows and columns
    nums_products: list[int] = []  # how many instructions add to one sum, one after the other; all different numbers
    num_copies_ahead: int = 0  # groups of asynchronous copies that may be under way during a step
    uses_fma: bool = False
    arithmetic: Arithmetic | None = None


def compile_kernels(target: str, variants: Sequence[Variant], folder: Path) -> dict[str, Compiled]:
    """Compile variants for a target ("cuda 9.0", "hip gfx942"). Returns them by name. `folder` must be empty."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_ALWAYS_COMPILE": "1"}
    command = [sys.executable, "-m", "tests.support.compiled_kernels", target]
    done = subprocess.run(
        command, env=environment, input=msgspec.json.encode(variants), capture_output=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    found = msgspec.json.decode(done.stdout, type=list[Compiled])
    return {compiled.name: compiled for compiled in found}


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile a variant in this process, in which kernels must not be interpreted."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from engine.parts.triton.tiles import LAUNCH_OPTIONS

    kind, version = target.split()
    gpu = GPUTarget("cuda", int(version.replace(".", "")), 32) if kind == "cuda" else GPUTarget("hip", version, 64)
    module, function = variant.kernel.split(".")
    kernel = getattr(importlib.import_module(f"engine.parts.triton.{module}"), function)
    names = [parameter.name for parameter in kernel.params]
    constants = {name: value for name, value in variant.constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else variant.types.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = [name for name, type in signature.items() if type.startswith("*") or name in ALIGNED]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if variant.is_aligned}
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **LAUNCH_OPTIONS}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=gpu, options=options)
    if kind != "cuda":
        assert compiled.asm["hsaco"]
        return Compiled(variant.name, compiled.metadata.shared)
    arithmetic = KernelReader(compiled.asm["ttgir"]).arithmetic() if variant.has_arithmetic else None
    return _read(variant, version, compiled.asm, compiled.metadata.shared, arithmetic)


def _read(variant: Variant, version: str, asm: Any, shared: int, arithmetic: Arithmetic | None) -> Compiled:
    registers, spilled = _resources(asm["cubin"])
    limits = MULTIPROCESSORS[version]
    registers_of_program = -(-registers // REGISTER_UNIT) * REGISTER_UNIT * 32 * variant.num_warps
    programs = min(
        REGISTERS // registers_of_program,
        limits.shared // (shared + RESERVED_SHARED),
        limits.warps // variant.num_warps,
        limits.programs,
    )
    found = {family: pattern.findall(asm["ptx"]) for family, pattern in INSTRUCTIONS.items()}
    nums = {number for matches in found.values() for number in Counter(sums for _, sums in matches).values()}
    waits = re.findall(r"cp\.async\.wait_group\s+(\d+)", asm["ptx"])
    return Compiled(
        variant.name,
        shared,
        registers,
        spilled,
        programs,
        sorted({f"{family} {kind}" for family, matches in found.items() for kind, _ in matches}),
        sorted(nums),
        max(map(int, waits), default=0),
        "fma.rn.f32" in asm["ptx"],
        arithmetic,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes of it that are in memory because registers do not suffice."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    return int(registers), int(stack)


if __name__ == "__main__":
    requested = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Variant])
    sys.stdout.buffer.write(msgspec.json.encode([compile_variant(variant, sys.argv[1]) for variant in requested]))
