"""The formats of quantised safetensors checkpoints: the stored tensors of one layer to its weight.

GPTQ as AutoGPTQ and GPTQModel write it, AWQ as AutoAWQ does (`gemm`), FP8 as published by DeepSeek, Qwen, Mistral and
Meta, compressed-tensors as llm-compressor writes it, and MXFP4 (OCP Microscaling 1.0) as in gpt-oss.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from engine.config import QuantizationConfig
from engine.parts.quantized.weights import Float8Tensor, GroupQuantized, halved_nibbles, passes, unpacked_nibbles
from engine.weights.packed import PackedTensor, Quantized, Weight, paired_nibbles

Parts: TypeAlias = Mapping[str, Tensor]  # the stored tensors of a layer, by the last part of their names

PLAIN = (torch.float32, torch.float16, torch.bfloat16)
WORD_BITS = 32
# The outputs that the codes of a word stand for, from the lowest bits.
AWQ_ORDERS = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
MXFP4_BYTES = 16  # of the codes that share a scale
# Scales of activations and of the KV cache.
IGNORED_PARTS = re.compile(r"((input|activation|output|kv?|q|v|prob)_(scale|zero_point)|input_scale_ub)")


def split_name(name: str, quantization: QuantizationConfig) -> tuple[str, str] | None:
    """Split the name of a layer's tensor into layer and part; None if it is stored as in a plain checkpoint."""
    match = re.fullmatch(_LAYOUTS[quantization.method][0], name)
    return (match[1], match[2]) if match else None


def read_layer(layer: str, parts: Parts, quantization: QuantizationConfig) -> Iterator[tuple[str, Weight]]:
    """Yield the weight of a layer under its plain name; of fused experts one for each.

    Raises ValueError if tensors are missing, have unexpected types, or their shapes do not fit together.
    """
    if parts.keys() == {"weight"} and parts["weight"].dtype in PLAIN:
        yield f"{layer}.weight", parts["weight"]  # one of the layers that were left out
        return
    weights = _LAYOUTS[quantization.method][1](parts, quantization)
    if not isinstance(weights, list):
        yield f"{layer}.weight", weights
        return
    experts, _, projection = layer.rpartition(".")
    for index, weight in enumerate(weights):
        yield f"{experts}.{index}.{projection}.weight", weight


def _tensor(parts: Parts, name: str, *dtypes: torch.dtype, num_dims: int | None = None) -> Tensor:
    """Return a stored tensor. Raises ValueError if it is missing or has another type or number of dimensions."""
    tensor = parts.get(name)
    if tensor is None:
        raise ValueError(f"{name} is missing")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: type {str(tensor.dtype).removeprefix('torch.')} is not supported")
    if num_dims is not None and tensor.ndim != num_dims:
        raise ValueError(f"{name}: shape {list(tensor.shape)} must have {num_dims} dimensions")
    return tensor


