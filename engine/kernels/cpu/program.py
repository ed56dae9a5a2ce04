"""A program: calls of the C++ functions, recorded once and run once a step.

The parameters of a call are one of the structures below, the same as in the C++ sources. They point into buffers that
live as long as the program; numbers that differ from step to step are read where they point to, above all how many rows
there are: `num_rows` points to two numbers, of all rows and of those of generated tokens, which come first.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any

from engine.kernels.cpu.library import Call, Library, Team


class PreparedRows(Structure):
    _fields_ = [
        ("form", c_int64),
        ("prompt_form", c_int64),
        ("rows", c_void_p),
        ("stride", c_int64),
    ]


class Prepare(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("input", c_void_p),
        ("row_stride", c_int64),
        ("size", c_int64),
        ("output", PreparedRows),
    ]


class Gather(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("row_index", c_void_p),
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("size", c_int64),
        ("output", c_void_p),
        ("output_stride", c_int64),
    ]


class RmsNorm(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("input", c_void_p),
        ("input_stride", c_int64),
        ("size", c_int64),
        ("weight", c_void_p),
        ("epsilon", c_double),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("prepared", PreparedRows),
    ]


class ActAndMul(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("gate_up", c_void_p),
        ("input_stride", c_int64),
        ("size", c_int64),
        ("activation", c_int64),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("prepared", PreparedRows),
    ]


class Pack(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("row_bytes", c_int64),
        ("num_inputs", c_int64),
        ("num_outputs", c_int64),
        ("output", c_void_p),
    ]


class Linear(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("input", c_void_p),
        ("input_stride", c_int64),
        ("weights", c_void_p),
        ("num_inputs", c_int64),
        ("num_outputs", c_int64),
        ("bias", c_void_p),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("accumulate", c_int64),
    ]


class AddLora(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("places", c_void_p),
        ("input", c_void_p),
        ("input_stride", c_int64),
        ("num_inputs", c_int64),
        ("a", c_void_p),
        ("a_stride", c_int64),
        ("b", c_void_p),
        ("b_stride", c_int64),
        ("ranks", c_void_p),
        ("part_ends", c_void_p),
        ("num_parts", c_int64),
        ("max_rank", c_int64),
        ("shrunk", c_void_p),
        ("output", c_void_p),
        ("output_stride", c_int64),
    ]


class Embed(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("token_ids", c_void_p),
        ("weights", c_void_p),
        ("size", c_int64),
        ("output", c_void_p),
        ("output_stride", c_int64),
    ]


class Cache(Structure):
    _fields_ = [
        ("type", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("block_size", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
    ]


class RopeAndStoreKV(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("slots", c_void_p),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("row_stride", c_int64),
        ("num_heads", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("cache", Cache),
    ]


class AttentionPlan(Structure):
    _fields_ = [
        ("num_items", c_int64),
        ("num_merges", c_int64),
        ("items", c_void_p),
        ("merges", c_void_p),
        ("max_partials", c_int64),
        ("partials", c_void_p),
        ("scratch", c_void_p),
        ("scratch_stride", c_int64),
    ]


class PlanAttention(Structure):
    _fields_ = [
        ("num_seqs", c_void_p),
        ("query_lens", c_void_p),
        ("seq_lens", c_void_p),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("plan", c_void_p),
    ]


class PagedAttention(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("num_heads", c_int64),
        ("scale", c_double),
        ("window", c_int64),
        ("softcap", c_double),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("plan", c_void_p),
        ("cache", Cache),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("prepared", PreparedRows),
    ]


class Program:
    """Calls in the order in which they run. `keep` is what they point to."""

    def __init__(self, library: Library, team: Team) -> None:
        self.library = library
        self.team = team
        self.names: list[str] = []
        self.parameters: list[Structure] = []
        self.keep: list[Any] = []
        self.durations: ctypes.Array[c_int64] | None = None
        self._calls: ctypes.Array[Call] | None = None

    def add(self, name: str, parameters: Structure) -> None:
        self.names.append(name)
        self.parameters.append(parameters)
        self._calls = None

    def without(self, prefix: str) -> Program:
        """The same on the same buffers, but for calls whose names begin so."""
        program = Program(self.library, self.team)
        for name, parameters in zip(self.names, self.parameters, strict=True):
            if not name.startswith(prefix):
                program.add(name, parameters)
        program.keep = self.keep
        return program

    def measure(self) -> None:
        """From now on, keep in `durations` how many nanoseconds each call has taken."""
        self.durations = (c_int64 * len(self.names))()

    def run(self) -> None:
        if self._calls is None:
            calls = [
                Call(self.library.function(name), ctypes.addressof(parameters))
                for name, parameters in zip(self.names, self.parameters, strict=True)
            ]
            self._calls = (Call * len(calls))(*calls)
        self.team.run(self._calls, self.durations)
