"""Matrices of weights in the layout of formats.h: panels of 32 outputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.cpu.library import Library, Team
from engine.kernels.cpu.program import Pack, Program
from engine.kernels.lazy_memory import Arena
from engine.weights import PackedTensor, Weight, concatenate

PANEL = 32  # outputs
FLOAT32, BFLOAT16, INT8_GROUPS = 0, 1, 2  # forms of a product's input, as in activations.h
ACTIVATION_GROUP = 32  # inputs that share a scale
ACTIVATION_GROUP_BYTES = 48
ROW_PADDING = 32  # numbers that rows of bfloat16 are filled up to


@dataclass(frozen=True)
class Format:
    """How weights are packed, and in which form their product reads its input."""

    name: str
    group: int  # inputs
    group_bytes: int  # of a panel
    form: int  # of rows of generated tokens
    prompt_form: int


_PLAIN = {"float32": (1, 128, FLOAT32), "bfloat16": (ROW_PADDING, PANEL * ROW_PADDING * 2, BFLOAT16)}
# A scale and perhaps a minimum for each output; half precision where the checkpoint has it so, else single.
_QUANTISED = {
    "int8": (32, PANEL * (32 + 2), INT8_GROUPS),
    "q4_0": (32, PANEL * (16 + 2), INT8_GROUPS),
    "q4_1": (32, PANEL * (16 + 4), INT8_GROUPS),
    "q5_0": (32, PANEL * (20 + 2), INT8_GROUPS),
    "q5_1": (32, PANEL * (20 + 4), INT8_GROUPS),
    "q8_0": (32, PANEL * (32 + 2), INT8_GROUPS),
    "q4_k": (32, PANEL * (16 + 8), INT8_GROUPS),
    "q5_k": (32, PANEL * (20 + 8), INT8_GROUPS),
    "q6_k": (16, PANEL * (12 + 4), INT8_GROUPS),
}
FORMATS = tuple(_PLAIN | _QUANTISED)
GGML_TYPES = frozenset(name.upper() for name in _QUANTISED if name != "int8")


def format_of(name: str, code_path: str) -> Format:
    """On tiles, prompts are multiplied with quantised weights as with bfloat16, for which tiles are made."""
    group, group_bytes, form = (_PLAIN | _QUANTISED)[name]
    prompt_form = BFLOAT16 if code_path == "amx" and form == INT8_GROUPS else form
    return Format(name, group, group_bytes, form, prompt_form)


def input_row_bytes(form: int, size: int) -> int:
    """Bytes of one row of `size` inputs."""
    if form == INT8_GROUPS:
        return -(-size // ACTIVATION_GROUP) * ACTIVATION_GROUP_BYTES
    return -(-size // ROW_PADDING) * ROW_PADDING * 2 if form == BFLOAT16 else size * 4


@dataclass(frozen=True)
class Panels:
    """Weights of one format."""

    format: Format
    data: Tensor  # uint8
    num_inputs: int
    num_outputs: int


@dataclass(frozen=True)
class Matrix:
    """Weights [outputs, inputs] of one product, in one format or several, one below the other."""

    parts: list[Panels]

    @property
    def num_inputs(self) -> int:
        return self.parts[0].num_inputs

    @property
    def num_outputs(self) -> int:
        return sum(part.num_outputs for part in self.parts)


class Packer:
    """Packs the weights of a model into one arena."""

    def __init__(self, library: Library, team: Team, dtype: torch.dtype, *, to_int8: bool) -> None:
        self.library = library
        self.team = team
        self.dtype = dtype
        self.to_int8 = to_int8
        self.arena = Arena()
        self.num_bytes = 0
        self.formats: list[Format] = []  # that were met, in order

    def pack(self, weights: Sequence[Weight]) -> Matrix:
        """Successive weights of one type become one part."""
        if any(isinstance(weight, Tensor) for weight in weights):  # one form of input for all
            weights = [w if isinstance(w, Tensor) else w.dequantize(self.dtype) for w in weights]
        groups = itertools.groupby(weights, key=lambda w: "" if isinstance(w, Tensor) else w.type_name)
        return Matrix([self._pack_part(list(group)) for _, group in groups])

    def _pack_part(self, weights: list[Weight]) -> Panels:
        packed = [weight for weight in weights if isinstance(weight, PackedTensor)]
        if packed:
            one = concatenate(packed)
            return self._run(one.type_name.lower(), one.data.ctypes.data, one.nbytes, one.shape)
        plain = (
            torch.cat([weight for weight in weights if isinstance(weight, Tensor)]) if len(weights) > 1 else weights[0]
        )
        assert isinstance(plain, Tensor)
        if self.to_int8:
            data = plain.to(torch.float32).contiguous()
            missing = -data.shape[1] % ACTIVATION_GROUP
            data = torch.nn.functional.pad(data, (0, missing)) if missing else data
            return self._run("int8", data.data_ptr(), data.nbytes, plain.shape)
        data = plain.to(self.dtype).contiguous()
        name = str(self.dtype).removeprefix("torch.")
        return self._run(name, data.data_ptr(), data.nbytes, plain.shape)

    def _run(self, name: str, address: int, num_bytes: int, shape: tuple[int, ...]) -> Panels:
        form = format_of(name, self.library.code_path)
        num_outputs, num_inputs = shape
        num_groups = -(-num_inputs // form.group)
        panels = self.arena.take(-(-num_outputs // PANEL) * num_groups * form.group_bytes)
        self.num_bytes += panels.nbytes
        if form not in self.formats:
            self.formats.append(form)
        program = Program(self.library, self.team)
        row_bytes = num_bytes // num_outputs
        program.add(f"pack_{name}", Pack(address, row_bytes, num_inputs, num_outputs, panels.data_ptr()))
        program.run()
        return Panels(form, panels, num_inputs, num_outputs)
