"""Words for products of bfloat16 pairs, two multiply-adds a lane, and pages of 8 bits read as such pairs.

A vector of pairs is 16 lanes of two neighbouring bfloat16 numbers each; it is kept, loaded and stored as 16 lanes of
32 bits. Products of bfloat16 numbers are exact in float32, and their sums are float32.

    load_pairs(dtype, address)  load_second_pairs(dtype, address)   32 elements as bfloat16, and the 32 behind them
    load_pair(address)                                    one bfloat16 pair in every lane
    multiply_pairs(a, b, c)                               c + a₀·b₀ + a₁·b₁
    pair_up(v, w)                                         pairs of v's and w's lanes, rounded to nearest even
    zip_pairs_low(a, b)  zip_pairs_high(a, b)             a₀ b₀ a₁ b₁ … of 32 elements each: first and second half
    turn(v, n)                                            lane i of the result is lane i + n of v, around
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

from quire.kernels.cpu.simd.memory import BF16, BYTES, E4M3, E5M2, INT8, narrow
from quire.kernels.cpu.simd.vectors import LANES, vector

PAIRED = 2 * LANES  # elements in a vector of pairs
LINE = 64  # elements of 8 bits that are read at once
EIGHT_BITS = (INT8, E4M3, E5M2)

_f32, _i8, _i16, _i32 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)
_pairs, _line = ir.VectorType(_i16, PAIRED), ir.VectorType(_i8, LINE)
_vector, _ints = ir.VectorType(_f32, LANES), ir.VectorType(_i32, LANES)


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


def _call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    signature = ir.FunctionType(result, [arg.type for arg in args])
    function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
    return builder.call(function, args)


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_i32, len(order)), order))


def _zipped(size: int, first: int) -> list[int]:
    """a₀ b₀ a₁ b₁ … of two vectors of ``size``, from element ``first`` on."""
    return [first + i // 2 + i % 2 * size for i in range(size)]


def _load(builder: Any, address: Any, result: Any, align: int) -> Any:
    return builder.load(builder.inttoptr(address, result.as_pointer()), align=align)


@intrinsic
def load_pair(typingctx: Any, address: Any) -> Any:
    """Two neighbouring bfloat16 elements in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.insert_element(
            ir.Constant(_vector, ir.Undefined), _load(builder, args[0], _f32, 2), _i32(0)
        )
        return _shuffle(builder, pair, pair, [0] * LANES)

    return vector(types.int64), codegen


def _first_of_pairs(builder: Any, pairs: Any) -> Any:
    bits = builder.shl(builder.bitcast(pairs, _ints), ir.Constant(_ints, [16] * LANES))
    return builder.bitcast(bits, _vector)


def _second_of_pairs(builder: Any, pairs: Any) -> Any:
    bits = builder.and_(builder.bitcast(pairs, _ints), ir.Constant(_ints, [0xFFFF0000] * LANES))
    return builder.bitcast(bits, _vector)


@intrinsic
def multiply_pairs(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """c + a₀·b₀ + a₁·b₁, lane by lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, c = args
        if has_pair_products():
            halves = ir.VectorType(_BFloat(), PAIRED)
            a, b = builder.bitcast(a, halves), builder.bitcast(b, halves)
            return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _vector, [c, a, b])
        fma = f"llvm.fmuladd.v{LANES}f32"
        c = _call(builder, fma, _vector, [_first_of_pairs(builder, a), _first_of_pairs(builder, b), c])
        return _call(builder, fma, _vector, [_second_of_pairs(builder, a), _second_of_pairs(builder, b), c])

    return vector(a, b, c), codegen


def _round(builder: Any, values: Any) -> Any:
    """The bits of 16 bfloat16 numbers."""
    if not has_pair_products():
        return narrow(builder, BF16, values)
    rounded = builder.fptrunc(values, ir.VectorType(_BFloat(), LANES))
    return builder.bitcast(rounded, ir.VectorType(_i16, LANES))


@intrinsic
def pair_up(typingctx: Any, even: Any, odd: Any) -> Any:
    """Pairs of two vectors' lanes, rounded to nearest even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b = (_round(builder, x) for x in args)
        return builder.bitcast(
            _shuffle(builder, a, b, [i // 2 + i % 2 * LANES for i in range(PAIRED)]), _vector
        )

    return vector(even, odd), codegen


def _zip(first: int) -> Any:
    @intrinsic
    def zip_half(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, b = (builder.bitcast(x, _pairs) for x in args)
            return builder.bitcast(_shuffle(builder, a, b, _zipped(PAIRED, first)), _vector)

        return vector(a, b), codegen

    return zip_half


zip_pairs_low, zip_pairs_high = _zip(0), _zip(LANES)


@intrinsic(prefer_literal=True)
def turn(typingctx: Any, value: Any, lanes: Any) -> Any:
    """Lane i of the result is lane i + ``lanes`` of the vector, around."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _shuffle(builder, args[0], args[0], [(i + lanes.literal_value) % LANES for i in range(LANES)])

    return vector(value, lanes), codegen


# --- 8 bits as bfloat16 ----------------------------------------------------------------------------------


@functools.cache
def _tables(dtype: int) -> tuple[list[int], list[int]]:
    """The low and the high bytes of bfloat16 for each size that 7 bits can say."""
    sizes = torch.arange(128, dtype=torch.uint8)
    if dtype != INT8:
        sizes = sizes.view({E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}[dtype])
    words = [struct.unpack("<I", struct.pack("<f", size))[0] >> 16 for size in sizes.float().tolist()]
    return [word & 255 for word in words], [word >> 8 for word in words]


def _look_up(builder: Any, table: list[int], index: Any) -> Any:
    halves = [ir.Constant(_line, table[i : i + LINE]) for i in (0, LINE)]
    return _call(builder, "llvm.x86.avx512.vpermi2var.qi.512", _line, [halves[0], index, halves[1]])


def _widen_line(builder: Any, dtype: int, raw: Any, first: int) -> Any:
    """32 of 64 elements of 8 bits: the bytes of their sizes are looked up, the sign is kept."""
    size = raw
    if dtype == INT8:
        size = _call(builder, f"llvm.abs.v{LINE}i8", _line, [raw, ir.IntType(1)(0)])
        size = _call(builder, f"llvm.umin.v{LINE}i8", _line, [size, ir.Constant(_line, [127] * LINE)])
    low, high = (_look_up(builder, table, size) for table in _tables(dtype))
    high = builder.or_(high, builder.and_(raw, ir.Constant(_line, [128] * LINE)))
    return builder.bitcast(_shuffle(builder, low, high, _zipped(LINE, first)), _vector)


def _load_half(first: int) -> Any:
    @intrinsic(prefer_literal=True)
    def load_half(typingctx: Any, dtype: Any, address: Any) -> Any:
        code = dtype.literal_value

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if code == BF16:
                return _load(
                    builder, builder.add(args[1], ir.Constant(args[1].type, first * BYTES[BF16])), _vector, 2
                )
            if code in EIGHT_BITS and has_pair_products():
                return _widen_line(builder, code, _load(builder, args[1], _line, 1), first)
            return ir.Constant(_vector, ir.Undefined)  # compiled, never run

        return vector(dtype, types.int64), codegen

    return load_half


# −128 counts as −127: scales of pages are symmetric, and write_kv never makes it.
load_pairs, load_second_pairs = _load_half(0), _load_half(PAIRED)
