"""Random numbers that are hashes: of a seed, a position in the output, and a token id where each needs its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.transfer import to_device
from engine.scheduling.request import SampledRequest

COIN_DOMAIN = np.uint64(0x636F696E2D786374)  # so that coins tell nothing about the noise of tokens


def noise_keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Two 32-bit keys [R, 2] for each (seed, position), by the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = seeds + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    keys: npt.NDArray[np.uint32] = x.view(np.uint32).reshape(-1, 2)
    return keys


def hash_token_ids(vocab_size: int, device: torch.device) -> Tensor:
    """int32 [V]: Knuth's multiplicative hash spreads neighbouring ids before they are mixed with a key."""
    hashed = torch.arange(vocab_size) * 0x9E3779B1 & 0xFFFFFFFF
    return ((hashed ^ 0x80000000) - 0x80000000).to(torch.int32).to(device)


def gumbel_noise(hashed_ids: Tensor, requests: Sequence[SampledRequest]) -> Tensor:
    """float32 [R, V]: -log(-log(u)) of a uniform u that is a hash of seed, position in the output, and token id."""
    keys = noise_keys(*_seeds_and_positions(requests))
    first, second = to_device(keys.view(np.int32), np.int32, hashed_ids.device).unsqueeze(-1).unbind(dim=1)
    bits = _mix(_mix(hashed_ids ^ first) ^ second)
    # 31 bits; exponential noise close to 0, which decides, keeps its full precision.
    uniform = ((bits & 0x7FFFFFFF).to(torch.float32) + 0.5) * 2.0**-31
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def coins(requests: Sequence[SampledRequest]) -> list[float]:
    """One uniform number from [0, 1) for each request, of its seed and its position in the output."""
    seeds, positions = _seeds_and_positions(requests)
    keys = noise_keys(seeds ^ COIN_DOMAIN, positions)
    uniform: list[float] = (keys[:, 0] * 2.0**-32).tolist()
    return uniform


def _seeds_and_positions(requests: Sequence[SampledRequest]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    seeds = np.array([request.seed for request in requests], dtype=np.uint64)
    return seeds, np.array([request.num_output_tokens for request in requests], dtype=np.uint64)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on int32, in place; products wrap, shifts are logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= -2048144789  # 0x85ebca6b
    x ^= (x >> 13) & 0x7FFFF
    x *= -1028477387  # 0xc2b2ae35
    x ^= (x >> 16) & 0xFFFF
    return x
