"""Norms, activations and sums of all kernels: against float64, and batch invariance."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.interface import Kernels
from tests.support.kernel_kinds import Kind, each_kind, independent_rows, record
from tests.support.recorded_kernels import assert_close
from tests.support.tensors import ACTIVATIONS, clamped_swiglu, rms_norm
from tests.support.tensors import random_tensor as random_on_cpu

SIZES = (1, 16, 100, 577, 2065)
EPS = 1e-5


def sizes_of(kind: Kind) -> tuple[int, ...]:
    return (577,) if kind.is_short else SIZES


def random_tensor(kind: Kind, seed: int, *shape: int) -> Tensor:
    return random_on_cpu(seed, *shape, dtype=kind.dtype).to(kind.device)


def spread_rows(kind: Kind, seed: int, size: int, most: int = 6) -> Tensor:
    """Return rows of very different scales up to a power of 10, the first of zeros."""
    least, most = (-6, most) if kind.dtype == torch.float32 else (-2, min(2, most))
    x = random_tensor(kind, seed, kind.num_rows, size)
    x *= torch.logspace(least, most, kind.num_rows, device=kind.device)[:, None].to(kind.dtype)
    x[0] = 0
    return x


@each_kind
def test_rms_norm(kind: Kind) -> None:
    """Rows may be columns of a wider tensor, and the result may be added to a residual stream."""
    kernels = kind.new()
    for size in sizes_of(kind):
        x, weight = spread_rows(kind, size, size), random_tensor(kind, 1, size)
        out = independent_rows(kind, record(kernels, [x], lambda rows, x, w=weight: kernels.rms_norm(x, w, EPS)))
        expected = rms_norm(x, weight, EPS)
        assert_close(out, expected, kind.bound(expected))
        residual = random_tensor(kind, 2, kind.num_rows, size)
        added = record(kernels, [x, residual], lambda rows, x, r, w=weight: kernels.rms_norm(x, w, EPS, r))
        expected = residual.double() + out.double()
        assert_close(independent_rows(kind, added), expected, kind.bound(expected))
        wide = torch.cat([random_tensor(kind, 3, kind.num_rows, 5), x, random_tensor(kind, 4, kind.num_rows, 9)], dim=1)
        columns = record(
            kernels, [wide], lambda rows, x, w=weight, size=size: kernels.rms_norm(x[:, 5 : 5 + size], w, EPS)
        )
        assert torch.equal(columns(range(kind.num_rows)), out)


@each_kind
def test_layer_norm(kind: Kind) -> None:
    kernels = kind.new()
    for size in sizes_of(kind):
        x, weight = spread_rows(kind, size, size) * 3 + 1, random_tensor(kind, 1, size)
        wide = torch.cat([x, random_tensor(kind, 2, kind.num_rows, 5)], dim=1)
        norm = record(kernels, [wide], lambda rows, x, w=weight, size=size: kernels.layer_norm(x[:, :size], w, EPS))
        expected = F.layer_norm(x.double(), (size,), weight.double(), None, EPS)
        # The mean is rounded, by the more the further it is from zero.
        deviation = (x.double().var(dim=1, correction=0, keepdim=True) + EPS).sqrt()
        more = 4e-7 * x.double().abs().amax(dim=1, keepdim=True) / deviation * weight.double().abs()
        assert_close(independent_rows(kind, norm), expected, kind.bound(expected, more) + more)


@each_kind
def test_sums_and_scales(kind: Kind) -> None:
    """In place: the columns of a wider tensor."""
    kernels = kind.new()
    for size in sizes_of(kind):
        residual, x = (random_tensor(kind, seed, kind.num_rows, size + 3) for seed in (0, 1))

        def add(rows: Tensor, residual: Tensor, x: Tensor) -> Tensor:
            kernels.add(residual[:, 3:], x[:, 3:], 0.22)
            return residual

        out = independent_rows(kind, record(kernels, [residual, x], add))
        expected = residual[:, 3:].double() + 0.22 * x[:, 3:].double()
        assert_close(out[:, 3:], expected, kind.bound(expected, 2e-7 * (1 + residual[:, 3:].abs() + x[:, 3:].abs())))
        assert torch.equal(out[:, :3], residual[:, :3])
        logits = spread_rows(kind, size, size)
        for scale, softcap in ((0.25, None), (1.0, 30.0), (0.0625, 15.0), (1.0, None)):

            def scaled(rows: Tensor, x: Tensor, scale: float = scale, softcap: float | None = softcap) -> Tensor:
                kernels.scale(x, scale, softcap)
                return x

            rows = record(kernels, [logits], scaled)
            out = independent_rows(kind, rows) if softcap == 15.0 else rows(range(kind.num_rows))
            expected = scale * logits.double()
            expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
            assert_close(out, expected, kind.bound(expected, 2e-7 * (softcap or 0)))


def halves(kernels: Kernels, x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, dim=1)
    return kernels.act_and_mul(gate, up, activation)


@each_kind
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swigluoai"])
def test_act_and_mul(activation: str, kind: Kind) -> None:
    """Gate and up may be columns of one tensor, or tensors of their own."""
    kernels, size = kind.new(), 1103
    gate_up = spread_rows(kind, 0, 2 * size, most=1)
    edges = [0.0, -0.0, 1e-4, -1e-4, 5.0, -5.0, 20.0, -20.0, 87.0, -87.0, 88.5, -88.5, 100.0, -100.0, 1e4, -1e4]
    more_edges = [1e-38, -1e-30, 1e10, -1e10] if kind.dtype == torch.float32 else []
    gate_up[0, : len(edges + more_edges)] = torch.tensor(edges + more_edges, device=kind.device)
    gate_up[0, size : size + 30] = 1.5
    whole = record(kernels, [gate_up], lambda rows, x: halves(kernels, x, activation))
    out = independent_rows(kind, whole)
    gate, up = gate_up.chunk(2, dim=1)
    apart = record(kernels, [gate, up], lambda rows, gate, up: kernels.act_and_mul(gate, up, activation))
    assert torch.equal(apart(range(kind.num_rows)), out)
    gate, up = gate.double(), up.double()
    expected = clamped_swiglu(gate, up) if activation == "swigluoai" else ACTIVATIONS[activation](gate) * up
    # If the activation is nearly 0, the bound of its error grows with the gate.
    assert_close(out, expected, kind.bound(expected, 1e-6 + 3e-7 * (gate * up).abs().clamp(max=100)))


@each_kind
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by NumPy, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite(value: float, kind: Kind) -> None:
    kernels = kind.new()
    x, weight = random_tensor(kind, 0, 9, 100), torch.ones(50, dtype=kind.dtype, device=kind.device)
    operations: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda rows, x: kernels.rms_norm(x[:, :50], weight, 1e-5),
        lambda rows, x: kernels.layer_norm(x[:, :50], weight, 1e-5),
    ]
    for name in (*ACTIVATIONS, *(["swigluoai"] if math.isnan(value) else [])):  # which clamps an infinite gate
        operations.append(partial(lambda name, rows, x: halves(kernels, x, name), name))
    good = [record(kernels, [x], operation)(range(9)) for operation in operations]
    x[4, 7] = value
    others = [row for row in range(9) if row != 4]
    for operation, expected in zip(operations, good, strict=True):
        out = record(kernels, [x], operation)(range(9))
        assert not out[4].isfinite().all()
        assert torch.equal(out[others], expected[others])
