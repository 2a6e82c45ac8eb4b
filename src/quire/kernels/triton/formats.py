"""Stored elements as numbers the matrix units take, and numbers as stored elements, by their bits.

An fp8 number is sign, exponent, mantissa; shifted to where a wider type keeps its own, it is the same number but for a
power of two, the difference of the exponents' biases, subnormals included:

    e5m2 as float16:  value · 2^(15 − 15)        e4m3 as float16:  value · 2^(7 − 15)        as float32:  · 2^(7 − 127)

So one source also serves chips without fp8. A float16 result is the number itself. A float32 result must still be
multiplied by 2^``unit_exponent``, which callers do once per score instead of once per element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.spec import LARGEST, QUANTIZED_DTYPES

# Added to a float of magnitude below 2^22 and taken away again, it leaves the nearest integer, ties to even.
ROUND_TO_INTEGER = tl.constexpr(12582912.0)


@triton.constexpr_function
def unit_exponent(FORMAT, dtype):
    """log2 of the factor that ``widen``'s numbers must still be multiplied by."""
    if FORMAT in ("same", "int8") or dtype != tl.float32:
        return 0
    return 127 - exponent_bias(FORMAT)


@triton.constexpr_function
def largest(FORMAT):
    """The largest number stored."""
    return LARGEST[QUANTIZED_DTYPES[FORMAT]]


@triton.constexpr_function
def exponent_bias(FORMAT):
    """Of an fp8 format."""
    return 7 if FORMAT == "fp8_e4m3" else 15


@triton.constexpr_function
def mantissa_bits(FORMAT):
    """Of an fp8 format."""
    return 3 if FORMAT == "fp8_e4m3" else 2


@triton.jit
def widen(stored, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Elements of a page as they are, or stored bytes as ``dtype``, float16 or float32.

    The result must still be multiplied by 2^unit_exponent and by the scales.
    """
    if FORMAT == "same":
        return stored
    elif FORMAT == "int8":
        return stored.to(dtype)
    elif dtype == tl.float32:
        bits = stored.to(tl.uint32)
        number = (bits & 0x7F) << (23 - mantissa_bits(FORMAT))
        return (((bits & 0x80) << 24) | number).to(tl.float32, bitcast=True)
    else:
        bits = stored.to(tl.uint16)
        number = (bits & 0x7F) << (10 - mantissa_bits(FORMAT))
        wide = (((bits & 0x80) << 8) | number).to(tl.float16, bitcast=True)
        return wide * (2.0 ** (15 - exponent_bias(FORMAT)))


@triton.jit
def widen_words(words, FORMAT: tl.constexpr, CAPABILITY: tl.constexpr):
    """``widen`` for four stored elements to an int32, two at a time: [rows, n] words to [rows, 4n] float16 numbers.

    Words are loaded from shared memory into the matrix units' registers whole; single bytes would be gathered one by
    one. CAPABILITY is an NVIDIA chip's, 0 elsewhere.
    """
    if CAPABILITY > 0:
        first, second = tl.inline_asm_elementwise(
            widening_asm(FORMAT, CAPABILITY, 0, 1, 2, 3),
            "=r,=r,r",
            [words],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        first = widen_pair(words & 0xFF, (words >> 8) & 0xFF, FORMAT)
        second = widen_pair((words >> 16) & 0xFF, (words >> 24) & 0xFF, FORMAT)
    pairs = tl.join(first, second)
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, high).reshape(words.shape[0], words.shape[1] * 4)


@triton.jit
def widen_apart(pairs, FORMAT: tl.constexpr, CAPABILITY: tl.constexpr):
    """``widen`` for two stored elements to an int16: all first ones, then all second ones, as float16 numbers.

    For operands that are multiplied transposed: the matrix units want two neighbours of a column in one register, and
    load them from shared memory two bytes at a time. Two int16s of a column hold two pairs of neighbours.
    """
    if CAPABILITY > 0:
        first, second = tl.inline_asm_elementwise(
            widening_asm(FORMAT, CAPABILITY, 0, 2, 1, 3),
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        return first, second
    elif FORMAT == "int8":
        return widen((pairs << 8) >> 8, FORMAT, tl.float16), widen(pairs >> 8, FORMAT, tl.float16)
    else:
        return widen(pairs & 0xFF, FORMAT, tl.float16), widen((pairs >> 8) & 0xFF, FORMAT, tl.float16)


@triton.jit
def widen_pair(a, b, FORMAT: tl.constexpr):
    """Two stored elements, each alone in an int32, as the halves of one."""
    if FORMAT == "int8":
        a, b = (a ^ 0x80) - 0x80, (b ^ 0x80) - 0x80  # the sign, which is the byte's highest bit
    low = widen(a, FORMAT, tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = widen(b, FORMAT, tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return low | high


@triton.constexpr_function
def widening_asm(FORMAT, CAPABILITY, *places):
    """PTX that widens a word's bytes at ``places``, the first two to $0 and the others to $1.

    A byte permute spreads two bytes over a register's halves. int8 is made unsigned; as the low bits of 1024.0 it
    counts in ones, and 1024 + 128 are taken away again. An e5m2 byte is the upper one of its float16. For e4m3 there
    is an instruction from sm_89 on; before, its sign stays, its number moves down by one and comes out 2^8 times too
    small.
    """
    a, b, c, d = places
    if FORMAT == "int8":
        return (
            "{ .reg .b32 u, o; xor.b32 u, $2, 0x80808080; mov.b32 o, 0xE480E480; "
            f"prmt.b32 $0, u, 0x64646464, 0x4{b}4{a}; add.rn.f16x2 $0, $0, o; "
            f"prmt.b32 $1, u, 0x64646464, 0x4{d}4{c}; add.rn.f16x2 $1, $1, o; }}"
        )
    if FORMAT == "fp8_e5m2":
        return f"{{ prmt.b32 $0, $2, 0, 0x{b}4{a}4; prmt.b32 $1, $2, 0, 0x{d}4{c}4; }}"
    if CAPABILITY >= 89:
        return (
            f"{{ .reg .b16 l, h; .reg .b32 t; prmt.b32 t, $2, 0, 0x{d}{c}{b}{a}; mov.b32 {{l, h}}, t; "
            "cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }"
        )
    move = (
        "and.b32 s, t, 0x80008000; shr.u32 t, t, 1; and.b32 t, t, 0x3F803F80; or.b32 t, s, t; "
        "mul.rn.f16x2 {out}, t, o; "
    )
    return (
        "{ .reg .b32 o, s, t; mov.b32 o, 0x5C005C00; "
        + f"prmt.b32 t, $2, 0, 0x{b}4{a}4; " + move.format(out="$0")
        + f"prmt.b32 t, $2, 0, 0x{d}4{c}4; " + move.format(out="$1") + "}"
    )  # fmt: skip


@triton.jit
def round_to_int8(x):
    """The nearest int8, ties to even; x lies within ±127."""
    return ((x + ROUND_TO_INTEGER) - ROUND_TO_INTEGER).to(tl.int8)


@triton.jit
def round_to_fp8(x, FORMAT: tl.constexpr):
    """The nearest fp8 number's byte, ties to even; x lies within the format's largest."""
    MANTISSA: tl.constexpr = mantissa_bits(FORMAT)
    BIAS: tl.constexpr = exponent_bias(FORMAT)
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
