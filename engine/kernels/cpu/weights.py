"""Weight matrices in the layout of formats.h: panels of 32 outputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.cpu.c_structs import PackParameters
from engine.kernels.cpu.library import Library, Program, Team
from engine.kernels.lazy_memory import Arena
from engine.shared.ggml import GGML_TYPES_BY_NAME
from engine.weights import PackedTensor, Weight, concatenate, layout_of

PANEL = 32  # outputs
FLOAT32, BFLOAT16, INT8_GROUPS = 0, 1, 2  # forms of a product's input, as in activations.h
ACTIVATION_GROUP = 32  # inputs that share a scale
ACTIVATION_GROUP_BYTES = 48
ROW_PADDING = 32  # rows of bfloat16 are padded to a multiple of this number of inputs


@dataclass(frozen=True)
class Format:
    """How weights are packed, and in which form their product reads its input."""

    name: str
    block: int  # inputs
    block_bytes: int  # one block of all outputs of a panel
    form: int  # how a product reads generated tokens: FLOAT32, BFLOAT16 or INT8_GROUPS
    prompt_form: int  # how it reads prompt tokens


# Format -> inputs in a block, bytes of a panel's block, input form.
_PLAIN = {"float32": (1, 128, FLOAT32), "bfloat16": (ROW_PADDING, PANEL * ROW_PADDING * 2, BFLOAT16)}
# A panel's block holds the fields of 32 blocks of the file, one for each output. In some of them, numbers of a few bits
# become bytes: scales, minima, and the exponent of MXFP4, which becomes a bfloat16.
_BYTES_MORE = {"Q3_K": 4, "Q4_K": 4, "Q5_K": 4, "IQ4_XS": 2, "MXFP4": 1}
_PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")
_GGML = {
    name.lower(): (
        GGML_TYPES_BY_NAME[name].block_size,
        PANEL * (GGML_TYPES_BY_NAME[name].type_size + _BYTES_MORE.get(name, 0)),
        INT8_GROUPS,
    )
    for name in _PACKED
}
# Codes of 32 inputs, a scale in half precision and a zero point.
_ZERO_POINTS = {"uint4": (32, PANEL * 19, INT8_GROUPS), "uint8": (32, PANEL * 35, INT8_GROUPS)}
_LAYOUTS = _PLAIN | {"int8": _GGML["q8_0"]} | _GGML | _ZERO_POINTS
FORMATS = tuple(_LAYOUTS)
PACKED_TYPES = frozenset(_PACKED)  # GGML types that are packed as they are
GROUP_TYPES = frozenset({"int4", "int8"})  # codes with zero points that are


def format_of(name: str, code_path: str) -> Format:
    """Return the format called `name` (one of FORMATS) on a code path.

    AMX multiplies bfloat16 tiles: there, prompts are multiplied in bfloat16 even where the weights are quantised.
    """
    block, block_bytes, form = _LAYOUTS[name]
    prompt_form = BFLOAT16 if code_path == "amx" and form == INT8_GROUPS else form
    return Format(name, block, block_bytes, form, prompt_form)


def input_row_bytes(form: int, size: int) -> int:
    """Return the bytes that a row of `size` inputs takes in an input form."""
    if form == INT8_GROUPS:
        return -(-size // ACTIVATION_GROUP) * ACTIVATION_GROUP_BYTES
    return -(-size // ROW_PADDING) * ROW_PADDING * 2 if form == BFLOAT16 else size * 4


@dataclass(frozen=True)
class Panels:
    """Weights in one format, as panels of 32 outputs."""

    format: Format
    data: Tensor  # uint8
    num_inputs: int
    num_outputs: int


@dataclass(frozen=True)
class Matrix:
    """Weights [outputs, inputs] of one product: parts stacked along the outputs, each in a format of its own."""

    parts: list[Panels]

    def __post_init__(self) -> None:
        assert len({part.num_inputs for part in self.parts}) == 1

    @property
    def shapes(self) -> list[tuple[Format, int, int]]:
        """The format, outputs and inputs of each part."""
        return [(part.format, part.num_outputs, part.num_inputs) for part in self.parts]

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
        self.formats: list[Format] = []  # all that occur, in the order of their first use

    def pack(self, weights: Sequence[Weight], dtype: torch.dtype | None = None) -> Matrix:
        """Pack the weights of one product, stacked along the outputs. Successive weights of a type become one part.

        `dtype`: unpack them to this type; None: as the options say.
        """
        if dtype is not None:
            plain = [w.to(dtype) if isinstance(w, Tensor) else w.dequantize(dtype) for w in weights]
            return Matrix([self._pack_plain(torch.cat(plain), dtype)])
        if any(isinstance(weight, Tensor) for weight in weights):  # all parts must read the same form of input
            weights = [w if isinstance(w, Tensor) else w.dequantize(self.dtype) for w in weights]
        weights = [w if isinstance(w, Tensor) else w.in_blocks() for w in weights]
        groups = itertools.groupby(weights, key=layout_of)
        return Matrix([self._pack_part(list(group)) for _, group in groups])

    def _pack_part(self, weights: list[Weight]) -> Panels:
        """Pack weights of one type."""
        packed = [weight for weight in weights if isinstance(weight, PackedTensor)]
        if packed:
            whole = concatenate(packed)
            return self._run(whole.type_name.lower(), whole.data.ctypes.data, whole.nbytes, whole.shape)
        tensors = [weight for weight in weights if isinstance(weight, Tensor)]
        plain = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.to_int8:
            data = plain.to(torch.float32).contiguous()
            padding = -data.shape[1] % ACTIVATION_GROUP
            data = torch.nn.functional.pad(data, (0, padding)) if padding else data
            return self._run("int8", data.data_ptr(), data.nbytes, plain.shape)
        return self._pack_plain(plain, self.dtype)

    def _pack_plain(self, weights: Tensor, dtype: torch.dtype) -> Panels:
        data = weights.to(dtype).contiguous()
        return self._run(str(dtype).removeprefix("torch."), data.data_ptr(), data.nbytes, weights.shape)

    def _run(self, name: str, address: int, num_bytes: int, shape: tuple[int, ...]) -> Panels:
        """Pack `num_bytes` of weights of this shape, which lie at `address`, into panels of the format `name`."""
        weight_format = format_of(name, self.library.code_path)
        num_outputs, num_inputs = shape
        num_blocks = -(-num_inputs // weight_format.block)
        panels = self.arena.take(-(-num_outputs // PANEL) * num_blocks * weight_format.block_bytes)
        self.num_bytes += panels.nbytes
        if weight_format not in self.formats:
            self.formats.append(weight_format)
        program = Program(self.library, self.team)
        row_bytes = num_bytes // num_outputs
        program.add(f"pack_{name}", PackParameters(address, row_bytes, num_inputs, num_outputs, panels.data_ptr()))
        program.run()
        return Panels(weight_format, panels, num_inputs, num_outputs)
