"""The Triton kernels compile for real cards, without having one, and the machine code is as intended.

They fit into the shared memory of a program and into its registers, and memory is read ahead of what is computed.
"""

import json
import os
import subprocess
import sys

import pytest

from engine.kernels.triton.tiles import TABLE

MOST_SPILLED = 256  # bytes of a thread: attention spills once an item, outside its loops over keys
# Bytes of shared memory that one program may have: NVIDIA's tables of compute capabilities; AMD's CDNA 3 manual.
TARGETS = {
    "cuda 8.0": 163 * 1024,
    "cuda 8.6": 99 * 1024,
    "cuda 9.0": 227 * 1024,
    "cuda 10.0": 227 * 1024,
    "cuda 12.0": 99 * 1024,
    "hip gfx942": 64 * 1024,
}

# In a process of its own, because a kernel is compiled or interpreted for good when it is defined.
COMPILE = r"""
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from engine.kernels.triton import attention
from engine.kernels.triton import linear
from engine.kernels.triton import lora
from engine.kernels.triton import rows
from engine.kernels.triton import sampler
from engine.kernels.triton.tiles import LAUNCH_OPTIONS, SMALLEST, TABLE

kind, version = sys.argv[1].split()
is_cuda = kind == "cuda"
target = GPUTarget("cuda", int(version.replace(".", "")), 32) if is_cuda else GPUTarget("hip", version, 64)
tiles_of_card = TABLE[tuple(map(int, version.split(".")))] if is_cuda else SMALLEST
found = {}
STRIDES = ("x_stride", "weights_stride", "scales_stride", "out_stride", "q_stride", "row_stride", "stride")
ALIGNED = (*STRIDES, "num_inputs", "num_columns", "size")


def compile(fn, constants, num_warps, num_stages, **types):
    names = [parameter.name for parameter in fn.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": num_warps, "num_stages": num_stages, **LAUNCH_OPTIONS}
    # As at run time. Without it, loads are narrow, and nothing is prefetched to shared memory.
    aligned = [name for name, type in signature.items() if type.startswith("*") or name in ALIGNED]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(ASTSource(fn, signature, constexprs, attributes), target=target, options=options)
    assert compiled.asm["cubin" if is_cuda else "hsaco"]
    name = f"{len(found)} {fn.__name__} {dtype} {constants}"
    found[name] = {"shared": compiled.metadata.shared, "spilled": 0, "copies_under_way": 0}
    if is_cuda:
        found[name]["spilled"] = spilled_bytes(compiled.asm["cubin"])
        waits = re.findall(r"cp\.async\.wait_group\s+(\d+)", compiled.asm["ptx"])
        found[name]["copies_under_way"] = max(map(int, waits), default=0)


def spilled_bytes(cubin):
    # Bytes of each thread that are in memory because registers do not suffice.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    (stack,) = re.findall(r"STACK:(\d+)", done.stdout + done.stderr)
    return int(stack)


for dtype in sys.argv[2:]:
    tiles = SMALLEST if dtype == "*fp32" else tiles_of_card
    x = dict.fromkeys(("x", "weights", "bias", "out", "weight", "gate_up", "q", "k", "v", "keys", "values"), dtype)
    formats = {"plain": (dtype, 1, 1, False), "int4": ("*u8", 1, 128, True), "int8": ("*i8", 1, 16, True)}
    formats["float8"] = ("*u8", 128, 128, False)
    for format, (weights, group_outputs, group, has_minimum) in formats.items():
        table = tiles.linear if format == "plain" else tiles.packed_linear
        for tile in (table.tiles[0], table.tiles[-1]):
            constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "INPUTS": table.inputs, "GROUP": linear.ROW_GROUP}
            constants |= {"FORMAT": format, "SCALE_COLUMNS": group_outputs, "SCALE_INPUTS": group}
            constants |= {"HAS_MINIMUM": has_minimum, "HAS_BIAS": has_minimum, "ADDS": True}
            splits = 2 if format == "plain" and tile.sums_per_thread <= 64 else 1
            constants |= {"SPLITS": splits, "IS_SPLIT": splits == 2 and tile is table.tiles[0]}
            types = x | {"weights": weights, "scales": "*fp16", "minima": "*fp32", "partial": "*fp32"}
            compile(linear._linear, constants, tile.num_warps, tile.num_stages, **types)
    constants = {"HAS_BIAS": True, "ADDS": True, "SPLITS": 4, "COLUMNS": linear.SUM_COLUMNS}
    compile(linear._add_splits, constants, 4, 2, partial="*fp32", **x)
    compile(rows._rms_norm, {"BLOCK": 4096}, 4, 2, eps="fp32", **x)
    for activation in ("silu", "gelu", "gelu_pytorch_tanh"):
        compile(rows._act_and_mul, {"ACTIVATION": activation, "BLOCK": rows.ACT_COLUMNS}, 4, 2, **x)
    numbers = {"keys": "*i8", "values": "*i8", "key_scales": "*fp32", "value_scales": "*fp32"}
    has_float8 = is_cuda and target.arch >= 89
    float8 = numbers | dict.fromkeys(("keys", "values"), "*fp8e4nv" if has_float8 else "*u8")
    for scales in (None, numbers, float8):
        types = x | {"cos": "*fp32", "sin": "*fp32", "slot_mapping": "*i64"} | (scales or {})
        constants = {"BLOCK": 128, "TOKENS": 32, "HAS_SCALES": scales is not None}
        constants |= {} if scales else {"key_scales": None, "value_scales": None}
        compile(rows._rope_and_store_kv, constants, 4, 2, **types)
    types = x | {"ranks": "*i64", "lora_slots": "*i64", "tiles": "*i32", "inner": "*fp32", "a": dtype, "b": dtype}
    constants = {"ROWS": lora.ROWS, "RANKS": lora.RANKS}
    compile(lora._shrink, constants | {"INPUTS": lora.INPUTS, "SPLIT_INPUTS": lora.SPLIT_INPUTS}, 2, 4, **types)
    compile(lora._expand, constants | {"UNIT": 16, "COLUMNS": lora.COLUMNS}, 4, 2, **types)
    types = {"work": "*i64", "tables": "*i64", "scale": "fp32", "softcap": "fp32", "partial": "*fp32"}
    types |= {"states": "*fp32"} | x
    for size, block, has_window in ((64, 64, True), (80, 128, False), (128, 128, False), (256, 256, False)):
        sizes = tiles.attention_for(size)
        constants = {"PACKED": sizes.packed_rows, "SIZE": size, "BLOCK": block}
        compile(attention._reduce, constants | {"COLUMNS": 32}, sizes.num_warps, 2, **types)
        constants |= {"HAS_WINDOW": has_window, "SEGMENT": sizes.segment, "HAS_SOFTCAP": has_window}
        constants |= {"KEYS": sizes.keys, "TOKENS": 32, "HAS_SCALES": True}
        compile(attention._attend, constants, sizes.num_warps, sizes.num_stages, **types | numbers)
        if size == 128:
            compile(attention._attend, constants, sizes.num_warps, sizes.num_stages, **types | float8)
        constants |= {"HAS_SCALES": False, "key_scales": None, "value_scales": None}
        compile(attention._attend, constants, sizes.num_warps, sizes.num_stages, **types)
dtype = "*fp32"  # of logits
types = dict.fromkeys(("logits", "highest", "found", "states"), dtype) | {"token_ids": "*i64", "is_finite": "*u8"}
types |= dict.fromkeys(("changes", "lists", "draws", "nums_found"), "*i32") | {"masks": "*u8", "rows": "*i64"}
for kernel in (sampler._forbid, sampler._collect, sampler._draw):
    compile(kernel, {"PIECE": sampler.PIECE}, sampler.NUM_WARPS, 2, **types)
for kernel in (sampler._add_biases, sampler._penalise):
    compile(kernel, {"PIECE": sampler.ID_PIECE}, sampler.NUM_WARPS, 2, **types)
for is_changed in (False, True):
    compile(sampler._top, {"PIECE": sampler.PIECE, "IS_CHANGED": is_changed}, sampler.NUM_WARPS, 2, **types)
print(json.dumps(found))
"""


