"""Collect the stored tensors of quantised layers, and unpack the weights that no kernel takes as they are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from engine.config import QuantizationConfig
from engine.parts.quantized.formats import IGNORED_PARTS, read_layer, split_name
from engine.weights.packed import Quantized, Weight

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