def _num_bits(num_words: int, num_codes: int) -> int:
    """Return the bits of a code, of which `num_codes` take `num_words` words. Raises ValueError unless 4 or 8."""
    for bits in AWQ_ORDERS:
        if num_words == -(-num_codes * bits // WORD_BITS):
            return bits
    raise ValueError(f"{num_codes} codes in {num_words} words of 32 bits: codes must have 4 or 8 bits")


def _codes(words: Tensor, bits: int) -> Tensor:
    """Unpack words, int32 [n, words], to codes, uint8 [n, codes], the lowest bits first."""
    data = words.contiguous().view(torch.uint8)
    return unpacked_nibbles(data) if bits == 4 else data


def _stored_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 [rows, columns], as `GroupQuantized` holds them."""
    return paired_nibbles(codes) if bits == 4 else codes.contiguous()


def _group_quantized(
    bits: int, codes: Tensor, scales: Tensor, zero_points: Tensor | None, g_idx: Tensor | None
) -> GroupQuantized:
    """Return a matrix with codes as `GroupQuantized` holds them. Raises ValueError if shapes do not fit together."""
    num_rows, num_columns = len(codes), codes.shape[1] * 8 // bits
    if scales.ndim != 2 or len(scales) != num_rows or not scales.numel():
        raise ValueError(f"scales {list(scales.shape)} do not fit weights [{num_rows}, {num_columns}]")
    if zero_points is not None and zero_points.shape != scales.shape:
        raise ValueError(f"zero points {list(zero_points.shape)} do not fit scales {list(scales.shape)}")
    if zero_points is not None and bool((zero_points == 1 << (bits - 1)).all()):
        zero_points = None
    groups = _column_groups(g_idx, num_columns, scales.shape[1])
    return GroupQuantized(bits, codes, scales.contiguous(), zero_points, groups)


def _column_groups(g_idx: Tensor | None, num_columns: int, num_groups: int) -> Tensor | None:
    """Return the group of each column; None if the groups are consecutive and of one size."""
    if g_idx is not None and g_idx.shape != (num_columns,):
        raise ValueError(f"g_idx: shape {list(g_idx.shape)} does not fit {num_columns} inputs")
    if num_columns % num_groups == 0:
        consecutive = torch.arange(num_columns) // (num_columns // num_groups)
        if g_idx is None or not g_idx.any() or torch.equal(g_idx.long(), consecutive):
            return None
    if g_idx is None:
        raise ValueError(f"{num_groups} groups do not divide {num_columns} inputs, and there is no g_idx")
    if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < num_groups:
        raise ValueError(f"g_idx: must be from 0 to {num_groups - 1}")
    return g_idx.long()


def _gptq(parts: Parts, quantization: QuantizationConfig) -> Weight:
    """Read qweight [inputs / codes, outputs], qzeros [groups, outputs / codes], scales [groups, outputs], g_idx."""
    words = _tensor(parts, "qweight", torch.int32, num_dims=2)
    zero_words = _tensor(parts, "qzeros", torch.int32, num_dims=2)
    scales = _tensor(parts, "scales", *PLAIN, num_dims=2)
    bits = _num_bits(zero_words.shape[1], scales.shape[1])
    codes = words.T.contiguous().view(torch.uint8)  # words begin with the lowest bits, as `GroupQuantized` does
    # Version 1 stores zero points less one, subtracted from whole words: with its carries, adding one undoes that.
    ones = (0x11111111 if bits == 4 else 0x01010101) * quantization.zero_point_offset
    zero_points = _codes(zero_words + ones, bits)[:, : scales.shape[1]].T.contiguous()
    g_idx = _tensor(parts, "g_idx", torch.int32, num_dims=1) if "g_idx" in parts else None
    return _group_quantized(bits, codes, scales.T, zero_points, g_idx)


def _awq(parts: Parts, _: QuantizationConfig) -> Weight:
    """Read qweight, int32 [inputs, outputs / codes], qzeros [groups, outputs / codes], scales [groups, outputs]."""
    words = _tensor(parts, "qweight", torch.int32, num_dims=2)
    zero_words = _tensor(parts, "qzeros", torch.int32, num_dims=2)
    scales = _tensor(parts, "scales", *PLAIN, num_dims=2)
    bits = _num_bits(words.shape[1], scales.shape[1])
    if scales.shape[1] % len(AWQ_ORDERS[bits]):
        raise ValueError(f"scales: {scales.shape[1]} outputs are not a multiple of {len(AWQ_ORDERS[bits])}")
    codes = _stored_codes(_awq_codes(words, bits), bits)
    return _group_quantized(bits, codes, scales.T, _awq_codes(zero_words, bits), None)


def _awq_codes(words: Tensor, bits: int) -> Tensor:
    """Unpack words, int32 [n, outputs / codes], to codes, uint8 [outputs, n]."""
    transposed = words.T.contiguous()
    order = AWQ_ORDERS[bits]
    codes = torch.empty((len(transposed), len(order), len(words)), dtype=torch.uint8)
    for rows in passes(*transposed.shape):
        for index, output in enumerate(order):
            codes[rows, output] = (transposed[rows] >> bits * index & (1 << bits) - 1).to(torch.uint8)
    return codes.flatten(0, 1)


def _float8(parts: Parts, _: QuantizationConfig) -> Weight:
    """Read weight, float8 e4m3 [outputs, inputs], and weight_scale_inv or weight_scale; both are factors."""
    codes = _tensor(parts, "weight", torch.float8_e4m3fn, num_dims=2)
    name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    return Float8Tensor.from_scales(codes, _tensor(parts, name, *PLAIN, torch.float8_e8m0fnu))


def _compressed_tensors(parts: Parts, quantization: QuantizationConfig) -> Weight:
    """Read weight_packed with weight_shape, or weight in int8 or float8; weight_scale, and any weight_zero_point."""
    if "weight_packed" in parts:
        return _pack_quantized(parts)
    codes = _tensor(parts, "weight", torch.int8, torch.float8_e4m3fn, num_dims=2)
    if codes.dtype == torch.float8_e4m3fn:
        return _float8(parts, quantization)
    scales = _scales_of_rows(parts, len(codes))
    zero_points = None
    if "weight_zero_point" in parts:
        stored = _tensor(parts, "weight_zero_point", torch.int8)
        stored = stored.reshape(1, 1).expand(scales.shape) if stored.numel() == 1 else stored
        zero_points = stored.contiguous().view(torch.uint8) ^ 128
    # Unsigned codes are 128 more than signed ones.
    return _group_quantized(8, codes.view(torch.uint8) ^ 128, scales, zero_points, None)


def _pack_quantized(parts: Parts) -> Weight:
    """Read codes in int32 [outputs, inputs / codes], and zero points [outputs / codes, groups]; both are unsigned."""
    words = _tensor(parts, "weight_packed", torch.int32, num_dims=2)
    shape = _tensor(parts, "weight_shape", torch.int64, torch.int32, num_dims=1).tolist()
    if len(shape) != 2:
        raise ValueError(f"weight_shape: must hold two numbers, not {shape}")
    num_rows, num_columns = shape
    bits = _num_bits(words.shape[1], num_columns)
    if len(words) != num_rows or num_columns % 2:
        raise ValueError(f"weight_packed: shape {list(words.shape)} does not fit [{num_rows}, {num_columns}]")
    codes = words.contiguous().view(torch.uint8)[:, : num_columns * bits // 8].contiguous()
    scales = _scales_of_rows(parts, num_rows)
    zero_points = None
    if "weight_zero_point" in parts:
        stored = _tensor(parts, "weight_zero_point", torch.int32, torch.int8, num_dims=2)
        if stored.dtype == torch.int8:  # older files do not pack them
            zero_points = (stored + (1 << (bits - 1))).view(torch.uint8)
        else:
            zero_points = _codes(stored.T, bits)[:, :num_rows].T.contiguous()
    g_idx = _tensor(parts, "weight_g_idx", torch.int32, num_dims=1) if "weight_g_idx" in parts else None
    return _group_quantized(bits, codes, scales, zero_points, g_idx)


def _scales_of_rows(parts: Parts, num_rows: int) -> Tensor:
    """Return weight_scale as [rows, groups]; a single one is repeated for each row."""
    scales = _tensor(parts, "weight_scale", *PLAIN)
    return scales.reshape(1, 1).expand(num_rows, 1) if scales.numel() == 1 else scales


def _mxfp4_experts(parts: Parts, _: QuantizationConfig) -> list[Weight]:
    """Read blocks, uint8 [experts, outputs, inputs / 32, 16], and scales, uint8 [experts, outputs, inputs / 32].

    They become MXFP4 of GGML, which has the scale first, then 16 low halves and 16 high halves of the codes' bytes.
    """
    blocks = _tensor(parts, "blocks", torch.uint8, num_dims=4)
    scales = _tensor(parts, "scales", torch.uint8, num_dims=3)
    if blocks.shape[:3] != scales.shape or blocks.shape[3] != MXFP4_BYTES:
        raise ValueError(f"blocks {list(blocks.shape)} do not fit scales {list(scales.shape)}")
    shape = (scales.shape[1], scales.shape[2] * 2 * MXFP4_BYTES)

    def expert(codes: Tensor, exponents: Tensor) -> Weight:
        data = torch.empty((*exponents.shape, 1 + MXFP4_BYTES), dtype=torch.uint8)
        data[:, :, 0] = exponents
        for rows in passes(*shape):
            data[rows, :, 1:] = halved_nibbles(codes[rows])
        return PackedTensor("MXFP4", shape, data.flatten().numpy())

    return [expert(*tensors) for tensors in zip(blocks, scales, strict=True)]


Reader: TypeAlias = Callable[[Parts, QuantizationConfig], Weight | list[Weight]]

_WORDS = r"(.+)\.(qweight|qzeros|scales|g_idx)"
_FLOAT8 = r"(.+)\.(weight|weight_scale|weight_scale_inv)"
_COMPRESSED = r"(.+)\.(weight|weight_packed|weight_scale|weight_zero_point|weight_shape|weight_g_idx)"
# Method -> names of the tensors of a layer, and what reads them.
_LAYOUTS: dict[str, tuple[str, Reader]] = {
    "awq": (_WORDS, _awq),
    "compressed-tensors": (_COMPRESSED, _compressed_tensors),
    "fbgemm_fp8": (_FLOAT8, _float8),
    "fp8": (_FLOAT8, _float8),
    "gptq": (_WORDS, _gptq),
    "mxfp4": (r"(.+)_(blocks|scales)", _mxfp4_experts),
}


MIB = 2**20

logger = logging.getLogger("lightwell.engine")


class QuantizedLayers:
    """The layers of a quantised checkpoint of which not all tensors have been read. They may lie in several files."""

    def __init__(
        self, names: Iterable[str], quantization: QuantizationConfig, dtype: torch.dtype, keep_packed: frozenset[str]
    ) -> None:
        self.quantization = quantization
        self.dtype = dtype
        self.keep_packed = keep_packed
        self._expected: dict[str, set[str]] = {}  # layer -> parts in the checkpoint
        for name in names:
            if split := split_name(name, quantization):
                self._expected.setdefault(split[0], set()).add(split[1])
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._num_ignored = 0
        self._num_kept = 0
        self._reasons: Counter[str] = Counter()  # of weights that were unpacked
        self._packed_bytes = self._unpacked_bytes = 0  # of these

    def add(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Weight]]:
        """Yield the weights that a stored tensor completes: itself, or that of a layer. Raises ValueError."""
        if IGNORED_PARTS.fullmatch(name.rpartition(".")[2]):
            self._num_ignored += 1
            return
        split = split_name(name, self.quantization)
        if split is None:
            yield name, tensor
            return
        layer, part = split
        parts = self._parts.setdefault(layer, {})
        parts[part] = tensor
        if parts.keys() == self._expected[layer]:
            del self._parts[layer]
            try:
                for weight_name, weight in read_layer(layer, parts, self.quantization):
                    yield weight_name, weight if isinstance(weight, Tensor) else self._packed_if_possible(weight)
            except ValueError as error:
                raise ValueError(f"{layer}: {error}") from error

    def _packed_if_possible(self, weight: Quantized) -> Weight:
        is_taken = weight.type_name in self.keep_packed
        if is_taken and weight.why_unpacked is None:
            self._num_kept += 1
            return weight
        reason = (weight.why_unpacked if is_taken else None) or f"{weight.type_name} is not kept packed"
        unpacked = weight.dequantize(self.dtype)
        self._reasons[reason] += 1
        self._packed_bytes += weight.nbytes
        self._unpacked_bytes += unpacked.nbytes
        return unpacked

    def log(self) -> None:
        """Log what is not as the checkpoint has it: weights that were unpacked, and scales that are not used."""
        if self._num_ignored or self.quantization.quantizes_activations:
            logger.info(
                "activations are not quantised, though the checkpoint was made for it; %d scales of activations and "
                "of the KV cache are not used",
                self._num_ignored,
            )
        if not self._reasons:
            return
        dtype = str(self.dtype).removeprefix("torch.")
        bits = self.dtype.itemsize * 8
        logger.warning(
            "%d of %d quantised matrices are unpacked to %s (%s): %.1f bits a weight in the files become %d in memory, "
            "%d MiB become %d MiB, unless --quantization int8 packs them to 8.5 bits",
            self._reasons.total(),
            self._reasons.total() + self._num_kept,
            dtype,
            ", ".join(self._reasons),
            self._packed_bytes * bits / self._unpacked_bytes,
            bits,
            self._packed_bytes // MIB,
            self._unpacked_bytes // MIB,
        )
