"""Matrix products in C++: against float64, batch invariance, and how a recorded program reads and prepares rows.

tests/engine/kernels/test_rows.py tests norms, activations and sums. Every format is tried on every code path that this
processor has; what does not depend on the code path, on the best.
"""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.cpu.weights import FORMATS, PACKED_TYPES
from engine.kernels.interface import KernelOptions, LinearOp
from engine.parts.lora.layers import new_lora_layer
from engine.weights import PackedTensor, Weight
from tests.support.examples import star
from tests.support.kernel_choice import code_paths
from tests.support.packed_weights import (
    SCALES,
    inputs_of,
    numbers_of,
    options_of,
    random_groups,
    random_packed,
    random_weight,
    rounded_input,
    rounded_to_bfloat16,
)
from tests.support.recorded_kernels import MAX_ROWS, Rows, assert_close, assert_rows_are_independent, make_kernels
from tests.support.tensors import ACTIVATIONS, random_tensor

pytestmark = pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")
each_code_path = pytest.mark.parametrize("code_path", code_paths())
FORMATS_OF_PATHS = list(itertools.product(FORMATS, code_paths()))


@pytest.fixture(params=code_paths()[:1])
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    """Return those of the best code path."""
    return make_kernels(request.param, options=KernelOptions(torch.float32))


ROUNDING = 1e-6  # of a sum in float32, relative to the sum of the absolute values


def shapes_of(name: str) -> list[tuple[int, int]]:
    """Return numbers of outputs and inputs, with and without full panels of 32 outputs and full groups of inputs."""
    unit = inputs_of(name)
    if unit == 1:
        return [(70, 100), (1, 1), (32, 64), (33, 37), (15, 31)]
    return [(70, max(96, unit)), (1, unit), (32, 2 * unit), (49, 3 * unit)]


