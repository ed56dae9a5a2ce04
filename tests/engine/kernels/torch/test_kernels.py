"""The operations in plain torch that have no module of their own: against float64, and batch invariance."""

import pytest
import torch

from engine.kernels.torch.kernels import TorchKernels
from tests.support.tensors import assert_close, random_tensor, rms_norm


def test_rms_norm(kernels: TorchKernels) -> None:
    x = random_tensor(0, 50, 576, dtype=kernels.dtype) * torch.logspace(-3, 2, 50)[:, None].to(kernels.dtype)
    weight = random_tensor(1, 576, dtype=kernels.dtype)
    assert_close(kernels.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5), kernels.dtype)


@pytest.mark.parametrize("size", [24, 100, 576, 577, 4096])
def test_rms_norm_does_not_depend_on_the_batch(kernels: TorchKernels, num_threads: int, size: int) -> None:
    x, weight = random_tensor(size, 200, size, dtype=kernels.dtype), random_tensor(1, size, dtype=kernels.dtype)
    alone = torch.cat([kernels.rms_norm(row[None].clone(), weight, 1e-5) for row in x])
    for rows in (2, 3, 7, 33, 200):
        assert torch.equal(kernels.rms_norm(x[:rows], weight, 1e-5), alone[:rows]), f"{rows} rows"


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_linear(kernels: TorchKernels, with_bias: bool) -> None:
    weight = random_tensor(0, 100, 576, dtype=kernels.dtype) / 24
    bias = random_tensor(1, 100, dtype=kernels.dtype) if with_bias else None
    x = random_tensor(2, 13, 576, dtype=kernels.dtype)
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    out = kernels.linear(weight.clone(), bias)(x)
    assert out.dtype == kernels.dtype
    assert_close(out, expected, kernels.dtype)


def test_linear_adds_to_the_residual(kernels: TorchKernels) -> None:
    weight, bias = random_tensor(0, 100, 64, dtype=kernels.dtype) / 8, random_tensor(1, 100, dtype=kernels.dtype)
    x, residual = random_tensor(2, 9, 64, dtype=kernels.dtype), random_tensor(3, 9, 100, dtype=kernels.dtype)
    x_before, linear = x.clone(), kernels.linear(weight, bias)
    total = residual + linear(x)
    assert linear(x, residual) is residual
    assert torch.equal(residual, total)
    assert torch.equal(x, x_before)


def test_pack_and_embed(kernels: TorchKernels) -> None:
    """Weights are stacked vertically, and their rows are embeddings."""
    parts = [random_tensor(0, 5, 24, dtype=kernels.dtype), random_tensor(1, 7, 24, dtype=kernels.dtype)]
    token_ids = torch.tensor([11, 0, 5, 4, 4])
    assert torch.equal(kernels.embed(token_ids, kernels.pack(parts)), torch.cat(parts)[token_ids])
    assert torch.equal(kernels.gather(parts[1], token_ids[1:2]), parts[1][:1])
