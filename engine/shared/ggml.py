"""The tensor types of GGML: how many weights a block holds, how many bytes it takes, and where its fields lie.

`ggml-common.h` of llama.cpp defines the blocks; `block_q4_0` there is "Q4_0" here, with the same fields in the same
order. Only the standard library, because the API process reads GGUF files too.
"""

from itertools import accumulate
from typing import NamedTuple


class GGMLType(NamedTuple):
    """How weights are packed: rows are cut into blocks of `block_size` weights, each of `type_size` bytes."""

    id: int  # number of the type in GGUF files
    name: str
    block_size: int  # weights
    type_size: int  # bytes
    fields: dict[str, slice]  # position of each field in a block, in bytes; empty for plain numbers and opaque blocks


def _block(type_id: int, name: str, block_size: int, **sizes: int) -> GGMLType:
    """Return a type whose blocks consist of these fields, with their `sizes` in bytes, one after the other.

    The fields are `d`, the float16 scale; `m`, the float16 minimum, or `dmin`, the float16 scale of the minima;
    `scales` (and minima) of groups within a block, or their low and high bits, `scales_l` and `scales_h`; `e`, a power
    of two as scale; `qs` or `ql`, the codes or their low bits; `qh` or `hmask`, their high bits.
    """
    ends = list(accumulate(sizes.values()))
    fields = {field: slice(end - size, end) for (field, size), end in zip(sizes.items(), ends, strict=True)}
    return GGMLType(type_id, name, block_size, ends[-1], fields)


def _opaque(type_id: int, name: str, block_size: int, type_size: int) -> GGMLType:
    """Return a type without fields: plain numbers, or blocks that only the `gguf` package unpacks."""
    return GGMLType(type_id, name, block_size, type_size, {})


_TYPES = (
    _opaque(0, "F32", 1, 4),
    _opaque(1, "F16", 1, 2),
    _block(2, "Q4_0", 32, d=2, qs=16),
    _block(3, "Q4_1", 32, d=2, m=2, qs=16),
    _block(6, "Q5_0", 32, d=2, qh=4, qs=16),
    _block(7, "Q5_1", 32, d=2, m=2, qh=4, qs=16),
    _block(8, "Q8_0", 32, d=2, qs=32),
    _opaque(9, "Q8_1", 32, 40),
    _block(10, "Q2_K", 256, scales=16, qs=64, d=2, dmin=2),
    _block(11, "Q3_K", 256, hmask=32, qs=64, scales=12, d=2),
    _block(12, "Q4_K", 256, d=2, dmin=2, scales=12, qs=128),
    _block(13, "Q5_K", 256, d=2, dmin=2, scales=12, qh=32, qs=128),
    _block(14, "Q6_K", 256, ql=128, qh=64, scales=16, d=2),
    _opaque(15, "Q8_K", 256, 292),
    _opaque(16, "IQ2_XXS", 256, 66),
    _opaque(17, "IQ2_XS", 256, 74),
    _opaque(18, "IQ3_XXS", 256, 98),
    _opaque(19, "IQ1_S", 256, 50),
    _block(20, "IQ4_NL", 32, d=2, qs=16),
    _opaque(21, "IQ3_S", 256, 110),
    _opaque(22, "IQ2_S", 256, 82),
    _block(23, "IQ4_XS", 256, d=2, scales_h=2, scales_l=4, qs=128),
    _opaque(24, "I8", 1, 1),
    _opaque(25, "I16", 1, 2),
    _opaque(26, "I32", 1, 4),
    _opaque(27, "I64", 1, 8),
    _opaque(28, "F64", 1, 8),
    _opaque(29, "IQ1_M", 256, 56),
    _opaque(30, "BF16", 1, 2),
    _opaque(34, "TQ1_0", 256, 54),
    _opaque(35, "TQ2_0", 256, 66),
    _block(39, "MXFP4", 32, e=1, qs=16),
    _opaque(40, "NVFP4", 64, 36),
    _opaque(41, "Q1_0", 128, 18),
)
GGML_TYPES = {ggml_type.id: ggml_type for ggml_type in _TYPES}
GGML_TYPES_BY_NAME = {ggml_type.name: ggml_type for ggml_type in _TYPES}
