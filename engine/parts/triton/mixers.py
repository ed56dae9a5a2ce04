"""The mixers of `engine.parts.hybrid.mixers`, which describes them and their states.

A state is advanced row by row, in the order of positions, so its bits depend neither on the rows of a step nor on other
sequences. What a step does to states is read on the device (`StateMove`), so a CUDA graph can repeat it; a sequence
without rows leaves all states as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch.inputs import MAX_DRAFTED, StateMove
from engine.config import GatedDeltaNetSpec
from engine.parts.triton.rows import _bounded_exp
from engine.parts.triton.tiles import LAUNCH_OPTIONS

COLUMNS = tl.constexpr(256)  # of a program of the convolution,
MAX_PROGRAMS = 64  # of which so many share the rows of a sequence
STRIP = tl.constexpr(16)  # columns of a head's matrix that a program keeps in the registers of one warp
JOURNAL = tl.constexpr(MAX_DRAFTED)
FIELDS = tl.constexpr(len(StateMove._fields))
L2_EPS = tl.constexpr(1e-6)


@triton.jit
def _load_move(moves):
    """Return the `StateMove` of this program's sequence, which is the first number of the program."""
    moves += FIELDS * tl.program_id(0)
    first_row, num_rows, num_drafts = tl.load(moves), tl.load(moves + 1), tl.load(moves + 2)
    return first_row, num_rows, num_drafts, tl.load(moves + 3), tl.load(moves + 4), tl.load(moves + 5)


@triton.jit
def _place(i, first_row, num_replayed):
    """Return where the convolution of row i is: the rows that sequences replay come before those of the batch."""
    own = tl.num_programs(0) * JOURNAL + first_row + i - num_replayed
    return tl.where(i < num_replayed, tl.program_id(0) * JOURNAL + i, own)


@triton.jit
def _load_row(i, rows, x_stride, before, source, num_replayed, columns, CHANNELS: tl.constexpr, SIZE: tl.constexpr):
    """Return row i of a sequence: below 0 of the past, then of the journal, then of the batch.

    `rows` and `before` point to where row 0 would be in the batch and is in the state.
    """
    width = tl.where(i < 0, CHANNELS, SIZE)
    is_own = i >= num_replayed
    is_stored = columns < tl.where(is_own | (source < 0), 0, width)
    stored = tl.load(before + i * width + columns, mask=is_stored, other=0.0)
    own = tl.load(rows + i * x_stride + columns, mask=columns < tl.where(is_own, width, 0), other=0.0)
    return tl.where(is_own, own.to(tl.float32), stored)


@triton.jit
def _convolve(
    rows,
    weights,
    bias,
    states,
    moves,
    out,
    x_stride,
    block_stride,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    CONV: tl.constexpr,
    HAS_SILU: tl.constexpr,
):
    """Convolve some columns of a sequence's rows, and store what later steps need of them.

    Grid (sequences, pieces of the columns, programs that share the rows).
    """
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_channel = columns < CHANNELS
    first_row, num_rows, num_drafts, num_replayed, source, target = _load_move(moves)
    end = num_replayed + num_rows
    states += (CONV - 1) * CHANNELS
    rows, before = rows + (first_row - num_replayed) * x_stride, states + source * block_stride
    for i in range(tl.program_id(2), end, tl.num_programs(2)):
        sums = tl.zeros((COLUMNS,), dtype=tl.float32)
        row = sums
        for j in tl.static_range(CONV):
            at = i - (CONV - 1) + j
            row = _load_row(at, rows, x_stride, before, source, num_replayed, columns, CHANNELS, SIZE)
            sums += row * tl.load(weights + j * CHANNELS + columns, mask=is_channel, other=0.0)
        if bias is not None:
            sums += tl.load(bias + columns, mask=is_channel, other=0.0)
        if HAS_SILU:
            sums = sums / (1.0 + _bounded_exp(-sums))
        pointers = out + _place(i, first_row, num_replayed) * SIZE + columns
        tl.store(pointers, tl.where(is_channel, sums, row), mask=columns < SIZE)
    if (num_rows > 0) & (tl.program_id(2) == 0):
        num_kept = end - num_drafts
        for at in range(num_kept - (CONV - 1), end):  # relative to `num_kept`, as later steps read them
            row = _load_row(at, rows, x_stride, before, source, num_replayed, columns, CHANNELS, SIZE)
            width = tl.where(at < num_kept, CHANNELS, SIZE)
            pointers = states + target * block_stride + (at - num_kept) * width + columns
            tl.store(pointers, row, mask=columns < width)


