"""Record the calls of a program, and hand out the buffers that they read and write.

A tensor that an operation returns while a program is recorded stands for a buffer of the largest batch. How many of its
rows hold numbers is read at an address when the program runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from engine.kernels.cpu.c_structs import PreparedRows, PrepareParameters
from engine.kernels.cpu.library import Library, Program, Team
from engine.kernels.cpu.weights import FLOAT32, Format, input_row_bytes
from engine.kernels.lazy_memory import lazy_zeros


@dataclass
class Buffer:
    """A buffer that a call fills, and how other calls read it."""

    num_rows: int  # address of its RowCounts
    tensor: Tensor
    scope: int  # see ProgramRecorder.scope
    producer: ctypes.Structure | None = None  # parameters of the call that fills it, if that can also prepare its rows
    prepared: dict[PreparedKey, ctypes.Structure] = field(default_factory=dict)  # the same rows as input of products
    is_read: bool = False  # as float32


# Address and number of columns, form of generated tokens and of prompts, scope.
PreparedKey: TypeAlias = tuple[int, int, int, int, int]


class ProgramRecorder:
    """Owns the program that is being recorded and its buffers."""

    def __init__(self, library: Library, team: Team) -> None:
        self.library = library
        self.team = team
        self.program = Program(library, team)
        self.num_seqs = 0  # address of the number of sequences of a step
        self._buffers: dict[int, Buffer] = {}  # by the address of the storage, the newest of each
        self._prepared_only: list[Buffer] = []  # whose producer prepares the rows; not filled unless `is_read`
        self._shared: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._index_rows: Mapping[int, int] = {}  # address of an index tensor -> address of its RowCounts
        self._pool: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}  # temporaries, by order of creation
        self._num_temporaries: int | None = None
        self.scope = 0  # changes with each context of `temporaries`, in which other calls use the same memory

    @contextmanager
    def recording(self, program: Program, index_rows: Mapping[int, int], num_seqs: int = 0) -> Iterator[None]:
        """Return a context manager; operations inside it add their calls to `program`.

        `index_rows` maps the address of each index tensor to that of its RowCounts. `num_seqs` is the address of the
        number of sequences in a step, which attention and mixers read.
        """
        self.program, self.num_seqs, self._index_rows = program, num_seqs, index_rows
        self._pool, self._shared = {}, {}
        try:
            yield
            for buffer in self._prepared_only:
                if not buffer.is_read and buffer.producer is not None:
                    buffer.producer.output = None
        finally:
            program.keep += [self._pool, self._shared, self._buffers]
            self._buffers, self._prepared_only = {}, []
            self.program = Program(self.library, self.team)

    def call(self, name: str, parameters: ctypes.Structure, *keep: Any) -> None:
        """Add a call to the program, and keep what its parameters point to."""
        self.program.add(name, parameters)
        self.program.keep += keep

    def copy(self, num_rows: int, source: Tensor, target: Tensor) -> None:
        """Add a call that copies rows, as many as the RowCounts at `num_rows` say."""
        rows = PreparedRows(FLOAT32, FLOAT32, target.data_ptr(), 4 * target.stride(0))
        self.call("prepare", PrepareParameters(num_rows, self.read(source), source.stride(0), source.shape[1], rows))

    # Buffers.

    def new(self, num_rows: int, *shape: int) -> Buffer:
        """Return a new float32 buffer for the result of an operation."""
        tensor = self.temporary(torch.Size(shape), torch.float32)
        buffer = Buffer(num_rows, tensor, self.scope)
        self._buffers[tensor.untyped_storage().data_ptr()] = buffer
        return buffer

    def buffer(self, tensor: Tensor) -> Buffer:
        """Return the buffer that a tensor is a view of."""
        return self._buffers[tensor.untyped_storage().data_ptr()]

    def read(self, tensor: Tensor) -> int:
        """Return a tensor's address, and note that its buffer must hold float32."""
        if buffer := self._buffers.get(tensor.untyped_storage().data_ptr()):
            buffer.is_read = True
        return tensor.data_ptr()

    def change(self, tensor: Tensor) -> int:
        """Return a tensor's address, and note that a call changes its numbers: what was prepared before is old."""
        buffer = self._buffers[tensor.untyped_storage().data_ptr()]
        buffer.is_read, buffer.producer, buffer.prepared = True, None, {}
        return tensor.data_ptr()

    def index_rows(self, index: Tensor) -> int:
        """Return the address of the RowCounts of an index tensor."""
        return self._index_rows[index.data_ptr()]

    def shared(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the buffer of this name and shape, which is created at its first use in a recording."""
        if (name, shape) not in self._shared:
            self._shared[name, shape] = lazy_zeros(shape, dtype)
        return self._shared[name, shape]

    @contextmanager
    def temporaries(self) -> Iterator[None]:
        """Return a context manager; buffers made inside it are reused by the next one."""
        self._num_temporaries = 0
        self.scope += 1
        try:
            yield
        finally:
            self._num_temporaries = None
            self.scope += 1

    def temporary(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a zeroed buffer: a new one, or inside `temporaries` one that an earlier context used."""
        if self._num_temporaries is None:
            return lazy_zeros(tuple(shape), dtype)
        key = (self._num_temporaries, shape, dtype)
        self._num_temporaries += 1
        if key not in self._pool:
            self._pool[key] = lazy_zeros(tuple(shape), dtype)
        return self._pool[key]

    # Rows in the input form of a product.

    def prepared(self, x: Tensor, form: Format) -> tuple[int, int]:
        """Return address and bytes of the rows of x in the input forms of a weight format."""
        if form.form == FLOAT32:
            return self.read(x), 4 * x.stride(0)
        source = self.buffer(x)
        key = (x.data_ptr(), x.shape[1], form.form, form.prompt_form, self.scope)
        if key not in source.prepared:
            source.prepared[key] = self._prepare(x, source, form)
        return source.prepared[key].rows, source.prepared[key].stride

    def _prepare(self, x: Tensor, source: Buffer, form: Format) -> ctypes.Structure:
        """Convert the rows of x to a product's input form, in the call that fills x if it can, else in another call."""
        stride = max(input_row_bytes(some, x.shape[1]) for some in (form.form, form.prompt_form))
        rows = self.temporary(torch.Size((x.shape[0], stride)), torch.uint8)
        prepared = PreparedRows(form.form, form.prompt_form, rows.data_ptr(), stride)
        can_prepare = x.numel() == source.tensor.numel() and source.scope == self.scope
        if can_prepare and source.producer is not None and not source.prepared:
            source.producer.prepared = prepared
            self._prepared_only.append(source)
        else:
            self.call("prepare", PrepareParameters(source.num_rows, self.read(x), x.stride(0), x.shape[1], prepared))
        self.program.keep.append(rows)
        return prepared
