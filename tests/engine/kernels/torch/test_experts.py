"""Mixtures of experts in plain torch: against float64, and batch invariance."""

import pytest
import torch
from torch import Tensor

from engine.config import RouterSpec
from engine.kernels.torch.experts import TorchRouting
from engine.kernels.torch.kernels import TorchKernels
from tests.support.reference_experts import ROUTERS, Inputs, clear_rows, mixture, router_inputs, routing
from tests.support.tensors import assert_close, random_tensor

NUM_ROWS = 60
each_router = pytest.mark.parametrize("name", ROUTERS)


def route(kernels: TorchKernels, inputs: Inputs, router: RouterSpec, rows: slice = slice(None)) -> TorchRouting:
    found: TorchRouting = kernels.route(inputs.logits[rows].clone(), router, inputs.bias, inputs.expert_scales)
    return found


@each_router
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("has_scales", [False, True], ids=["no scales", "scales"])
def test_route(kernels: TorchKernels, name: str, has_bias: bool, has_scales: bool) -> None:
    """Ties go to the lowest expert. A bias counts for the choice, not for the weights."""
    router = ROUTERS[name]
    inputs = router_inputs(router, NUM_ROWS, seed=len(name), has_bias=has_bias, has_scales=has_scales)
    found, (experts, weights) = route(kernels, inputs, router), routing(inputs, router)
    rows = clear_rows(inputs, router)
    assert len(rows) > NUM_ROWS // 2
    assert found.experts[rows].tolist() == experts[rows].tolist()
    torch.testing.assert_close(found.weights[rows].double(), torch.from_numpy(weights[rows]), rtol=2e-6, atol=1e-9)


@each_router
def test_the_choice_does_not_depend_on_the_batch(kernels: TorchKernels, num_threads: int, name: str) -> None:
    router = ROUTERS[name]
    inputs = router_inputs(router, NUM_ROWS, seed=3, has_bias=False, has_scales=True)
    inputs = Inputs(random_tensor(3, *inputs.logits.shape), None, inputs.expert_scales)
    alone = [route(kernels, inputs, router, slice(row, row + 1)) for row in range(NUM_ROWS)]
    for first, last in ((0, NUM_ROWS), (1, 4), (7, 40), (30, 33)):
        found = route(kernels, inputs, router, slice(first, last))
        assert torch.equal(found.experts, torch.cat([one.experts for one in alone[first:last]]))
        assert torch.equal(found.weights, torch.cat([one.weights for one in alone[first:last]]))


def matrices_of(router: RouterSpec, size: int, num_inputs: int, dtype: torch.dtype) -> list[Tensor]:
    """Return gate and up, stacked, of each expert."""
    return [
        (random_tensor(expert, 2 * size, num_inputs) / num_inputs**0.5).to(dtype)
        for expert in range(router.num_experts)
    ]


@pytest.mark.parametrize("name", ["Mixtral", "sigmoid", "DeepSeek V2", "one"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_mixture(kernels: TorchKernels, name: str, has_bias: bool) -> None:
    """Two products, the second of pairs, and the sum of each row's experts; a row has the bits that it has alone."""
    router, dtype = ROUTERS[name], kernels.dtype
    size, num_inputs = 24, 40
    up = matrices_of(router, size, num_inputs, dtype)
    down = [(random_tensor(1000 + expert, num_inputs, size) / size**0.5).to(dtype) for expert in range(len(up))]
    up_bias = random_tensor(1, router.num_experts, 2 * size).to(dtype) if has_bias else None
    down_bias = random_tensor(2, router.num_experts, num_inputs).to(dtype) if has_bias else None
    products = [
        kernels.expert_linear(kernels.pack_experts([[matrix] for matrix in matrices]), bias)
        for matrices, bias in ((up, up_bias), (down, down_bias))
    ]
    x = random_tensor(5, 20, num_inputs).to(dtype)
    inputs = router_inputs(router, len(x), seed=4, has_bias=False, has_scales=False)

    def compute(rows: slice, residual: Tensor | None = None) -> Tensor:
        chosen = route(kernels, inputs, router, rows)
        gate, up = products[0](x[rows], chosen).chunk(2, dim=1)
        return kernels.combine_experts(products[1](kernels.act_and_mul(gate, up, "silu"), chosen), chosen, residual)

    def expected(expert: int, row: Tensor) -> Tensor:
        both = up[expert].double() @ row + (0.0 if up_bias is None else up_bias[expert].double())
        hidden = torch.nn.functional.silu(both[:size]) * both[size:]
        out: Tensor = down[expert].double() @ hidden + (0.0 if down_bias is None else down_bias[expert].double())
        return out

    whole = compute(slice(None))
    bound = router.scale if router.normalize else max(1.0, router.scale)
    assert_close(whole / bound, mixture(x, inputs, router, expected) / bound, dtype)
    for first, last in ((0, 0), (0, 1), (3, 4), (2, 13), (11, 20)):
        assert torch.equal(compute(slice(first, last)), whole[first:last]), (first, last)
    residual = random_tensor(6, 20, num_inputs).to(dtype)
    summed = residual + whole
    assert compute(slice(None), residual) is residual
    assert torch.equal(residual, summed)
