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
def widen_words(words, FORMAT: tl.constexpr, dtype: tl.constexpr, NVIDIA: tl.constexpr):
    """``widen`` for four stored elements to an int32, two at a time: [rows, n] words to [rows, 4n] numbers.

    Words pass from shared memory to the matrix units' registers as they are, where single bytes would be
    gathered one by one. For 16-bit dtypes.
    """
    if NVIDIA:
        first, second = tl.inline_asm_elementwise(
            widening_asm(FORMAT, dtype), "=r,=r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        first = widen_pair((words & 0xFF) | ((words & 0xFF00) << 8), FORMAT, dtype)
        second = widen_pair(((words >> 16) & 0xFF) | ((words >> 8) & 0xFF0000), FORMAT, dtype)
    pairs = tl.join(first, second)
    low = pairs.to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high).reshape(words.shape[0], words.shape[1] * 4)


@triton.jit
def widen_pair(pair, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Two stored elements, in the low bytes of an int32's halves, as two 16-bit numbers."""
    if FORMAT == "int8":
        # The low bits of a float that is a power of two count in ones: 2^7 + low 7 bits in bfloat16. A negative
        # int8 is its low 7 bits less 128.
        power: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
        return subtract_pair((pair & 0x007F007F) | power, (pair & 0x00800080) | power, dtype)
    else:
        shift: tl.constexpr = mantissa_bits("same", dtype) - mantissa_bits(FORMAT, dtype)
        return ((pair & 0x00800080) << 8) | ((pair & 0x007F007F) << shift)


@triton.jit
def subtract_pair(a, b, dtype: tl.constexpr):
    """a − b, in each half of int32s."""
    low = a.to(tl.int16).to(dtype, bitcast=True) - b.to(tl.int16).to(dtype, bitcast=True)
    high = (a >> 16).to(tl.int16).to(dtype, bitcast=True) - (b >> 16).to(tl.int16).to(dtype, bitcast=True)
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (
        high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    )


@triton.constexpr_function
def widening_asm(FORMAT, dtype):
    """PTX for both ``widen_pair`` of a word: a byte permute spreads two bytes, then the same arithmetic."""
    half = dtype == tl.float16
    if FORMAT == "int8":
        power = 0x64646464 if half else 0x43434343
        spread = [(0, f"prmt.b32 t, $2, {power}, 0x4140;"), (1, f"prmt.b32 t, $2, {power}, 0x4342;")]
        # Clear the sign bit here, keep it alone (and negate) there; multiply by one and add.
        one, negated = (0x3C003C00, 0xE400E400) if half else (0x3F803F80, 0xC300C300)
        kind = "f16x2" if half else "bf16x2"
        finish = (
            "and.b32 s, t, 0x00800080; or.b32 s, s, {negated}; and.b32 t, t, 0xFF7FFF7F; "
            "mov.b32 o, {one}; fma.rn.{kind} ${out}, t, o, s;"
        )
        steps = [code + " " + finish.format(out=i, one=one, negated=negated, kind=kind) for i, code in spread]
    else:
        # The byte goes to the top of its half: its sign is in place, its number is moved down.
        spread = [(0, "prmt.b32 t, $2, 0, 0x1404;"), (1, "prmt.b32 t, $2, 0, 0x3424;")]
        down = 8 - (mantissa_bits_of_half(half) - (3 if FORMAT == "fp8_e4m3" else 2))
        number = (0x7F00 >> down) * 0x00010001
        finish = (
            "and.b32 s, t, 0x80008000; shr.u32 t, t, {down}; and.b32 t, t, {number}; or.b32 ${out}, s, t;"
        )
        steps = [code + " " + finish.format(out=i, down=down, number=number) for i, code in spread]
    return "{ .reg .b32 o, s, t; " + " ".join(steps) + " }"


@triton.constexpr_function
def mantissa_bits_of_half(half):
    return 10 if half else 7


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
