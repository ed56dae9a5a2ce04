"""Counter-based random numbers: hashes of a seed, a position in the output and, for Gumbel noise, a token id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch.transfer import to_device
from engine.scheduling.request import SamplingRow

COIN_DOMAIN = np.uint64(0x636F696E2D786374)  # makes coins independent of Gumbel noise


def noise_keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Hash each (seed, position) to two 32-bit keys [R, 2], with the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = seeds + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    keys: npt.NDArray[np.uint32] = x.view(np.uint32).reshape(-1, 2)
    return keys


def hash_token_ids(vocab_size: int, device: torch.device) -> Tensor:
    """Return int32 [V]: Knuth's multiplicative hash of each token id, which spreads neighbouring ids."""
    hashed = torch.arange(vocab_size) * 0x9E3779B1 & 0xFFFFFFFF
    return ((hashed ^ 0x80000000) - 0x80000000).to(torch.int32).to(device)


def gumbel_noise(hashed_ids: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return Gumbel noise, float32 [R, V]: -log(-log(u)), where the uniform u hashes seed, position and token id."""
    keys = noise_keys(*_seeds_and_positions(rows))
    first, second = to_device(keys.view(np.int32), np.int32, hashed_ids.device).unsqueeze(-1).unbind(dim=1)
    bits = _mix(_mix(hashed_ids ^ first) ^ second)
    # 31 bits: exponential noise close to 0 keeps its full precision, and large Gumbel noise decides the argmax.
    uniform = ((bits & 0x7FFFFFFF).to(torch.float32) + 0.5) * 2.0**-31
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def coins(rows: Sequence[SamplingRow]) -> list[float]:
    """Return a uniform number from [0, 1) for each row, a hash of seed and position in the output."""
    seeds, positions = _seeds_and_positions(rows)
    keys = noise_keys(seeds ^ COIN_DOMAIN, positions)
    uniform: list[float] = (keys[:, 0] * 2.0**-32).tolist()
    return uniform


def _seeds_and_positions(rows: Sequence[SamplingRow]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    seeds = np.array([row.seed for row in rows], dtype=np.uint64)
    return seeds, np.array([row.num_output_tokens for row in rows], dtype=np.uint64)


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of MurmurHash3 to int32, in place. Products wrap around, shifts are logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= -2048144789  # 0x85ebca6b
    x ^= (x >> 13) & 0x7FFFF
    x *= -1028477387  # 0xc2b2ae35
    x ^= (x >> 16) & 0xFFFF
    return x
