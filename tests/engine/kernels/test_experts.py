"""Mixtures of experts in all kernels: against float64, and batch invariance of the whole and of its parts."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import RouterSpec
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.interface import ExpertLinearOp, Kernels
from engine.kernels.torch.experts import TorchRouting
from engine.weights import Weight
from tests.support.kernel_choice import code_paths
from tests.support.kernel_device import ALSO_ON_A_GPU, PRODUCT_DTYPES, TOLERANCES
from tests.support.kernel_kinds import KINDS, Direct, Kind, independent_rows, kind_of, record
from tests.support.packed_weights import inputs_of, options_of, random_weight, rounded_input
from tests.support.recorded_kernels import MAX_ROWS, Rows, assert_close, make_kernels
from tests.support.reference_experts import ROUTERS, Inputs, clear_rows, mixture, router_inputs, routing
from tests.support.tensors import random_tensor

CPP = 2e-6  # rounding, relative to the sum of the absolute values
SMALL = RouterSpec(num_experts=5, num_experts_per_tok=2)


class Router:
    """A choice of experts, which can be read once it has run."""

    def __init__(self, kind: Kind, inputs: Inputs, router: RouterSpec) -> None:
        self.router = router
        self.chosen: Any = None
        kernels = kind.new()
        tensors = [None if some is None else some.to(kind.device) for some in (inputs.bias, inputs.expert_scales)]

        def operation(rows: Tensor, logits: Tensor) -> Tensor:
            self.chosen = kernels.route(logits, router, *tensors)
            return kernels.gather(inputs.logits.to(kind.device), rows)

        self.rows = record(kernels, [inputs.logits.to(kind.device)], operation)

    def __call__(self, rows: list[int], num_prompt_rows: int = 0) -> tuple[Tensor, Tensor]:
        """Return the experts [T, k] and their weights of some rows."""
        self.rows(rows, num_prompt_rows)
        chosen, num_chosen = self.chosen, self.router.num_experts_per_tok
        num_pairs = len(rows) * num_chosen
        if isinstance(self.rows, Rows):
            _, experts, weights = chosen.keep
            return experts[0, :num_pairs].view(-1, num_chosen).clone(), weights[:num_pairs].view(-1, num_chosen).clone()
        if isinstance(chosen, TorchRouting):
            return chosen.experts, chosen.weights
        pairs, ends = chosen.pairs.pairs.cpu().long(), chosen.pairs.ends.cpu().tolist()
        experts = torch.full((num_pairs,), -1)
        for expert, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            experts[pairs[first:end]] = expert
        assert torch.equal(pairs, experts.argsort(stable=True))
        return experts.view(-1, num_chosen), chosen.weights.cpu()


def routes() -> list[Any]:
    """Return the kinds of kernels with the routers, most of which the interpreter runs in `make test-long`."""
    found = []
    for kind, name in itertools.product(KINDS, ROUTERS):
        some = kind_of(kind)
        marks = [*kind.marks, *([pytest.mark.long] if some.is_slow and name not in ("groups", "scaled") else [])]
        if some.dtype == (torch.float16 if some.name == "triton" else torch.float32):  # logits are float32 for all
            found.append(pytest.param(some, name, marks=marks, id=f"{kind.id}-{name}"))
    return found


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")  # of NumPy, in the interpreter
@pytest.mark.parametrize(("kind", "name"), routes())
def test_route(name: str, kind: Kind) -> None:
    """Ties go to the lowest expert. A bias counts for the choice, not for the weights. NaN harms no other row."""
    router, num_rows = ROUTERS[name], 12 if kind.is_slow else MAX_ROWS
    for has_bias, has_scales in ((False, False), (True, False), (False, True), (True, True))[
        :: 3 if kind.is_slow else 1
    ]:
        inputs = router_inputs(router, num_rows, seed=len(name), has_bias=has_bias, has_scales=has_scales)
        route = Router(kind, inputs, router)
        found, weights = route(list(range(num_rows)), num_rows // 3)
        experts, expected = routing(inputs, router)
        rows = clear_rows(inputs, router)
        assert len(rows) > num_rows // 2
        assert found[rows].tolist() == experts[rows].tolist()
        torch.testing.assert_close(weights[rows].double(), torch.from_numpy(expected[rows]), rtol=1e-5, atol=1e-7)
        for some in ([0], [num_rows - 1], list(range(num_rows - 5, 3, -1))):
            assert all(torch.equal(new, old[some]) for new, old in zip(route(some), (found, weights), strict=True))
    inputs.logits[1] = torch.nan
    others = [row for row in range(num_rows) if row != 1]
    again = Router(kind, inputs, router)(list(range(num_rows)))
    assert all(torch.equal(new[others], old[others]) for new, old in zip(again, (found, weights), strict=True))


class Weights:
    """Random matrices of experts in some formats, one for each part of a product, and their numbers."""

    def __init__(
        self, kind: Kind, names: tuple[str, ...], num_experts: int, sizes: tuple[int, ...], num_inputs: int
    ) -> None:
        parts = list(enumerate(zip(names, sizes, strict=True)))
        pairs = [
            [random_weight(name, size, num_inputs, seed=100 * expert + index) for index, (name, size) in parts]
            for expert in range(num_experts)
        ]
        self.weights: list[list[Weight]] = [[weight for weight, _ in parts] for parts in pairs]
        self.numbers = [torch.cat([numbers for _, numbers in parts]) for parts in pairs]
        if not kind.is_cpp:  # whose products are of numbers in the type of the kernels
            self.weights = [
                [some.to(kind.dtype) if isinstance(some, Tensor) else some for some in parts] for parts in self.weights
            ]
            self.numbers = [numbers.to(kind.dtype).double() for numbers in self.numbers]


def inputs_as_read(kind: Kind, name: str, x: Tensor) -> Tensor:
    return rounded_input(name, x) if kind.is_cpp else x.double()


PARTS = [(name, name) for name in ("float32", "bfloat16", "q4_0", "q8_0", "mxfp4", "uint4")]
PARTS += [("q4_0", "q8_0"), ("q4_1", "q8_0"), ("q6_k", "q4_k")]
OF_TRITON = (PARTS[0], PARTS[3], ("q4_1", "q8_0"))


def products() -> list[Any]:
    """Return the kinds of kernels with the formats of weights that they read; the interpreter's in `make test-long`."""
    found = []
    for kind in KINDS:
        some = kind_of(kind)
        names = PARTS if some.is_cpp else OF_TRITON if some.name == "triton" else PARTS[:1]
        for parts in names:
            marks = [*kind.marks, *([pytest.mark.long] if some.is_slow and parts != OF_TRITON[-1] else [])]
            if not (some.is_slow and some.dtype == torch.bfloat16):  # multiplied wrongly by the interpreter
                found.append(pytest.param(some, parts, marks=marks, id=f"{kind.id}-{'-'.join(parts)}"))
    return found