def act_and_mul(kernels: CpuKernels, gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return kernels.act_and_mul(gate, up, activation)


def new_linear(kernels: CpuKernels, name: str, num_outputs: int, num_inputs: int, seed: int) -> LinearOp:
    return kernels.linear(kernels.pack([random_weight(name, num_outputs, num_inputs, seed)[0]]))


def product_of(linear: LinearOp, *tables: Tensor, kernels: CpuKernels, max_rows: int = MAX_ROWS) -> Rows:
    return Rows(kernels, tables, lambda rows, *inputs: linear(*inputs), max_rows)


# Matrix products.


@pytest.mark.parametrize(("name", "code_path", "num_threads"), star(FORMATS_OF_PATHS, [2, 1]))
def test_format(name: str, code_path: str, num_threads: int) -> None:
    """Packed weights, read as embeddings, have the bits of the checkpoint; products are those of float64.

    AMX rounds quantised weights and their input to bfloat16 for prompts. Other code paths treat them like other rows.
    """
    kernels = make_kernels(code_path, num_threads, options_of(name))
    for index, (num_outputs, num_inputs) in enumerate([*shapes_of(name), (40, 32 * 40)]):
        weight, numbers = random_weight(name, num_outputs, num_inputs, seed=num_outputs)
        matrix = kernels.pack([weight])
        assert (matrix.num_outputs, matrix.num_inputs) == (num_outputs, num_inputs)
        assert matrix.parts[0].format.name == name
        embed = Rows(kernels, [], lambda rows, matrix=matrix: kernels.embed(rows, matrix))
        assert torch.equal(embed(range(num_outputs)).double(), numbers)
        *without, first = embed([num_outputs, -1, 0])
        assert torch.stack(without).isnan().all()
        assert torch.equal(first.double(), numbers[0])
        x = random_tensor(num_inputs, MAX_ROWS, num_inputs) * torch.logspace(-3, 3, MAX_ROWS)[:, None]
        product = product_of(kernels.linear(matrix), x, kernels=kernels)
        out = assert_rows_are_independent(product) if index == 0 else product(range(MAX_ROWS))
        assert_product(out, rounded_input(name, x), numbers)
        prompts = product(range(MAX_ROWS), MAX_ROWS)
        if not kernels.separates_prompts:
            assert torch.equal(prompts, out)
            continue
        x, numbers = rounded_input("bfloat16", x), rounded_to_bfloat16(numbers)
        # Rounding twice can move a few numbers by one step of bfloat16.
        steps = 2**-8 * (x.abs()[:, None, :] * numbers.abs()).amax(dim=2)
        assert_close(prompts, x @ numbers.T, ROUNDING * (x.abs() @ numbers.abs().T) + steps + 1e-30)
        assert not torch.equal(prompts, out)


@pytest.mark.parametrize(("code_path", "num_threads", "name"), star(code_paths(), [2, 1], ["q6_k", "bfloat16", "q4_1"]))
def test_linear_of_more_rows_than_are_taken_at_once(name: str, code_path: str, num_threads: int) -> None:
    kernels = make_kernels(code_path, num_threads, options_of(name))
    x = random_tensor(1, 600, 768)
    product = product_of(new_linear(kernels, name, 70, 768, seed=2), x, kernels=kernels, max_rows=600)
    for are_prompts in (False, True):
        few = [product(range(first, first + 30), 30 * are_prompts) for first in range(0, 600, 30)]
        assert torch.equal(product(range(600), 600 * are_prompts), torch.cat(few))


@pytest.mark.parametrize(("code_path", "name"), star(code_paths(), ["q4_k", "q6_k"]))
def test_linear_of_more_inputs_than_have_scales_kept(name: str, code_path: str) -> None:
    """Several tiles of rows share the scales of the first blocks."""
    kernels = make_kernels(code_path, options=options_of(name))
    num_inputs = 66 * 256
    weight, numbers = random_weight(name, 40, num_inputs, seed=1)
    x = random_tensor(2, 14, num_inputs)
    product = product_of(kernels.linear(kernels.pack([weight])), x, kernels=kernels)
    out = product(range(14))
    assert torch.equal(torch.cat([product([row]) for row in range(14)]), out)
    assert_product(out, rounded_input(name, x), numbers)


def assert_product(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Check that `out` is x W^T within the rounding of float32."""
    assert_close(out, x @ weight.T, ROUNDING * (x.abs() @ weight.abs().T) + 1e-30)


@pytest.mark.parametrize(("code_path", "num_threads"), star(code_paths(), [2, 1]))
def test_parts_with_bias_and_residual(code_path: str, num_threads: int) -> None:
    """q, k and v may have different types. A part ends inside the vectors of the next."""
    kernels = make_kernels(code_path, num_threads)
    parts = [
        random_packed(name, size, 256, size) for name, size in [("Q4_1", 33), ("Q4_1", 9), ("Q6_K", 17), ("Q8_0", 70)]
    ]
    matrix, numbers = kernels.pack(parts), torch.cat([numbers_of(part) for part in parts]).double()
    assert [part.format.name for part in matrix.parts] == ["q4_1", "q6_k", "q8_0"]
    x, bias, residual = random_tensor(0, MAX_ROWS, 256), random_tensor(1, 129), random_tensor(2, MAX_ROWS, 129)
    expected = rounded_input("q8_0", x) @ numbers.T
    bound = ROUNDING * (rounded_input("q8_0", x).abs() @ numbers.abs().T + bias.abs() + residual.abs() + 1)

    def result(bias: Tensor | None, *tables: Tensor) -> Tensor:
        return assert_rows_are_independent(product_of(kernels.linear(matrix, bias), *tables, kernels=kernels))

    plain, biased = result(None, x), result(bias, x)
    assert_close(plain, expected, bound)
    assert torch.equal(biased, plain + bias)
    assert torch.equal(result(None, x, residual), residual + plain)
    assert torch.equal(result(bias, x, residual), residual + biased)


@each_code_path
def test_groups_with_zero_points(code_path: str) -> None:
    """Groups of any multiple of 32 inputs; zero points in the middle make Q4_0 and Q8_0; equal parts are one."""
    kernels = make_kernels(code_path)
    parts = [
        random_groups(4, 33, 256, 128, 1),
        random_groups(4, 9, 256, 32, 2),
        random_groups(4, 17, 256, 64, 3, symmetric=True),
        random_groups(8, 40, 256, 256, 4),
        random_groups(8, 5, 256, 128, 5, symmetric=True),
    ]
    matrix, numbers = kernels.pack([weight for weight, _ in parts]), torch.cat([numbers for _, numbers in parts])
    formats = [(part.format.name, part.num_outputs) for part in matrix.parts]
    assert formats == [("uint4", 42), ("q4_0", 17), ("uint8", 40), ("q8_0", 5)]
    x = random_tensor(0, MAX_ROWS, 256)
    out = assert_rows_are_independent(product_of(kernels.linear(matrix), x, kernels=kernels))
    assert_product(out, rounded_input("q8_0", x), numbers)


def test_a_part_that_is_not_packed(kernels: CpuKernels) -> None:
    """All parts are then computed in the dtype of the kernels."""
    packed, plain = random_packed("Q5_1", 40, 64, 1), random_tensor(2, 20, 64)
    matrix = kernels.pack([packed, plain])
    assert [part.format.name for part in matrix.parts] == ["float32"]
    x = random_tensor(3, 5, 64)
    out = product_of(kernels.linear(matrix), x, kernels=kernels)(range(5))
    assert_product(out, x.double(), torch.cat([numbers_of(packed), plain]).double())


@pytest.mark.parametrize(("type_name", "code_path"), star(sorted(PACKED_TYPES), code_paths()))
def test_largest_codes(type_name: str, code_path: str) -> None:
    """Sums of products of the largest codes do not overflow."""
    kernels = make_kernels(code_path)
    packed = random_packed(type_name, 8, 256, 0)
    extremes = packed.data.reshape(8, -1).copy()
    blocks = random_packed(type_name, 8, 256, 1).data.reshape(8, -1)
    scales = np.zeros(extremes.shape[1], dtype=bool)
    size = extremes.shape[1] // (256 // inputs_of(type_name))
    for offset in SCALES[type_name]:
        scales[offset::size] = scales[offset + 1 :: size] = True
    if type_name == "MXFP4":
        scales[::size] = True
    for row, byte in enumerate([0, 255, 127, 128, 0x0F, 0xF0, 1, 254]):
        extremes[row] = np.where(scales, blocks[row], byte)
    packed = PackedTensor(type_name, (8, 256), extremes.reshape(-1))
    x = torch.ones(4, 256)
    x[1] = x[2, ::2] = x[3, :128] = -1
    out = product_of(kernels.linear(kernels.pack([packed])), x, kernels=kernels)(range(4))
    assert_product(out, rounded_input("q8_0", x), numbers_of(packed).double())


def test_temporaries_of_one_shape_and_two_types(kernels: CpuKernels) -> None:
    """A quantised input of 64 numbers has 96 bytes, and the other product writes 96 results to the same buffer."""
    quantised, first, second = (
        kernels.linear(kernels.pack([weight]))
        for weight in (random_weight("q8_0", 40, 64, seed=1)[0], random_tensor(2, 40, 64), random_tensor(3, 96, 64))
    )
    x = random_tensor(4, 9, 64)

    def operation(rows: Tensor, x: Tensor) -> Tensor:
        with kernels.temporaries():
            quantised(x)
        with kernels.temporaries():
            first(x)
            return second(x)

    out = Rows(kernels, [x], operation)(range(9))
    torch.testing.assert_close(out, x @ random_tensor(3, 96, 64).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "code_path"), star([*FORMATS], code_paths()))
def test_what_is_not_finite_stays_in_its_row(name: str, code_path: str) -> None:
    kernels = make_kernels(code_path, options=options_of(name))
    num_inputs = max(96, inputs_of(name))
    linear = new_linear(kernels, name, 70, num_inputs, seed=1)
    x, bad_rows = random_tensor(2, 40, num_inputs), [0, 5, 6, 20, 39, 7, 8]
    good = product_of(linear, x, kernels=kernels)(range(40), 25)
    values = [torch.nan, torch.inf, -torch.inf, -torch.nan, torch.nan]
    x[bad_rows[:5], [0, 31, 32, 40, 95]] = torch.tensor(values)
    # NaNs that rounding up would turn into numbers.
    x.view(torch.int32)[bad_rows[5:], 50] = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32)
    out = product_of(linear, x, kernels=kernels)(range(40), 25)
    assert not out[bad_rows].isfinite().any()
    others = [row for row in range(40) if row not in bad_rows]
    assert torch.equal(out[others], good[others])


SCALED = [name for name in sorted(PACKED_TYPES) if SCALES[name]]


def damaged_weights(name: str, value: float) -> tuple[Weight, Weight]:
    """Return weights, and the same with another number, or another scale, in their row 33."""
    if name not in SCALED:
        weight = random_weight(name, 40, 512, seed=1)[0]
        assert isinstance(weight, Tensor)
        damaged = weight.clone()
        damaged[33, 40] = value
        return weight, damaged
    packed = random_packed(name, 40, 512, seed=1)
    data, offset = packed.data.reshape(40, 512 // inputs_of(name), -1).copy(), SCALES[name][-1]
    data[33, 1, offset : offset + 2] = np.array([value], dtype=np.float16).view(np.uint8)
    return packed, PackedTensor(name, (40, 512), data.reshape(-1))


@pytest.mark.parametrize(
    ("name", "value", "code_path"),
    star(["float32", "bfloat16", "int8", *SCALED], [torch.nan, torch.inf, -torch.inf], code_paths()),
)
def test_weights_that_are_not_finite_show(name: str, value: float, code_path: str) -> None:
    """A corrupt checkpoint must not give plausible answers: its output is NaN, for prompts too, and no other."""
    kernels = make_kernels(code_path, options=KernelOptions(torch.float32) if name in SCALED else options_of(name))
    x, results = random_tensor(2, 5, 512), []
    for weight in damaged_weights(name, value):
        matrix = kernels.pack([weight])
        out = product_of(kernels.linear(matrix), x, kernels=kernels)(range(5), num_prompt_rows=2)
        results.append((out.T, Rows(kernels, [], lambda rows, matrix=matrix: kernels.embed(rows, matrix))(range(40))))
    others = [column for column in range(40) if column != 33]
    for good, bad in zip(*results, strict=True):
        assert torch.equal(bad[others], good[others])
    (out, embedding) = results[1]
    assert not out[33].isfinite().any()
    assert not embedding[33].isfinite().all()


def test_all_exponents_of_mxfp4(kernels: CpuKernels) -> None:
    data = random_packed("MXFP4", 256, 32, seed=1).data.reshape(256, 17).copy()
    data[:, 0] = range(256)
    packed = PackedTensor("MXFP4", (256, 32), data.reshape(-1))
    matrix = kernels.pack([packed])
    embedding = Rows(kernels, [], lambda rows: kernels.embed(rows, matrix), max_rows=256)(range(256))
    assert torch.equal(embedding, numbers_of(packed))


@pytest.mark.parametrize("name", FORMATS)
def test_linear_on_all_code_paths(name: str) -> None:
    """The bits are the same, except for bfloat16, whose products each processor rounds in its own way."""
    num_inputs = 2 * max(64, inputs_of(name))
    weight, numbers = random_weight(name, 70, num_inputs, seed=1)
    x, results = random_tensor(2, 40, num_inputs), []
    for code_path in code_paths():
        kernels = make_kernels(code_path, options=options_of(name))
        results.append(product_of(kernels.linear(kernels.pack([weight])), x, kernels=kernels)(range(40)))
        if name == "bfloat16":
            assert_product(results[-1], rounded_input(name, x), numbers)
    if name != "bfloat16":
        assert all(torch.equal(result, results[0]) for result in results)


# The operation that makes a product's input may prepare it.


@pytest.mark.parametrize(
    ("name", "code_path", "num_threads"), star(["q6_k", "float32", "bfloat16", "int8", "q4_1"], code_paths(), [2, 1])
)
def test_input_prepared_where_it_is_made(name: str, code_path: str, num_threads: int) -> None:
    """Rows are longer than one piece. The result is that of the two operations one by one."""
    size = 1100 if inputs_of(name) == 1 else 1280
    kernels = make_kernels(code_path, num_threads, options_of(name))
    linear, norm = new_linear(kernels, name, 33, size, seed=1), random_tensor(2, size)
    x = random_tensor(3, MAX_ROWS, 2 * size)
    makers: list[Callable[[Tensor], Tensor]] = [
        lambda x: kernels.rms_norm(x[:, :size], norm, 1e-5),
        lambda x: kernels.layer_norm(x[:, 7 : 7 + size], norm, 1e-5),
        lambda x: act_and_mul(kernels, x, "silu"),
    ]
    for make in makers:
        both = Rows(kernels, [x], lambda rows, x, make=make: linear(make(x)))
        out = assert_rows_are_independent(both)
        made = Rows(kernels, [x], lambda rows, x, make=make: make(x))(range(MAX_ROWS))
        product = product_of(linear, made, kernels=kernels)
        assert torch.equal(product(range(MAX_ROWS)), out)
        assert torch.equal(product(range(MAX_ROWS), MAX_ROWS), both(range(MAX_ROWS), MAX_ROWS))


def calls_of(rows: Rows) -> list[str]:
    """Return the names of the recorded operations, without the products' formats."""
    return [name.split("_q")[0] for name in rows.program.names if name != "gather"]


@pytest.mark.parametrize(
    ("names", "calls"),
    [
        (("q4_0", "float32", "q8_0"), None),  # of different forms
        (("q8_0", "q8_0"), ["rms_norm", "linear", "linear"]),
        (("q8_0", "q8_0", "float32"), ["rms_norm", "linear", "linear", "linear_float32"]),
    ],
)
def test_one_input_for_several_readers(names: tuple[str, ...], calls: list[str] | None, kernels: CpuKernels) -> None:
    """A norm prepares its rows once for products of one form, and keeps its numbers for other readers."""
    norm, x = random_tensor(0, 96), random_tensor(1, 9, 96)
    products = [new_linear(kernels, name, 20, 96, seed) for seed, name in enumerate(names)]

    def all_of_them(rows: Tensor, x: Tensor) -> Tensor:
        normed = kernels.rms_norm(x, norm, 1e-5)
        out = products[0](normed)
        for product in products[1:]:
            out = product(normed, out)
        return out

    normed = Rows(kernels, [x], lambda rows, x: kernels.rms_norm(x, norm, 1e-5))(range(9))
    expected, *others = (product_of(product, normed, kernels=kernels)(range(9)) for product in products)
    for other in others:
        expected = expected + other
    recorded = Rows(kernels, [x], all_of_them)
    assert torch.equal(recorded(range(9)), expected)
    assert calls is None or calls_of(recorded) == calls
    # Nobody reads the norm's own numbers.
    assert recorded.program.parameters[1].output is None or "float32" in names


def test_products_of_columns(kernels: CpuKernels) -> None:
    """Each product reads its own columns of one result."""
    norm, x = random_tensor(0, 192), random_tensor(1, 9, 192)
    linear = new_linear(kernels, "q4_0", 20, 96, seed=2)
    normed = Rows(kernels, [x], lambda rows, x: kernels.rms_norm(x, norm, 1e-5))(range(9))
    left, right = (product_of(linear, half.contiguous(), kernels=kernels)(range(9)) for half in normed.chunk(2, dim=1))

    def halves(rows: Tensor, x: Tensor) -> Tensor:
        first, second = kernels.rms_norm(x, norm, 1e-5).chunk(2, dim=1)
        return linear(second, linear(first))

    assert torch.equal(Rows(kernels, [x], halves)(range(9)), left + right)


@pytest.mark.parametrize("is_read_before", [False, True])
def test_products_of_what_outlives_temporaries(is_read_before: bool, kernels: CpuKernels) -> None:
    """A product in one context reads what was made before it, although others reused the memory in between."""
    norm, x = random_tensor(0, 96), random_tensor(1, 9, 96)
    first, second = (new_linear(kernels, "q4_0", 96, 96, seed) for seed in (2, 3))

    def operation(rows: Tensor, x: Tensor) -> Tensor:
        normed = kernels.rms_norm(x, norm, 1e-5)
        with kernels.temporaries():
            if is_read_before:
                first(normed)
            second(second(x))
        with kernels.temporaries():
            second(x)
            return first(normed)

    alone = Rows(kernels, [x], lambda rows, x: first(kernels.rms_norm(x, norm, 1e-5)))
    assert torch.equal(Rows(kernels, [x], operation)(range(9)), alone(range(9)))


@pytest.mark.parametrize("change", ["linear", "rms_norm", "add", "scale", "lora"])
def test_products_of_what_changes(change: str, kernels: CpuKernels) -> None:
    """A product reads what its input holds by then, not what an earlier product read."""
    ones, x, y = torch.ones(96), random_tensor(1, 9, 96), random_tensor(2, 9, 96)
    linear = new_linear(kernels, "q4_0", 96, 96, seed=2)
    lora = new_lora_layer(kernels, [96], 96, num_slots=1, max_rank=2)
    for tensor, value in ((lora.a, 1), (lora.b, 1), (lora.ranks, 2)):
        tensor.fill_(value)
    lora_slots = torch.zeros(MAX_ROWS, dtype=torch.int64)
    changes: dict[str, Callable[[Tensor, Tensor], object]] = {
        "linear": lambda x, y: linear(y, x),
        "rms_norm": lambda x, y: kernels.rms_norm(y, ones, 1e-5, x),
        "add": lambda x, y: kernels.add(x, y, 3.0),
        "scale": lambda x, y: kernels.scale(x, 3.0),
        "lora": lambda x, y: lora(y, x, lora_slots),
    }

    def changed(rows: Tensor, x: Tensor, y: Tensor, *, reads_before: bool) -> Tensor:
        normed = kernels.rms_norm(x, ones, 1e-5)
        if reads_before:
            linear(normed)
        changes[change](normed, y)
        return linear(normed)

    before, after = (
        Rows(kernels, [x, y], partial(changed, reads_before=reads_before))(range(9)) for reads_before in (True, False)
    )
    assert torch.equal(before, after)
    assert not torch.equal(after, Rows(kernels, [x], lambda rows, x: linear(kernels.rms_norm(x, ones, 1e-5)))(range(9)))


# Rows.


def test_rows_on_all_code_paths() -> None:
    x, weight = random_tensor(0, MAX_ROWS, 1202) * 4, random_tensor(1, 1202)

    def results(kernels: CpuKernels) -> list[Tensor]:
        def capped(x: Tensor) -> Tensor:
            kernels.scale(x, 0.3, 2.0)
            return x

        norms = [partial(norm, weight=weight, eps=1e-6) for norm in (kernels.rms_norm, kernels.layer_norm)]
        acts = [partial(act_and_mul, kernels, activation=name) for name in (*ACTIVATIONS, "swigluoai")]
        operations: list[Callable[[Tensor], Tensor]] = [*norms, capped, *acts]
        return [Rows(kernels, [x], lambda rows, x, op=op: op(x))(range(MAX_ROWS)) for op in operations]

    best, *others = (results(make_kernels(code_path)) for code_path in code_paths())
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(best, other, strict=True))
