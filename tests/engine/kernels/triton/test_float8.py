"""Bits of float8 e4m3 in Triton, against torch's."""

import pytest
import torch
import triton
import triton.language as tl

from engine.kernels.triton.float8 import float8_bits, float8_numbers
from tests.support.kernel_device import ALSO_ON_A_GPU, DEVICE

pytestmark = ALSO_ON_A_GPU


@triton.jit  # type: ignore[untyped-decorator]
def _encode(numbers, codes, size: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, size)
    tl.store(codes + index, float8_bits(tl.load(numbers + index)))


@triton.jit  # type: ignore[untyped-decorator]
def _decode(codes, numbers, size: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, size)
    tl.store(numbers + index, float8_numbers(tl.load(codes + index)))


def test_all_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    found = torch.empty(256, device=DEVICE)
    _decode[(1,)](codes, found, 256)
    torch.testing.assert_close(found, codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spread", [1e-3, 0.02, 1.0, 200.0])
def test_numbers_become_the_nearest_code(spread: float) -> None:
    numbers = torch.randn(4096, generator=torch.Generator().manual_seed(3)) * spread
    assert_as_in_torch(numbers.clamp(-448, 448))


def test_numbers_halfway_between_codes() -> None:
    """Of two codes that are equally near, the even one is chosen; larger numbers become the largest."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (codes[:-1] + codes[1:]) / 2
    around = (halfway, halfway.nextafter(torch.tensor(0.0)), halfway.nextafter(torch.tensor(1e9)), codes)
    assert_as_in_torch(torch.cat([sign * some for some in around for sign in (1, -1)]))
    found = encoded(torch.tensor([449.0, -1e30, 463.0, 5.0]))
    assert found.view(torch.float8_e4m3fn).float().tolist() == [448.0, -448.0, 448.0, 5.0]


def assert_as_in_torch(numbers: torch.Tensor) -> None:
    expected = numbers.to(torch.float8_e4m3fn)
    assert torch.equal(encoded(numbers).view(torch.float8_e4m3fn).float(), expected.float())


def encoded(numbers: torch.Tensor) -> torch.Tensor:
    size = triton.next_power_of_2(len(numbers))
    padded = torch.nn.functional.pad(numbers, (0, size - len(numbers))).to(DEVICE)
    codes = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    _encode[(1,)](padded, codes, size)
    return codes[: len(numbers)].cpu()