# Each compiles for half a minute, so most run in `make test-long`.
SOON = [("cuda 8.0", "*fp16"), ("cuda 9.0", "*bf16")]


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        pytest.param(target, dtype, marks=() if (target, dtype) in SOON else pytest.mark.long)
        for target in TARGETS
        for dtype in ("*fp16", "*bf16", "*fp32")
    ],
)
def test_kernels_compile(target: str, dtype: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, target, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 37
    too_large = {name: kernel for name, kernel in found.items() if kernel["shared"] > TARGETS[target]}
    assert not too_large
    if target.startswith("cuda"):
        usual = {name: kernel for name, kernel in found.items() if "*fp32" not in name}
        spilling = {name: kernel for name, kernel in usual.items() if kernel["spilled"] > MOST_SPILLED}
        assert not spilling
        reading = [name for name in usual if "_linear" in name or "_attend" in name]
        waiting = [name for name in reading if not found[name]["copies_under_way"]]
        assert not waiting
        assert len(reading) > 12 or dtype == "*fp32"


def test_segments_are_whole_steps() -> None:
    """Otherwise a step would cross the end of a segment, and count keys twice."""
    for tiles in TABLE.values():
        for sizes in (tiles.attention, tiles.attention_for(256)):
            assert sizes.segment % sizes.keys == 0
