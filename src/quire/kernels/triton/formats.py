"""Stored elements as numbers the matrix units take, and numbers as stored elements, by their bits.

fp8 goes through integer arithmetic on every chip, so that one source also serves those without fp8. An fp8 number
is sign, exponent, mantissa; shifted to where a wider type keeps its own, it is the same number but for a power
of two, the difference of the exponents' biases:

    e4m3 as bfloat16:  value · 2^(7 − 127)        e5m2 as float16:  value · 2^(15 − 15)

subnormals included. ``unit_exponent`` is that power with its sign turned, for the caller to multiply with where
it costs least: once per score instead of once per element.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT8_MAX = tl.constexpr(127.0)
E4M3_MAX = tl.constexpr(448.0)
E5M2_MAX = tl.constexpr(57344.0)
# Added to a float of magnitude below 2^22 and taken away again, it leaves the nearest integer, ties to even.
ROUND_TO_INTEGER = tl.constexpr(12582912.0)


@triton.constexpr_function
def unit_exponent(FORMAT, dtype):
    """log2 of what ``widen``'s numbers are to be multiplied with."""
    if FORMAT in ("same", "int8"):
        return 0
    bias = 15 if dtype == tl.float16 else 127
    return bias - (7 if FORMAT == "fp8_e4m3" else 15)


@triton.constexpr_function
def mantissa_bits(FORMAT, dtype):
    """Mantissa bits of a number type, or of an fp8 format."""
    if FORMAT == "fp8_e4m3":
        return 3
    if FORMAT == "fp8_e5m2":
        return 2
    return {tl.float16: 10, tl.bfloat16: 7, tl.float32: 23}[dtype]


@triton.jit
def widen(stored, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Elements of a page as ``dtype``, still to be multiplied with 2^unit_exponent (and the scales)."""
    if FORMAT == "same":
        return stored
    elif FORMAT == "int8":
        return stored.to(dtype)
    else:
        shift: tl.constexpr = mantissa_bits("same", dtype) - mantissa_bits(FORMAT, dtype)
        if dtype == tl.float32:
            bits = stored.to(tl.uint32)
            wide = ((bits & 0x80) << 24) | ((bits & 0x7F) << shift)
        else:
            bits = stored.to(tl.uint16)
            wide = ((bits & 0x80) << 8) | ((bits & 0x7F) << shift)
        return wide.to(dtype, bitcast=True)


@triton.jit
def round_to_int8(x):
    """The nearest int8, ties to even; x lies within ±127."""
    return ((x + ROUND_TO_INTEGER) - ROUND_TO_INTEGER).to(tl.int8)


@triton.jit
def round_to_fp8(x, FORMAT: tl.constexpr):
    """The nearest fp8 number's byte, ties to even; x lies within the format's largest."""
    MANTISSA: tl.constexpr = mantissa_bits(FORMAT, tl.float32)
    BIAS: tl.constexpr = 7 if FORMAT == "fp8_e4m3" else 15
    DROPPED: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # A carry out of the mantissa runs into the exponent, which is what rounding up asks for.
    half = (1 << (DROPPED - 1)) - 1 + ((magnitude >> DROPPED) & 1)
    normal = ((magnitude + half) >> DROPPED) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number the steps are even, 2^(1 − BIAS − MANTISSA) each.
    steps = tl.abs(x) * (2.0 ** (BIAS + MANTISSA - 1))
    subnormal = ((steps + ROUND_TO_INTEGER) - ROUND_TO_INTEGER).to(tl.uint32)
    code = tl.where(tl.abs(x) < 2.0 ** (1 - BIAS), subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
