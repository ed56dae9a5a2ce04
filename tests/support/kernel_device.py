"""Where tests of Triton kernels run: on the CPU, in Triton's interpreter; with `pytest -m gpu` compiled, on a GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor
from triton import knobs

from engine.parts.triton.kernels import FLOAT8_CAPABILITY
from engine.parts.triton.tiles import SMALLEST, Tiles, compute_capability, tiles_for
from tests.support import tensors
from tests.support.tensors import CPU

IS_INTERPRETED = bool(knobs.runtime.interpret)
DEVICE = CPU if IS_INTERPRETED else torch.device("cuda", 0)

# Marks of a module whose tests need a GPU, and of one whose tests run on either.
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(IS_INTERPRETED, reason="Triton interprets its kernels, unless pytest has `-m gpu`"),
]
ALSO_ON_A_GPU = [] if IS_INTERPRETED else ON_A_GPU

CAPABILITY = compute_capability(DEVICE) if torch.cuda.is_available() else None
# The interpreter converts float8, and multiplies in bfloat16 wrongly.
HAS_FLOAT8 = IS_INTERPRETED or (CAPABILITY is not None and CAPABILITY >= FLOAT8_CAPABILITY)
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}  # a few roundings, of numbers near 1
PRODUCT_DTYPES = [torch.float32, torch.float16, *([] if IS_INTERPRETED else [torch.bfloat16])]


def random_tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers of `tests.support.tensors.random_tensor`, on the device."""
    return tensors.random_tensor(seed, *shape, dtype=dtype).to(DEVICE)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def tiles_and_dtypes(tables: Mapping[Any, Tiles], dtypes: Sequence[torch.dtype] = PRODUCT_DTYPES) -> list[ParameterSet]:
    """Return parameters (tiles, dtype): all pairs; on a GPU each dtype with its own tiles, and the smallest.

    Those of another card may take more shared memory than there is.
    """
    pairs: dict[tuple[Tiles, torch.dtype], Any] = {}
    for dtype in dtypes:
        own = {"smallest": SMALLEST, "own": tiles_for(CAPABILITY, dtype)}
        pairs |= {(tiles, dtype): name for name, tiles in (tables if IS_INTERPRETED else own).items()}
    return [pytest.param(*pair, id=f"{pair[1]}-{name}") for pair, name in pairs.items()]