def convolve(
    rows: Tensor, row_size: int, weights: Tensor, bias: Tensor | None, states: Tensor, moves: Tensor, *, has_silu: bool
) -> Tensor:
    """Return the convolution of rows [T, row_size or more] in float32, and store the past and the journal of states.

    The result is [MAX_DRAFTED * S + T, row_size]: before the rows of the batch are those that each sequence replays.
    Its columns after those of `weights` [conv_size, C] are as in `rows`. `bias` is [C].
    """
    num_rows, num_seqs, (conv_size, num_channels) = len(rows), len(moves), weights.shape
    assert rows.stride(1) == states.stride(1) == 1
    assert rows.shape[1] >= row_size >= num_channels
    out = torch.empty((MAX_DRAFTED * num_seqs + num_rows, row_size), dtype=torch.float32, device=rows.device)
    grid = (num_seqs, triton.cdiv(row_size, COLUMNS.value), min(MAX_PROGRAMS, triton.cdiv(num_rows, num_seqs)))
    constants = {"CHANNELS": num_channels, "SIZE": row_size, "CONV": conv_size, "HAS_SILU": has_silu}
    tensors = (rows, weights, bias, states, moves, out)
    _convolve[grid](*tensors, rows.stride(0), states.stride(0), **constants, **LAUNCH_OPTIONS)
    return out


@triton.jit
def _load_unit(row, keys, KEY_SIZE: tl.constexpr):
    x = tl.load(row + keys, mask=keys < KEY_SIZE, other=0.0)
    return x / tl.sqrt(tl.sum(x * x) + L2_EPS)


@triton.jit
def _advance(
    rows,
    key_heads,
    decays,
    step_bias,
    states,
    moves,
    out,
    block_stride,
    HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Advance a strip of the matrix of a value head by a sequence's rows. Grid (sequences, value heads, strips)."""
    head, first_value = tl.program_id(1), CHANNELS - HEADS * VALUE_SIZE
    keys, columns = tl.arange(0, KEYS), tl.program_id(2) * STRIP + tl.arange(0, STRIP)
    has_key, has_column = (keys < KEY_SIZE)[:, None], columns < VALUE_SIZE
    key_head, decay, bias = tl.load(key_heads + head), tl.load(decays + head), tl.load(step_bias + head)
    first_row, num_rows, num_drafts, num_replayed, source, target = _load_move(moves)
    states += (head * KEY_SIZE + keys)[:, None] * VALUE_SIZE + columns[None, :]
    is_stored = columns < tl.where(source < 0, 0, VALUE_SIZE)
    state = tl.load(states + source * block_stride, mask=has_key & is_stored[None, :], other=0.0)
    for i in range(num_replayed + num_rows):
        row = rows + _place(i, first_row, num_replayed) * (CHANNELS + 2 * HEADS)
        query = _load_unit(row + key_head * KEY_SIZE, keys, KEY_SIZE) * (KEY_SIZE**-0.5)
        key = _load_unit(row + first_value // 2 + key_head * KEY_SIZE, keys, KEY_SIZE)
        value = tl.load(row + first_value + head * VALUE_SIZE + columns, mask=has_column, other=0.0)
        strength = 1.0 / (1.0 + _bounded_exp(-tl.load(row + CHANNELS + head)))
        step = tl.load(row + CHANNELS + HEADS + head) + bias
        state *= tl.exp(-decay * (tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))))
        delta = (value - tl.sum(state * key[:, None], axis=0)) * strength
        state += key[:, None] * delta[None, :]
        if i >= num_replayed:
            pointers = out + ((first_row + i - num_replayed) * HEADS + head) * VALUE_SIZE + columns
            tl.store(pointers, tl.sum(state * query[:, None], axis=0), mask=has_column)
        if i == num_replayed + num_rows - num_drafts - 1:
            tl.store(states + target * block_stride, state, mask=has_key & has_column[None, :])


def advance(rows: Tensor, spec: GatedDeltaNetSpec, states: Tensor, moves: Tensor, *heads: Tensor) -> Tensor:
    """Advance the matrices of states by rows that `convolve` returned; return S^T q of the batch's rows, [T, V * D_v].

    `heads`: the key heads, decays and biases of time steps of the value heads, [V] each.
    """
    num_heads, key_size, value_size = spec.num_value_heads, spec.key_head_dim, spec.value_head_dim
    shape = (len(rows) - MAX_DRAFTED * len(moves), num_heads * value_size)
    out, matrices = rows.new_empty(shape), states[:, states.shape[1] - spec.matrix_size :]
    grid = (len(moves), num_heads, triton.cdiv(value_size, STRIP.value))
    constants = {"HEADS": num_heads, "KEY_SIZE": key_size, "KEYS": triton.next_power_of_2(key_size)}
    constants |= {"VALUE_SIZE": value_size, "CHANNELS": spec.num_channels, "num_warps": 1}
    _advance[grid](rows, *heads, matrices, moves, out, states.stride(0), **constants, **LAUNCH_OPTIONS)
    return out
