"""Words for products of bytes, four multiply-adds a lane, with 32-bit integers as sums.

A vector of bytes is 64 of them, a vector of sums 16 integers of 32 bits; both are kept, loaded and stored as 16 lanes
of 32 bits. Sums are exact modulo 2^32. One factor's bytes count from 0 to 255, the other's from −128 to 127.

    load_bytes(address)               64 neighbouring bytes, from any address
    multiply_bytes(u, s, c)           c + u₀·s₀ + u₁·s₁ + u₂·s₂ + u₃·s₃
    flip_signs(v)                     signed bytes plus 128, as unsigned ones
    shift_up(v)                       integers times 256
    add_integers(v, w)  subtract_integers(v, w)  to_floats(v)
    power_below(v)                    of floats, positive and normal, the largest powers of two that are no larger;
                                      0 of 0
    sum_integer_rows(tile)            lane i of the result is the sum over the lanes of vector i
    store_high(address, v)  store_low(address, v)          second-lowest and lowest byte of every lane, 16 bytes
    zip_rows_low(a, b)  zip_rows_high(a, b)                within quarters of a vector: a₀ b₀ a₁ b₁ …
    zip_words_low(a, b)  zip_words_high(a, b)              the same of elements of two bytes
    gather_quarters(a, b, c, d, i)    quarter i of each
    store_weights(address, v, n)      integers below 2^16, of n heads by token: for each head four tokens' high bytes,
                                      then for each four tokens' low ones
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from quire.kernels.cpu.simd.pairs import has_pair_products
from quire.kernels.cpu.simd.vectors import LANES, sum_by_pairs, vector, word

_f32, _i8, _i16, _i32 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)
_bytes, _halves = ir.VectorType(_i8, 4 * LANES), ir.VectorType(_i16, 2 * LANES)
_vector, _ints, _sixteen = ir.VectorType(_f32, LANES), ir.VectorType(_i32, LANES), ir.VectorType(_i8, LANES)
QUARTERS = 4  # of a vector, 16 bytes each


@functools.cache
def has_byte_products() -> bool:
    """Whether decode multiplies bytes: measured faster on AMD's CPUs from Zen 4 on, which ``pairs`` describes."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return has_pair_products() and "-avx512vnni" not in features.split(",")


def _word(arity: int, emit: Callable[..., Any]) -> Any:
    """An intrinsic of vectors whose code is ``emit(builder, *llvm_values)``, a vector of any elements."""
    return word(vector, lambda builder, *values: builder.bitcast(emit(builder, *values), _vector), arity)


def _all(element: Any, value: int) -> Any:
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_i32, len(order)), order))


def _pointer(builder: Any, address: Any, type_: Any) -> Any:
    return builder.inttoptr(address, type_.as_pointer())


def _emit_products(builder: Any, unsigned: Any, signed: Any, sums: Any) -> Any:
    if not has_byte_products():
        return sums  # compiled, never run
    signature = ir.FunctionType(_ints, [_ints] * 3)
    products = cgutils.get_or_insert_function(builder.module, signature, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(products, [builder.bitcast(x, _ints) for x in (sums, unsigned, signed)])


multiply_bytes = _word(3, _emit_products)
flip_signs = _word(1, lambda b, v: b.xor(b.bitcast(v, _ints), _all(_i32, 0x80808080)))
shift_up = _word(1, lambda b, v: b.shl(b.bitcast(v, _ints), _all(_i32, 8)))
add_integers = _word(2, lambda b, v, w: b.add(b.bitcast(v, _ints), b.bitcast(w, _ints)))
subtract_integers = _word(2, lambda b, v, w: b.sub(b.bitcast(v, _ints), b.bitcast(w, _ints)))
power_below = _word(1, lambda b, v: b.and_(b.bitcast(v, _ints), _all(_i32, 0x7F800000)))
to_floats = _word(1, lambda b, v: b.sitofp(b.bitcast(v, _ints), _vector))


@intrinsic
def sum_integer_rows(typingctx: Any, registers: Any) -> Any:
    """Lane i of the result is the sum over the lanes of vector i of a 16-vector tile of integers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def add(a: Any, b: Any) -> Any:
            total = builder.add(builder.bitcast(a, _ints), builder.bitcast(b, _ints))
            return builder.bitcast(total, _vector)

        return sum_by_pairs(builder, args[0], add)

    return vector(registers), codegen


@intrinsic
def load_bytes(typingctx: Any, address: Any) -> Any:
    """64 neighbouring bytes: a page's row may begin at any."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.load(_pointer(builder, args[0], _bytes), align=1), _vector)

    return vector(types.int64), codegen


def _store_byte(shift: int) -> Any:
    @intrinsic
    def store_byte(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            moved = builder.lshr(builder.bitcast(args[1], _ints), _all(_i32, shift))
            builder.store(builder.trunc(moved, _sixteen), _pointer(builder, args[0], _sixteen), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, value), codegen

    return store_byte


store_low, store_high = _store_byte(0), _store_byte(8)


def _zipped(size: int, first: int) -> list[int]:
    """a₀ b₀ a₁ b₁ … within each quarter of two vectors of ``size``, from a quarter's element ``first`` on."""
    quarter = size // QUARTERS
    return [
        start + first + i // 2 + i % 2 * size for start in range(0, size, quarter) for i in range(quarter)
    ]


def _zip(type_: Any, size: int, first: int) -> Any:
    def emit(builder: Any, a: Any, b: Any) -> Any:
        return _shuffle(builder, builder.bitcast(a, type_), builder.bitcast(b, type_), _zipped(size, first))

    return _word(2, emit)


zip_rows_low, zip_rows_high = _zip(_bytes, 64, 0), _zip(_bytes, 64, 8)
zip_words_low, zip_words_high = _zip(_halves, 32, 0), _zip(_halves, 32, 4)


@intrinsic(prefer_literal=True)
def gather_quarters(typingctx: Any, a: Any, b: Any, c: Any, d: Any, quarter: Any) -> Any:
    """Quarter i of each of four vectors."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = LANES // QUARTERS
        first = quarter.literal_value * size
        half = [*range(first, first + size), *range(LANES + first, LANES + first + size)]
        ab, cd = _shuffle(builder, args[0], args[1], half), _shuffle(builder, args[2], args[3], half)
        return _shuffle(builder, ab, cd, list(range(LANES)))

    return vector(a, b, c, d, quarter), codegen


@intrinsic(prefer_literal=True)
def store_weights(typingctx: Any, address: Any, weights: Any, heads: Any) -> Any:
    """Integers below 2^16, lane j of head j % heads, as bytes of four tokens: the high ones, then the low ones."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        n = min(heads.literal_value, 4)  # a tile of more is never weighed in bytes
        lanes = [(group * 4 + t) * n + head for group in range(4 // n) for head in range(n) for t in range(4)]
        order = [lane * 4 + byte for byte in (1, 0) for lane in lanes]
        raw = builder.bitcast(args[1], _bytes)
        chosen = _shuffle(builder, raw, raw, order)
        builder.store(chosen, _pointer(builder, args[0], chosen.type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, weights, heads), codegen