def kernels_for(kind: Kind, name: str) -> Kernels:
    return make_kernels(kind.name, kind.num_threads, options_of(name)) if kind.is_cpp else kind.new()


@pytest.mark.parametrize(("kind", "names"), products())
def test_products(names: tuple[str, str], kind: Kind) -> None:
    """The weighted sum of products with random matrices, with a bias, and added to a residual stream."""
    kernels, num_rows = kernels_for(kind, names[0]), 40 if kind.is_slow else MAX_ROWS
    num_inputs = max(64, *map(inputs_of, names))
    weights = Weights(kind, names, SMALL.num_experts, (33, 20), num_inputs)
    x = random_tensor(1, num_rows, num_inputs, dtype=kind.dtype)
    inputs = router_inputs(SMALL, num_rows, seed=2, has_bias=False, has_scales=False)
    inputs.logits[:, 3] = -100.0  # nobody's choice
    inputs.logits[:30, 1] += 3.0
    bias = random_tensor(3, SMALL.num_experts, 53, dtype=kind.dtype)
    residual = random_tensor(4, num_rows, 53, dtype=kind.dtype)
    matrices = kernels.pack_experts(weights.weights)
    if isinstance(kernels, CpuKernels):
        assert [part.format.name for part in matrices[0].parts] == list(dict.fromkeys(names))

    def mixed(bias: Tensor | None, *tables: Tensor) -> Rows | Direct:
        linear = kernels.expert_linear(matrices, None if bias is None else bias.to(kind.device))
        operation = weighted_sum(kernels, SMALL, linear)
        return record(kernels, [table.to(kind.device) for table in (x, inputs.logits, *tables)], operation)

    plain = independent_rows(kind, mixed(None))[: kind.num_rows]
    rounded = inputs_as_read(kind, names[0], x)
    rounding = CPP if kind.is_cpp else TOLERANCES[kind.dtype]
    bound = mixture(rounded.abs(), inputs, SMALL, lambda expert, row: weights.numbers[expert].abs() @ row)
    expected = mixture(rounded, inputs, SMALL, lambda expert, row: weights.numbers[expert] @ row)
    assert_close(plain.cpu(), expected[: kind.num_rows], rounding * bound[: kind.num_rows] + 1e-30)
    biased = mixed(bias)(range(num_rows)).cpu()
    with_bias = mixture(rounded, inputs, SMALL, lambda e, row: weights.numbers[e] @ row + bias[e].double())
    assert_close(biased, with_bias, rounding * (bound + bias.abs().max().double()))
    added = mixed(None, residual)(range(kind.num_rows)).cpu()
    assert torch.equal(added, residual[: kind.num_rows] + plain.cpu())
    assert mixed(None)([]).shape == (0, 53)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(*kind.values, name, marks=kind.marks, id=f"{kind.id}-{name}")
        for kind in KINDS
        for name in {"torch": ["float32"], "triton": []}.get(kind_of(kind).name, ["float32", "q4_0"])
    ],
)
def test_two_products(name: str, kind: Kind) -> None:
    """The second product reads the pairs that the first has written; a row's bits do not depend on the others."""
    kernels = kernels_for(kind, name)
    router, size, num_inputs = ROUTERS["DeepSeek V3" if kind.is_cpp else "DeepSeek V2"], 32, 64
    up = Weights(kind, (name, name), router.num_experts, (size, size), num_inputs)
    down = Weights(kind, (name,), router.num_experts, (num_inputs,), size)
    x = random_tensor(1, MAX_ROWS, num_inputs, dtype=kind.dtype)
    inputs = router_inputs(router, MAX_ROWS, seed=2, has_bias=True, has_scales=False)
    first, second = (kernels.expert_linear(kernels.pack_experts(some.weights)) for some in (up, down))

    def operation(rows: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        routing = kernels.route(logits, router, inputs.bias)
        gate, up = torch.split(first(x, routing), size, dim=1)
        return kernels.combine_experts(second(kernels.act_and_mul(gate, up, "silu"), routing), routing)

    found = independent_rows(kind, record(kernels, [x, inputs.logits], operation))

    def expected(expert: int, row: Tensor) -> Tensor:
        both = up.numbers[expert] @ row
        hidden = F.silu(both[:size]) * both[size:]
        return down.numbers[expert] @ inputs_as_read(kind, name, hidden.float()[None])[0].double()

    rows = clear_rows(inputs, router)
    reference = mixture(inputs_as_read(kind, name, x), inputs, router, expected)
    # A hidden number that lies between two codes may be rounded to either.
    tolerance = TOLERANCES[kind.dtype] if name == "float32" else 2e-2
    scale = reference.abs().amax(dim=1, keepdim=True)
    assert_close(found[rows] / scale[rows], reference[rows] / scale[rows], tolerance)


def weighted_sum(kernels: Kernels, router: RouterSpec, linear: ExpertLinearOp) -> Callable[..., Tensor]:
    """Return the operation on rows of inputs, logits and a residual."""

    def operation(rows: Tensor, x: Tensor, logits: Tensor, residual: Tensor | None = None) -> Tensor:
        routing = kernels.route(logits, router)
        return kernels.combine_experts(linear(x, routing), routing, residual)

    return operation


each_code_path = pytest.mark.parametrize("code_path", code_paths())


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
    rows = Rows(kernels, [x, logits], weighted_sum(kernels, router, linear))
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
    found = Rows(kernels, [x, logits], weighted_sum(kernels, router, kernels.expert_linear(matrices)))(range(8))
    assert_close(found, x.double() @ (numbers + plain_numbers).T / 2, 1e-4)


@pytest.mark.parametrize("kind", [pytest.param(Kind("triton"), marks=[*ALSO_ON_A_GPU, pytest.mark.long])])
def test_more_pairs_than_are_sorted_at_a_time(kind: Kind) -> None:
    router = RouterSpec(num_experts=4, num_experts_per_tok=3)
    inputs = router_inputs(router, 700, seed=3, has_bias=False, has_scales=False)
    found, _ = Router(kind, inputs, router)(list(range(700)))
    assert found.tolist() == routing(inputs, router)[0].tolist()


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=ALSO_ON_A_GPU, id=str(dtype)) for dtype in PRODUCT_DTYPES])
def test_products_of_heads(dtype: torch.dtype) -> None:
    kind = Kind("triton", dtype)
    kernels = kind.new()
    matrices = random_tensor(2, 3, 40, 24).to(kind.device)
    x = random_tensor(3, 9, 72, dtype=kind.dtype).to(kind.device)
    product = kernels.head_linear(matrices)
    expected = torch.einsum("thk,hmk->thm", x.view(9, 3, 24).double(), matrices.to(kind.dtype).double()).flatten(1)
    found = product(x)
    assert_close(found, expected, 10 * kind.bound(expected))
    assert torch.equal(torch.cat([product(row[None]) for row in x]), found)
    assert torch.equal(product(torch.cat((x, x), dim=1)[:, 72:]), found)
