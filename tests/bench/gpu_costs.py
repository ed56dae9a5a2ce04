"""What each launch of a step moves and computes, from the shapes of its arguments, and how long that takes on a card.

A launch takes as long as the slowest of: its bytes from memory, its bytes through the L2 cache, its operations on the
tensor cores, its other operations, and the loads of its longest program. Memory is only as fast as the loads in flight
allow (Little's law), and programs run in waves of as many as fit. This is a model: of what it leaves out, clocks below
the boost clock, bank conflicts and the work of the compiler are the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from engine.parts.triton.linear import ROW_GROUP
from tests.support.gpu_cards import Card
from tests.support.gpu_trace import Launch, TensorSpec
from tests.support.meta_models import TracedStep

# Assumptions, which are on no data sheet.
COPY_SHARE = 0.92  # of the memory's rate that a large copy reaches
PRODUCT_SHARE = 0.75  # of the tensor cores' rate that a large product of a vendor's library reaches
L2_BYTES_PER_CYCLE = 32  # of a multiprocessor; microbenchmarks of A100 and H100 find 28 to 40
OPERATIONS_PER_CYCLE = 128  # of a multiprocessor, in float32
LATENCY = 0.7e-6  # seconds from a load to its data
START = 2.0e-6  # seconds that a launch in a graph takes before and after its programs run at full speed
EAGER_SECONDS = {True: 15e-6, False: 6e-6}  # of the host for a launch: of a Triton kernel, of an operation of torch
WGMMA_ROWS = 64  # fewer rows use instructions of older cards, at SMALL_PRODUCT_SHARE of the rate
SMALL_PRODUCT_SHARE = 0.6
MAX_WARPS = 32  # of a multiprocessor, whose registers hold no more of these kernels

# For a weight: unpack, convert, scale, add a minimum, round.
DEQUANTIZE_OPERATIONS = {"plain": 0, "int4": 6, "int8": 4, "float8": 4}
SOFTMAX_OPERATIONS = 18  # for a score: scale, mask, maximum, exp2 at a quarter of the rate, sum, round


@dataclass(frozen=True)
class Cost:
    """What a launch moves and computes in all, and what limits the number of its programs that run at a time."""

    memory: float = 0  # bytes from and to memory
    l2: float = 0  # bytes through the L2 cache, those from memory included
    tensor: float = 0  # operations of the tensor cores, padding included
    other: float = 0  # operations outside of them
    longest: float = 0  # bytes that one program loads, one step after the other
    programs: int = 0  # 0: enough
    in_flight: float = 16 * 1024  # bytes that a program loads ahead
    in_flight_l2: float = 0  # bytes that it loads ahead through L2; 0: the same
    shared: float = 0  # bytes of shared memory that a program takes
    num_warps: int = 4  # of a program
    uses_wgmma: bool = True


Formula: TypeAlias = Callable[[Launch, TracedStep, Card], Cost]


def once(launch: Launch, step: TracedStep, card: Card) -> Cost:
    """Return the cost of reading or writing each tensor once."""
    num_bytes = sum(tensor.nbytes for tensor in launch.tensors)
    return Cost(memory=num_bytes, l2=num_bytes, programs=math.prod(launch.grid) if launch.grid else 0)


def linear(launch: Launch, step: TracedStep, card: Card) -> Cost:
    """Return the cost of a product: tiles of x and of the weights come through L2, the weights once for ROW_GROUP."""
    arguments = launch.arguments
    x, codes = arguments["x"], arguments["weights"]
    rows, columns, inputs = (arguments[name] for name in ("ROWS", "COLUMNS", "INPUTS"))
    num_rows, num_inputs = x.shape
    row_tiles, column_tiles = -(-num_rows // rows), -(-codes.shape[0] // columns)
    weight_bytes = codes.nbytes
    if arguments["FORMAT"] != "plain":
        weight_bytes += arguments["scales"].nbytes
        weight_bytes += 0 if arguments["minima"] is None else arguments["minima"].nbytes
    fits_l2 = weight_bytes + x.nbytes < card.l2_bytes / 2
    num_reads = 1 if fits_l2 else -(-row_tiles // ROW_GROUP.value)
    out_bytes = (1 + arguments["ADDS"]) * arguments["out"].nbytes
    if arguments["IS_SPLIT"]:
        out_bytes = arguments["partial"].nbytes
    through_l2 = row_tiles * weight_bytes + column_tiles * x.nbytes + out_bytes
    stages = launch.options["num_stages"]
    tile_bytes = columns * inputs * weight_bytes / (codes.shape[0] * num_inputs)
    return Cost(
        memory=num_reads * weight_bytes + x.nbytes + out_bytes,
        l2=through_l2,
        tensor=2 * row_tiles * rows * column_tiles * columns * num_inputs,
        other=DEQUANTIZE_OPERATIONS[arguments["FORMAT"]] * row_tiles * codes.shape[0] * num_inputs,
        programs=math.prod(launch.grid),
        in_flight=(stages - 1) * tile_bytes,
        in_flight_l2=(stages - 1) * (tile_bytes + min(rows, num_rows) * inputs * x.dtype.itemsize),
        shared=stages * (tile_bytes + rows * inputs * x.dtype.itemsize),
        uses_wgmma=rows >= WGMMA_ROWS,
    )


def attend(launch: Launch, step: TracedStep, card: Card) -> Cost:
    """Return the cost of attention: each tile of packed rows reads the keys and values that it sees through L2."""
    arguments = launch.arguments
    q, keys = arguments["q"], arguments["keys"]
    num_rows, num_heads, size = q.shape
    num_kv_heads = keys.shape[2]
    packed, block, step_keys = (arguments[name] for name in ("PACKED", "BLOCK", "KEYS"))
    rows_of_tile = packed // (num_heads // num_kv_heads)
    only_last = num_rows != sum(sequence.num_rows for sequence in step.sequences)  # the last layer's hidden rows
    seen = unique = 0
    for sequence in step.sequences:
        rows = 1 if only_last else sequence.num_rows
        end = sequence.num_computed + sequence.num_rows
        tiles = -(-rows // rows_of_tile)
        unique += end
        seen += tiles * (end - (rows - 1) / 2)
    num_segments = math.ceil(seen / arguments["SEGMENT"])
    longest = -(-num_segments // launch.grid[0]) * arguments["SEGMENT"]  # programs have equal shares
    scale_bytes = 0 if arguments["key_scales"] is None else 4
    token_bytes = 2 * num_kv_heads * (size * keys.dtype.itemsize + scale_bytes)
    row_bytes = 2 * q.nbytes  # read and written
    partial_bytes = arguments["partial"].nbytes + arguments["states"].nbytes
    load_bytes = 2 * step_keys * size * keys.dtype.itemsize
    return Cost(
        memory=unique * token_bytes + row_bytes + partial_bytes,
        l2=seen * token_bytes + row_bytes + partial_bytes,
        tensor=4 * packed * block * seen * num_kv_heads,
        other=SOFTMAX_OPERATIONS * packed * seen * num_kv_heads,
        longest=longest * token_bytes / num_kv_heads,
        programs=min(launch.grid[0], num_segments) * num_kv_heads,
        in_flight=load_bytes,
        shared=2 * load_bytes + packed * block * q.dtype.itemsize,
        uses_wgmma=packed >= WGMMA_ROWS,
    )


def reduce(launch: Launch, step: TracedStep, card: Card) -> Cost:
    """Return the cost of merging the partial results that `attend` has written."""
    num_bytes = launch.arguments["partial"].nbytes + launch.arguments["states"].nbytes
    return Cost(memory=num_bytes, l2=num_bytes, programs=math.prod(launch.grid), in_flight=2048)


def rope_and_store_kv(launch: Launch, step: TracedStep, card: Card) -> Cost:
    """Return the cost of q, k and v, read and written. Of the cache, only the rows of the batch are written."""
    arguments = launch.arguments
    rows = sum(arguments[name].nbytes for name in ("q", "k", "v"))
    stored = 2 * arguments["k"].num_elements * arguments["keys"].dtype.itemsize
    num_bytes = rows + arguments["out"].nbytes + stored
    return Cost(memory=num_bytes, l2=num_bytes, programs=math.prod(launch.grid), in_flight=512)


def top(launch: Launch, step: TracedStep, card: Card) -> Cost:
    """Return the cost of greedy sampling, whose programs each read a row of logits."""
    logits = launch.arguments["logits"]
    (programs,) = launch.grid
    read, in_flight = programs * logits.shape[1], launch.arguments["PIECE"]
    size = logits.dtype.itemsize
    return Cost(memory=read * size, l2=read * size, programs=programs, in_flight=in_flight * size)


def gather(launch: Launch, step: TracedStep, card: Card) -> Cost:
    """Return the cost of rows that are read from one tensor and written to another."""
    specs = {name: value for name, value in launch.arguments.items() if isinstance(value, TensorSpec)}
    num_bytes = 2 * sum(tensor.nbytes for name, tensor in specs.items() if name.startswith("out"))
    return Cost(memory=num_bytes, l2=num_bytes)


# Of all other operations of torch: each tensor is read or written once.
FORMULAS: Mapping[str, Formula] = {
    "linear": linear,
    "add_splits": once,
    "attend": attend,
    "reduce": reduce,
    "norm": once,
    "act_and_mul": once,
    "rope_and_store_kv": rope_and_store_kv,
    "top": top,
    "torch index": gather,
    "torch embedding": gather,
    "torch index_put_": gather,
}


def cost_of(launch: Launch, step: TracedStep, card: Card) -> Cost:
    """Return the cost of a launch. Raises KeyError for a Triton kernel without a formula: steps sample greedily."""
    formula = FORMULAS[launch.name] if launch.kernel is not None else FORMULAS.get(launch.name, once)
    return replace(formula(launch, step, card), num_warps=launch.options.get("num_warps", 4))


@dataclass(frozen=True)
class Time:
    seconds: float  # in a graph
    bound: str  # what it waits for: memory, L2, tensor cores, arithmetic, the longest program, or the launch itself


def time_of(cost: Cost, card: Card) -> Time:
    """Return the time of a launch on a card, and its bound."""
    slots = card.num_multiprocessors * programs_of_multiprocessor(cost, card)
    programs = cost.programs or slots
    cycles = card.num_multiprocessors * card.clock
    share = 1.0 if cost.uses_wgmma or card.compute_capability < (9, 0) else SMALL_PRODUCT_SHARE
    waves = programs / card.num_multiprocessors  # programs of one multiprocessor share its rate
    whole_waves = math.ceil(waves) / waves
    times = {
        "memory": _loading(cost.memory, COPY_SHARE * card.bytes_per_second, programs, slots, cost.in_flight),
        "L2": _loading(cost.l2, L2_BYTES_PER_CYCLE * cycles, programs, slots, cost.in_flight_l2 or cost.in_flight),
        "tensor cores": whole_waves * cost.tensor / (share * PRODUCT_SHARE * card.bf16_per_second),
        "arithmetic": whole_waves * cost.other / (OPERATIONS_PER_CYCLE * cycles),
        "longest program": cost.longest / cost.in_flight * LATENCY,
        "launch": START,
    }
    bound = max(times, key=times.__getitem__)
    return Time(START + max(seconds for name, seconds in times.items() if name != "launch"), bound)


def programs_of_multiprocessor(cost: Cost, card: Card) -> int:
    most = MAX_WARPS // cost.num_warps
    return max(1, min(most, int(card.shared_bytes // cost.shared) if cost.shared else most))


def _loading(num_bytes: float, rate: float, programs: int, slots: int, in_flight: float) -> float:
    """Return the time of loads, wave by wave: a rate needs LATENCY * rate bytes in flight."""

    def seconds(some: int) -> float:
        return num_bytes * some / programs / (rate * min(1.0, some * in_flight / (LATENCY * rate)))

    full, rest = divmod(programs, slots)
    return full * seconds(slots) + (seconds(rest) if rest else 0.0)


def eager_seconds(launches: list[Launch]) -> float:
    """Return the time that the host needs to launch a step kernel by kernel."""
    return sum(EAGER_SECONDS[launch.kernel is not None] for launch in launches)
