"""Matrix products in plain torch: against float64, and how a form is found whose bits do not depend on other rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.interface import KernelOptions
from engine.kernels.torch import linear as linear_module
from engine.kernels.torch.kernels import TorchKernels
from engine.kernels.torch.linear import Product
from tests.support.tensors import CPU, assert_close, random_tensor


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def kernels(request: pytest.FixtureRequest) -> TorchKernels:
    return TorchKernels(KernelOptions(request.param, max_num_rows=512), CPU)


@pytest.mark.parametrize(
    ("outputs", "inputs", "with_bias"),
    [
        (576, 1536, False),
        (100, 64, True),
        *(
            pytest.param(*shape, with_bias, marks=pytest.mark.long)
            for shape in [(576, 576), (960, 576), (512, 4096), (33, 1000)]
            for with_bias in (False, True)
        ),
    ],
)
def test_linear(kernels: TorchKernels, outputs: int, inputs: int, with_bias: bool) -> None:
    weight = random_tensor(0, outputs, inputs, dtype=kernels.dtype) / inputs**0.5
    bias = random_tensor(1, outputs, dtype=kernels.dtype) if with_bias else None
    x = random_tensor(2, 512, inputs, dtype=kernels.dtype)
    linear = kernels.linear(weight, bias)
    assert kernels.deterministic
    out = linear(x[:192])
    assert out.dtype == kernels.dtype
    exact = x[:192].double() @ weight.double().T + (0.0 if bias is None else bias.double())
    assert_close(out, exact, kernels.dtype)
    for rows in (*range(1, 193), 256, 384, 512):
        assert torch.equal(linear(x[:rows])[:192], out[:rows]), f"{rows} rows"
    assert torch.equal(torch.cat([linear(row[None]) for row in x[:64]]), out[:64])


def exact_product(weight: Tensor) -> Product:
    """Return a product whose rows do not depend on the number of rows, because float64 is rounded to float32."""
    return lambda x: (x.double() @ weight.double().T).float()


@pytest.mark.parametrize(
    ("error", "constant"),
    [
        (lambda num, bias: 0.5 * (num % 4 > 0), 0.0),  # products are padded
        # A library may treat products of one shape with and without bias differently.
        (lambda num, bias: 0.5 * (num % 4 > 0) * (bias is not None), 0.0),
        (lambda num, bias: 1e-3 * num, 0.064),  # no padding helps, so they are taken in pieces
        (lambda num, bias: 1e-3 * torch.arange(num)[:, None], None),  # neither helps, and it says so
    ],
    ids=["padded", "with bias", "in pieces", "neither"],
)
def test_products_that_depend_on_the_number_of_rows(
    error: Callable[[int, Tensor | None], Any], constant: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain_product(weight: Tensor, bias: Tensor | None) -> Product:
        return lambda x: exact_product(weight)(x) + (0 if bias is None else bias) + error(len(x), bias)

    monkeypatch.setattr(linear_module, "_plain_product", plain_product)
    kernels = TorchKernels(KernelOptions(torch.float32, max_num_rows=300), CPU)
    weight, x = random_tensor(0, 8, 16), random_tensor(1, 300, 16)
    products = [kernels.linear(weight, bias) for bias in (None, torch.zeros(8))]
    assert kernels.deterministic == (constant is not None)
    for linear in products:
        for rows in (*range(1, 13), 63, 64, 65, 300):
            assert constant is None or torch.equal(linear(x[:rows]), linear(x)[:rows])
            expected = exact_product(weight)(x[:rows])
            expected += 1e-3 * torch.arange(rows)[:, None] if constant is None else constant
            assert_close(linear(x[:rows]), expected, torch.float32)


def test_another_order_of_additions_is_found_although_rounding_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below three rows, terms are added up from the last to the first: one of some 70,000 rounded results differs."""
    nums_of_rows: list[int] = []

    def plain_product(weight: Tensor, bias: Tensor | None) -> Product:
        def product(x: Tensor) -> Tensor:
            nums_of_rows.append(len(x))
            terms = (x.float()[:, None] * weight.float()).unbind(2)
            return sum(terms if len(x) >= 3 else terms[::-1], torch.zeros(len(x), len(weight))).to(x.dtype)

        return product

    monkeypatch.setattr("engine.kernels.torch.kernels.new_product", plain_product)
    kernels = TorchKernels(KernelOptions(torch.bfloat16, max_num_rows=64), CPU)
    linear = kernels.linear(random_tensor(0, 8, 24, dtype=torch.bfloat16))
    assert kernels.deterministic
    linear(random_tensor(1, 1, 24, dtype=torch.bfloat16))
    assert nums_of_rows[-1] >= 3
