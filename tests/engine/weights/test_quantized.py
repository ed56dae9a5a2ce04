"""Weights of quantised checkpoints: what they stand for, which can be stacked, and which kernels cannot take."""

import pytest
import torch

from engine.weights import Float8Tensor, GroupQuantized, Weight, concatenate, layout_of
from engine.weights.quantized import halved_nibbles, paired_nibbles, unpacked_nibbles
from tests.support.packed_weights import random_groups


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_group_quantized(bits: int, symmetric: bool) -> None:
    parts = [random_groups(bits, rows, 192, 64, seed=rows, symmetric=symmetric) for rows in (300, 7)]
    weight = concatenate([part for part, _ in parts])
    assert (weight.shape, weight.group_size, weight.type_name) == ((307, 192), 64, f"int{bits}")
    assert weight.nbytes == 307 * 192 * bits // 8 + 307 * 3 * (2 if symmetric else 3)
    numbers = torch.cat([numbers for _, numbers in parts])
    assert torch.equal(weight.dequantize(torch.float32).double(), numbers)
    assert torch.equal(weight.dequantize(torch.float16), numbers.half())


def test_layouts() -> None:
    """What differs in any of these cannot be stacked."""
    weight = random_groups(4, 8, 256, 128, 1)[0]
    same = random_groups(4, 40, 256, 128, 2)[0]
    others: list[Weight] = [
        random_groups(8, 8, 256, 128, 1)[0],
        random_groups(4, 8, 256, 64, 1)[0],
        random_groups(4, 8, 256, 128, 1, symmetric=True)[0],
        GroupQuantized(4, weight.codes, weight.scales.float(), weight.zero_points),
        Float8Tensor.from_scales(torch.ones(8, 256).to(torch.float8_e4m3fn), torch.ones(1)),
        torch.ones(8, 256),
    ]
    assert layout_of(weight) == layout_of(same)
    assert len({layout_of(other) for other in [weight, *others]}) == 1 + len(others)
    assert concatenate([weight]) is weight


def test_what_no_kernel_takes() -> None:
    scales = torch.full((8, 4), 0.125)
    codes = torch.zeros((8, 96), dtype=torch.uint8)
    assert GroupQuantized(8, codes, scales[:, :3], None).why_unpacked is None
    assert GroupQuantized(8, codes, scales, None).why_unpacked == "groups of 24"
    assert GroupQuantized(8, codes, scales[:, :3] / 3, None).why_unpacked == "scales that are not exact in float16"
    shuffled = GroupQuantized(8, codes, scales[:, :3], None, torch.arange(96) % 3)
    assert shuffled.why_unpacked == "act-order or a short last group"


@pytest.mark.parametrize("num_rows", [128, 130])
def test_float8(num_rows: int) -> None:
    codes = torch.randn(num_rows, 200, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    channels = torch.rand(num_rows) + 0.5
    for scales, spread in (
        (torch.tensor(3.0), torch.full((num_rows, 200), 3.0)),
        (channels, channels[:, None].expand(-1, 200)),
        (channels[:, None].bfloat16(), channels[:, None].bfloat16().float().expand(-1, 200)),
        (
            (blocks := torch.rand(-(-num_rows // 128), 2)),
            blocks[torch.arange(num_rows) // 128][:, torch.arange(200) // 128],
        ),
    ):
        weight = Float8Tensor.from_scales(codes, scales)
        assert torch.equal(weight.dequantize(torch.float32), codes.float() * spread)
        stacked = concatenate([weight, weight])
        assert torch.equal(stacked.dequantize(torch.float32), torch.cat([codes.float() * spread] * 2))
        assert stacked.shape == (2 * num_rows, 200)


def test_nibbles() -> None:
    codes = torch.arange(32, dtype=torch.uint8).view(2, 16) % 16
    assert paired_nibbles(codes)[0, :2].tolist() == [0x10, 0x32]
    assert torch.equal(unpacked_nibbles(paired_nibbles(codes)), codes)
    assert torch.equal(paired_nibbles(codes.T.contiguous().T), paired_nibbles(codes))
    codes = torch.arange(192, dtype=torch.uint8).view(3, 64) * 7 % 16
    halves = codes.view(-1, 2, 16)
    expected = (halves[:, 0] | halves[:, 1] << 4).view(3, 32)
    assert torch.equal(halved_nibbles(paired_nibbles(codes)), expected)
