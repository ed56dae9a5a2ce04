"""Mixture of experts in Triton: against plain torch, and batch invariance."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import RouterSpec
from engine.kernels.interface import KernelOptions
from engine.kernels.torch.kernels import TorchKernels
from engine.kernels.triton.experts import TritonRouting
from engine.kernels.triton.kernels import TritonKernels
from engine.weights import PackedTensor
from tests.engine.kernels.triton.test_rows import TOLERANCES
from tests.support.kernel_device import ALSO_ON_A_GPU, DEVICE, PRODUCT_DTYPES, random_tensor
from tests.support.packed_weights import random_packed

pytestmark = ALSO_ON_A_GPU
SEED = 12

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "not normalised": {"normalize": False, "scale": 2.5},
    "sigmoid": {"scoring": "sigmoid"},
    "groups": {"num_groups": 4, "topk_group": 2},
    "groups by two": {"scoring": "sigmoid", "num_groups": 4, "topk_group": 2, "group_score": "top2"},
}


def router_of(name: str = "softmax", num_experts: int = 16, num_chosen: int = 4) -> RouterSpec:
    return RouterSpec(num_experts=num_experts, num_experts_per_tok=num_chosen, **ROUTERS[name])


def kernels_of(dtype: torch.dtype = torch.float32) -> tuple[TorchKernels, TritonKernels]:
    options = KernelOptions(dtype)
    return TorchKernels(options, DEVICE), TritonKernels(options, DEVICE)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_routes(name: str, has_bias: bool) -> None:
    """Rounded logits give ties, which go to the lowest expert."""
    reference, kernels = kernels_of()
    logits = (random_tensor(SEED, 20, 16) * 2).round()
    bias = random_tensor(SEED + 1, 16) * 0.1 if has_bias else None
    scales = random_tensor(SEED + 2, 16).abs() if has_bias else None
    expected = reference.route(logits, router_of(name), bias, scales)
    found = kernels.route(logits, router_of(name), bias, scales)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-5, atol=1e-7)
    chosen = expected.experts.flatten()
    assert found.pairs.pairs.tolist() == chosen.argsort(stable=True).tolist()
    assert found.pairs.ends.tolist() == torch.bincount(chosen, minlength=16).cumsum(0).tolist()
    for row in range(len(logits)):
        alone = kernels.route(logits[row : row + 1], router_of(name), bias, scales)
        assert torch.equal(alone.weights, found.weights[row : row + 1])
        assert alone.pairs.pairs.sort().values.tolist() == list(range(4))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of NumPy, in the interpreter
def test_a_row_of_nan_harms_no_other() -> None:
    _, kernels = kernels_of()
    logits = random_tensor(SEED, 3, 16)
    expected = kernels.route(logits, router_of())
    logits[1] = torch.nan
    found = kernels.route(logits, router_of())
    assert torch.equal(found.weights[[0, 2]], expected.weights[[0, 2]])
    assert found.weights[1].isnan().all()
    assert sorted(found.pairs.pairs.tolist()) == list(range(12))
    assert found.pairs.ends[-1] == 12


def test_more_pairs_than_are_sorted_at_a_time() -> None:
    reference, kernels = kernels_of()
    router = router_of(num_experts=4, num_chosen=3)
    logits = random_tensor(SEED, 1000, 4)
    chosen = reference.route(logits, router).experts.flatten()
    assert kernels.route(logits, router).pairs.pairs.tolist() == chosen.argsort(stable=True).tolist()


def mixed(
    kernels: Any, x: Tensor, logits: Tensor, weights: list[list[list[Any]]], biases: list[Tensor | None]
) -> Tensor:
    """Return a mixture of experts of two products, added to zeros."""
    routing = kernels.route(logits, router_of(num_experts=logits.shape[1], num_chosen=2))
    for some, bias in zip(weights, biases, strict=True):
        x = kernels.expert_linear(kernels.pack_experts(some), bias)(x, routing)
    residual = torch.zeros((len(logits), x.shape[1]), dtype=x.dtype, device=DEVICE)
    assert torch.equal(kernels.combine_experts(x, routing), kernels.combine_experts(x, routing, residual))
    return residual


NUM_EXPERTS = 5


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize("types", [(None, None), ("Q8_0", "Q8_0"), ("Q4_1", "Q8_0")], ids=str)
def test_products(types: tuple[str | None, str | None], dtype: torch.dtype) -> None:
    """Gate and up have one type, or two. Rows have the same bits alone; so few experts have many rows."""
    reference, kernels = kernels_of(dtype)

    def weight(seed: int, rows: int, type_name: str | None) -> Tensor | PackedTensor:
        if type_name is None:
            return random_tensor(seed, rows, 64, dtype=dtype)
        return random_packed(type_name, rows, 64, seed)

    weights = [
        [[weight(SEED + expert, 40, types[0]), weight(SEED - expert, 24, types[1])] for expert in range(NUM_EXPERTS)],
        [[weight(SEED + 20 + expert, 48, types[0])] for expert in range(NUM_EXPERTS)],
    ]
    biases: list[Tensor | None] = [random_tensor(SEED + 30, NUM_EXPERTS, num, dtype=dtype) for num in (64, 48)]
    x, logits = random_tensor(SEED, 90, 64, dtype=dtype) * 0.1, random_tensor(SEED + 40, 90, NUM_EXPERTS)
    logits[:, 3] = -100.0  # nobody's choice
    logits[:70, 1] += 3.0
    found = mixed(kernels, x, logits, weights, biases)
    expected = mixed(reference, x, logits, weights, biases)
    tolerance = TOLERANCES[dtype] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=tolerance)
    for rows in (slice(0, 0), slice(0, 1), slice(3, 9), slice(40, 90)):
        assert torch.equal(mixed(kernels, x[rows], logits[rows], weights, biases), found[rows])


def test_tiles_of_all_sizes_give_the_same_bits() -> None:
    _, kernels = kernels_of()
    routing = kernels.route(random_tensor(SEED, 70, NUM_EXPERTS), router_of(num_experts=NUM_EXPERTS, num_chosen=2))
    x = random_tensor(SEED, 70, 64)
    assert isinstance(routing, TritonRouting)
    weights = [[random_tensor(SEED + expert, 40, 64)] for expert in range(NUM_EXPERTS)]
    expected = kernels.expert_linear(kernels.pack_experts(weights))(x, routing)
    for pair in range(0, 140, 17):
        (expert,) = [e for e, end in enumerate(routing.pairs.ends) if pair in routing.pairs.pairs[:end]][:1]
        product = kernels.linear(kernels.pack(weights[expert]))(x[pair // 2 : pair // 2 + 1])
        torch.testing.assert_close(expected[pair : pair + 1], product, rtol=1e-5, atol=1e-5)


def test_no_rows() -> None:
    _, kernels = kernels_of()
    weights = [[[random_tensor(SEED, 8, 64)]] * NUM_EXPERTS]
    assert mixed(kernels, random_tensor(SEED, 0, 64), random_tensor(SEED, 0, NUM_EXPERTS), weights, [None]).shape == (
        0,
        8,
    )


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
def test_products_of_heads(dtype: torch.dtype) -> None:
    _, kernels = kernels_of(dtype)
    matrices, x = random_tensor(SEED, 3, 40, 24), random_tensor(SEED + 1, 9, 72, dtype=dtype)
    product = kernels.head_linear(matrices)
    expected = torch.einsum("thk,hmk->thm", x.view(9, 3, 24).double(), matrices.to(dtype).double()).flatten(1)
    found = product(x)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCES[dtype], atol=10 * TOLERANCES[dtype])
    assert torch.equal(torch.cat([product(row[None]) for row in x]), found)
    wide = torch.cat((x, x), dim=1)
    assert torch.equal(product(wide[:, 72:]), found)
