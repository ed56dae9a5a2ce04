"""Fixtures of the tests of plain torch."""

from collections.abc import Iterator

import pytest
import torch

from engine.kernels.interface import KernelOptions
from engine.kernels.torch.kernels import TorchKernels
from tests.support.tensors import CPU


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def kernels(request: pytest.FixtureRequest) -> TorchKernels:
    return TorchKernels(KernelOptions(request.param, max_num_rows=512), CPU)


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Numbers of threads between which torch splits an operation; results must not depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
