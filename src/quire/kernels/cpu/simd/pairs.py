"""Words for products of bfloat16 pairs, two multiply-adds a lane, and pages of 8 bits read as such pairs.

A vector of pairs is 16 lanes of two neighbouring bfloat16 numbers each; it is loaded and stored as 16 lanes of
32 bits. Products of bfloat16 numbers are exact in float32, and their sums are float32.

    load_pairs(dtype, address)  load_second_pairs(dtype, address)   32 elements as bfloat16, and the 32 behind them
    load_pair(address)                                    one bfloat16 pair in every lane
    multiply_pairs(a, b, c)                               c + a₀·b₀ + a₁·b₁
    pair_up(v, w)                                         pairs of v's and w's lanes, rounded to nearest even
    zip_pairs_low(a, b)  zip_pairs_high(a, b)             a₀ b₀ a₁ b₁ … of 32 elements each: first and second half
    rotate(v, n)                                          lane i of the result is lane i + n of v, around
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from quire.kernels.cpu.simd.llvm import (
    LANES,
    broadcast,
    call,
    every_lane,
    f32,
    floats,
    i1,
    i8,
    i16,
    i64,
    pointer,
    shuffle,
    vector_of,
    zipped,
)
from quire.kernels.cpu.simd.memory import BF16, BYTES, E4M3, E5M2, INT8
from quire.kernels.cpu.simd.vectors import vector

PAIRED = 2 * LANES  # elements in a vector of pairs
LINE = 64  # elements of 8 bits that are read at once
EIGHT_BITS = (INT8, E4M3, E5M2)

_pairs, _line = vector_of(i16, PAIRED), vector_of(i8, LINE)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@functools.cache
def has_pair_products() -> bool:
    """Whether the CPU that Numba compiles for multiplies pairs as fast as single numbers: AMD's from Zen 4 on.

    Intel's with AMX have the instruction too, at the price of four multiply-adds.
    """
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    return cpu in ("znver4", "znver5") and not {"-avx512bf16", "-avx512vbmi"} & set(features.split(","))


def _load(builder: Any, address: Any, result: Any, align: int) -> Any:
    return builder.load(pointer(builder, address, result), align=align)


@intrinsic
def load_pair(typingctx: Any, address: Any) -> Any:
    """Two neighbouring bfloat16 elements in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return broadcast(builder, _load(builder, args[0], f32, 2))

    return vector(types.int64), codegen


@intrinsic
def multiply_pairs(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """c + a₀·b₀ + a₁·b₁, lane by lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        halves = vector_of(_BFloat(), PAIRED)
        a, b = (builder.bitcast(x, halves) for x in args[:2])
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", floats, [args[2], a, b])

    return vector(a, b, c), codegen


def _round(builder: Any, values: Any) -> Any:
    """The bits of 16 bfloat16 numbers."""
    rounded = builder.fptrunc(values, vector_of(_BFloat()))
    return builder.bitcast(rounded, vector_of(i16))


@intrinsic
def pair_up(typingctx: Any, even: Any, odd: Any) -> Any:
    """Pairs of two vectors' lanes, rounded to nearest even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b = (_round(builder, x) for x in args)
        order = [i // 2 + i % 2 * LANES for i in range(PAIRED)]
        return builder.bitcast(shuffle(builder, a, b, order), floats)

    return vector(even, odd), codegen


def _zip(first: int) -> Any:
    @intrinsic
    def zip_half(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, b = (builder.bitcast(x, _pairs) for x in args)
            return builder.bitcast(shuffle(builder, a, b, zipped(PAIRED, first)), floats)

        return vector(a, b), codegen

    return zip_half


zip_pairs_low, zip_pairs_high = _zip(0), _zip(LANES)


@intrinsic(prefer_literal=True)
def rotate(typingctx: Any, value: Any, lanes: Any) -> Any:
    """Lane i of the result is lane i + ``lanes`` of the vector, around."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return shuffle(builder, args[0], args[0], [(i + lanes.literal_value) % LANES for i in range(LANES)])

    return vector(value, lanes), codegen


# --- 8 bits as bfloat16 ----------------------------------------------------------------------------------


@functools.cache
def _tables(dtype: int) -> tuple[list[int], list[int]]:
    """The low and the high bytes of bfloat16 for each size that 7 bits can say."""
    sizes = torch.arange(128, dtype=torch.uint8, device="cpu")
    if dtype != INT8:
        sizes = sizes.view({E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}[dtype])
    words = [struct.unpack("<I", struct.pack("<f", size))[0] >> 16 for size in sizes.float().tolist()]
    return [word & 255 for word in words], [word >> 8 for word in words]


def _look_up(builder: Any, table: list[int], index: Any) -> Any:
    halves = [ir.Constant(_line, table[i : i + LINE]) for i in (0, LINE)]
    return call(builder, "llvm.x86.avx512.vpermi2var.qi.512", _line, [halves[0], index, halves[1]])


def _widen_line(builder: Any, dtype: int, raw: Any, first: int) -> Any:
    """32 of 64 elements of 8 bits: the bytes of their sizes are looked up, the sign is kept."""
    size = raw
    if dtype == INT8:
        size = call(builder, f"llvm.abs.v{LINE}i8", _line, [raw, i1(0)])
        size = call(builder, f"llvm.umin.v{LINE}i8", _line, [size, every_lane(i8, 127, LINE)])
    low, high = (_look_up(builder, table, size) for table in _tables(dtype))
    high = builder.or_(high, builder.and_(raw, every_lane(i8, 128, LINE)))
    return builder.bitcast(shuffle(builder, low, high, zipped(LINE, first)), floats)


def _load_half(first: int) -> Any:
    @intrinsic(prefer_literal=True)
    def load_half(typingctx: Any, dtype: Any, address: Any) -> Any:
        code = dtype.literal_value

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if code == BF16:
                return _load(builder, builder.add(args[1], i64(first * BYTES[BF16])), floats, 2)
            return _widen_line(builder, code, _load(builder, args[1], _line, 1), first)

        return vector(dtype, types.int64), codegen

    return load_half


# −128 counts as −127: scales of pages are symmetric, and write_kv never makes it.
load_pairs, load_second_pairs = _load_half(0), _load_half(PAIRED)
