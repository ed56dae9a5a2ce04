"""Figures of graphics cards, from NVIDIA's data sheets and architecture whitepapers. Rates are without sparsity."""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Card:
    name: str
    compute_capability: tuple[int, int]
    num_multiprocessors: int
    memory_bytes: int
    bytes_per_second: float  # of memory
    bf16_per_second: float  # operations of the tensor cores; a multiply-add is two
    l2_bytes: int
    shared_bytes: int  # of a multiprocessor
    clock: float  # Hz, boost

    @property
    def target(self) -> int:
        """The compute capability as Triton's compiler takes it."""
        major, minor = self.compute_capability
        return 10 * major + minor


# H100: "H100 Tensor Core GPU" data sheet and "NVIDIA H100 Tensor Core GPU Architecture" (SXM5).
# A100: "A100 80GB" data sheet and "NVIDIA A100 Tensor Core GPU Architecture" (SXM4).
# L4: "L4 Tensor Core GPU" data sheet and "NVIDIA Ada GPU Architecture" (AD104).
CARDS = {
    "h100": Card("H100 SXM", (9, 0), 132, 80 * GB, 3.35e12, 989e12, 50 * 2**20, 228 * 1024, 1.83e9),
    "a100": Card("A100 80GB SXM", (8, 0), 108, 80 * GB, 2.039e12, 312e12, 40 * 2**20, 164 * 1024, 1.41e9),
    "l4": Card("L4", (8, 9), 58, 24 * GB, 300e9, 121e12, 48 * 2**20, 100 * 1024, 2.04e9),
}
