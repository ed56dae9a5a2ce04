"""float8 e4m3 (Micikevicius et al. 2022) and float4 e2m1 (OCP Microscaling 1.0) for every card.

Their bits, in uint8, are computed with integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_FLOAT8 = tl.constexpr(448.0)
SMALLEST_NORMAL = tl.constexpr(2.0**-6)


@triton.jit
def float8_numbers(codes):
    """Return the numbers that bits of float8 e4m3 stand for, exactly, on cards that have no instruction for it.

    As bits of float16, whose exponent is one bit longer and biased by 15 instead of 7, they are 2^-8 of the number.
    """
    bits = codes.to(tl.uint16)
    half = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def float4_numbers(codes):
    """Return the numbers that bits of float4 e2m1 stand for, exactly.

    As bits of float16, whose exponent is biased by 15 instead of 1, they are 2^-14 of the number.
    """
    bits = codes.to(tl.uint16)
    half = ((bits & 8) << 12 | (bits & 7) << 9).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 16384.0


@triton.jit
def powers_of_two(exponents):
    """Return the numbers that bits of e8m0 stand for, 2^(exponent - 127) for 1 .. 254."""
    return (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def float8_bits(numbers):
    """Return the bits of float32 numbers as float8 e4m3 in uint8: the nearest, of two the even, at most MAX_FLOAT8."""
    sizes = tl.minimum(tl.abs(numbers), MAX_FLOAT8)
    bits = sizes.to(tl.int32, bitcast=True)
    # The exponent is biased by 127 instead of 7, and 20 bits of the fraction are rounded away.
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)
    # Next to 2^14, float32 has the step of the subnormal numbers, 2^-9.
    subnormal = (sizes + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    sign = tl.where(numbers < 0, 0x80, 0)
    return (tl.where(sizes < SMALLEST_NORMAL, subnormal, normal) | sign).to(tl.uint8)
