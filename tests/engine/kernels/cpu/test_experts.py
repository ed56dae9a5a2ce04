"""Mixtures of experts in C++: against float64, and batch invariance of the whole and of its parts.

Every test runs on every code path that this processor has.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import RouterSpec
from engine.kernels.cpu.experts import CpuRouting
from engine.kernels.cpu.kernels import CpuKernels
from engine.weights import Weight
from tests.support.kernel_choice import code_paths
from tests.support.packed_weights import inputs_of, options_of, random_weight, rounded_input
from tests.support.recorded_kernels import MAX_ROWS, Rows, assert_close, assert_rows_are_independent, make_kernels
from tests.support.reference_experts import ROUTERS, Inputs, clear_rows, mixture, router_inputs, routing
from tests.support.tensors import random_tensor

pytestmark = pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")
each_code_path = pytest.mark.parametrize("code_path", code_paths())
each_number_of_threads = pytest.mark.parametrize("num_threads", [1, 2])
ROUNDING = 2e-6
SMALL = RouterSpec(num_experts=5, num_experts_per_tok=2)


class Router:
    """A recorded choice of experts, which can be read once it has run."""

    def __init__(self, kernels: CpuKernels, inputs: Inputs, router: RouterSpec) -> None:
        self.routing: Any = None

        def operation(rows: Tensor, logits: Tensor) -> Tensor:
            self.routing = kernels.route(logits, router, inputs.bias, inputs.expert_scales)
            return kernels.gather(inputs.logits, rows)

        self.rows = Rows(kernels, [inputs.logits], operation)

    def __call__(self, rows: list[int], num_prompt_rows: int = 0) -> tuple[Tensor, Tensor]:
        """Return the experts [T, k] and their weights of some rows."""
        self.rows(rows, num_prompt_rows)
        routing: CpuRouting = self.routing
        _, integers, weights = routing.keep
        num_pairs = len(rows) * routing.num_chosen
        return (
            integers[0, :num_pairs].view(-1, routing.num_chosen).clone(),
            weights[:num_pairs].view(-1, routing.num_chosen).clone(),
        )


@each_number_of_threads
@each_code_path
@pytest.mark.parametrize("name", ROUTERS)
def test_route(name: str, code_path: str, num_threads: int) -> None:
    """Ties go to the lowest expert. A bias counts for the choice, not for the weights."""
    router = ROUTERS[name]
    for has_bias, has_scales in ((False, False), (True, False), (False, True), (True, True)):
        inputs = router_inputs(router, MAX_ROWS, seed=len(name), has_bias=has_bias, has_scales=has_scales)
        route = Router(make_kernels(code_path, num_threads), inputs, router)
        found, weights = route(list(range(MAX_ROWS)), 50)
        experts, expected = routing(inputs, router)
        rows = clear_rows(inputs, router)
        assert len(rows) > MAX_ROWS // 2
        assert found[rows].tolist() == experts[rows].tolist()
        torch.testing.assert_close(weights[rows].double(), torch.from_numpy(expected[rows]), rtol=2e-6, atol=1e-9)
        for some in ([0], [MAX_ROWS - 1], list(range(40, 9, -1))):
            alone = route(some)
            assert torch.equal(alone[0], found[some])
            assert torch.equal(alone[1], weights[some])


class Weights:
    """Random matrices of experts in some formats, one for each part of a product, and their numbers."""

    def __init__(self, names: tuple[str, ...], num_experts: int, sizes: tuple[int, ...], num_inputs: int) -> None:
        self.names = names
        pairs = [
            [random_weight(name, size, num_inputs, seed=100 * expert + index) for index, (name, size) in parts]
            for expert, parts in ((expert, enumerate(zip(names, sizes, strict=True))) for expert in range(num_experts))
        ]
        self.weights: list[list[Weight]] = [[weight for weight, _ in parts] for parts in pairs]
        self.numbers = [torch.cat([numbers for _, numbers in parts]) for parts in pairs]


PARTS = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("q4_0", "q4_0"),
    ("q8_0", "q8_0"),
    ("q4_0", "q8_0"),
    ("q6_k", "q4_k"),
    ("mxfp4", "mxfp4"),
    ("uint4", "uint4"),
]


@each_number_of_threads
@each_code_path
@pytest.mark.parametrize("names", PARTS, ids=" ".join)
def test_products(names: tuple[str, str], code_path: str, num_threads: int) -> None:
    """The weighted sum of products with random matrices, with a bias, and added to a residual stream."""
    kernels = make_kernels(code_path, num_threads, options_of(names[0]))
    num_inputs = max(64, *map(inputs_of, names))
    weights = Weights(names, SMALL.num_experts, (33, 20), num_inputs)
    x = random_tensor(1, MAX_ROWS, num_inputs)
    inputs = router_inputs(SMALL, MAX_ROWS, seed=2, has_bias=False, has_scales=False)
    bias, residual = random_tensor(3, SMALL.num_experts, 53), random_tensor(4, MAX_ROWS, 53)
    matrices = kernels.pack_experts(weights.weights)
    assert [part.format.name for part in matrices[0].parts] == list(dict.fromkeys(names))

    def record(tables: list[Tensor], bias: Tensor | None) -> Rows:
        linear = kernels.expert_linear(matrices, bias)

        def operation(rows: Tensor, x: Tensor, logits: Tensor, residual: Tensor | None = None) -> Tensor:
            routing = kernels.route(logits, SMALL)
            return kernels.combine_experts(linear(x, routing), routing, residual)

        return Rows(kernels, tables, operation)

    plain = assert_rows_are_independent(record([x, inputs.logits], None))
    rounded = rounded_input(names[0], x)
    expected = mixture(rounded, inputs, SMALL, lambda expert, row: weights.numbers[expert] @ row)
    bound = mixture(rounded.abs(), inputs, SMALL, lambda expert, row: weights.numbers[expert].abs() @ row)
    assert_close(plain, expected, ROUNDING * bound + 1e-30)
    biased = record([x, inputs.logits], bias)(range(MAX_ROWS))
    with_bias = mixture(rounded, inputs, SMALL, lambda e, row: weights.numbers[e] @ row + bias[e].double())
    assert_close(biased, with_bias, ROUNDING * (bound + bias.abs().max()))
    added = record([x, inputs.logits, residual], None)(range(MAX_ROWS))
    assert torch.equal(added, residual + plain)


@each_number_of_threads
@each_code_path
@pytest.mark.parametrize("names", [("float32", "float32"), ("q4_0", "q8_0")], ids=" ".join)
def test_two_products(names: tuple[str, str], code_path: str, num_threads: int) -> None:
    """The second product reads the pairs that the first has written; a row's bits do not depend on the others."""
    kernels = make_kernels(code_path, num_threads, options_of(names[0]))
    router, size, num_inputs = ROUTERS["DeepSeek V3"], 32, 64
    up = Weights(names, router.num_experts, (size, size), num_inputs)
    down = Weights(names[:1], router.num_experts, (num_inputs,), size)
    x = random_tensor(1, MAX_ROWS, num_inputs)
    inputs = router_inputs(router, MAX_ROWS, seed=2, has_bias=True, has_scales=False)
    first, second = (kernels.expert_linear(kernels.pack_experts(some.weights)) for some in (up, down))

    def operation(rows: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        routing = kernels.route(logits, router, inputs.bias)
        gate, up = torch.split(first(x, routing), size, dim=1)
        return kernels.combine_experts(second(kernels.act_and_mul(gate, up, "silu"), routing), routing)

    found = assert_rows_are_independent(Rows(kernels, [x, inputs.logits], operation))

    def expected(expert: int, row: Tensor) -> Tensor:
        both = up.numbers[expert] @ row
        hidden = torch.nn.functional.silu(both[:size]) * both[size:]
        return down.numbers[expert] @ rounded_input(names[0], hidden.float()[None])[0]

    rows = clear_rows(inputs, router)
    reference = mixture(rounded_input(names[0], x), inputs, router, expected)
    # A hidden number that lies between two codes may be rounded to either.
    tolerance = {"float32": 1e-5, "q4_0": 2e-2}[names[0]]
    scale = reference.abs().amax(dim=1, keepdim=True)
    assert_close(found[rows] / scale[rows], reference[rows] / scale[rows], tolerance)


@each_code_path
def test_one_expert_gets_all_rows(code_path: str) -> None:
    """The weights of experts that no row chooses are not read: here, they are not even numbers."""
    kernels = make_kernels(code_path)
    router = RouterSpec(num_experts=4, num_experts_per_tok=1)
    matrices = [
        random_tensor(expert, 40, 64) if expert == 2 else torch.full((40, 64), torch.nan) for expert in range(4)
    ]
    x, logits = random_tensor(9, MAX_ROWS, 64), torch.tensor([0.0, 1.0, 3.0, 2.0]).repeat(MAX_ROWS, 1)
    linear = kernels.expert_linear(kernels.pack_experts([[matrix] for matrix in matrices]))

    def operation(rows: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        routing = kernels.route(logits, router)
        return kernels.combine_experts(linear(x, routing), routing)

    rows = Rows(kernels, [x, logits], operation)
    expected = x.double() @ matrices[2].double().T
    for num_rows, num_prompt_rows in ((MAX_ROWS, 0), (MAX_ROWS, 70), (1, 0), (1, 1)):
        assert_close(rows(range(num_rows), num_prompt_rows), expected[:num_rows], 1e-4)


@each_code_path
def test_experts_of_several_types(code_path: str) -> None:
    """One call multiplies with all experts, so experts of checkpoints that pack only some of them are unpacked."""
    kernels = make_kernels(code_path)
    router = RouterSpec(num_experts=2, num_experts_per_tok=2, normalize=False)
    (packed, numbers), (plain, plain_numbers) = random_weight("q4_0", 40, 64, 1), random_weight("float32", 40, 64, 2)
    matrices = kernels.pack_experts([[packed], [plain]])
    assert [part.format.name for matrix in matrices for part in matrix.parts] == ["float32", "float32"]
    x, logits = random_tensor(9, 8, 64), torch.zeros(8, 2)
    linear = kernels.expert_linear(matrices)

    def operation(rows: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        routing = kernels.route(logits, router)
        return kernels.combine_experts(linear(x, routing), routing)

    found = Rows(kernels, [x, logits], operation)(range(8))
    assert_close(found, x.double() @ (numbers + plain_numbers).T / 2, 1e-4)
