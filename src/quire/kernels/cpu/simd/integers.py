"""Words for products of bytes, four multiply-adds a lane, and of integers of 16 bits ("shorts"), two a lane.

Sums are integers of 32 bits, exact modulo 2^32. A vector of bytes holds 4 · LANES of them, one of shorts 2 · LANES, one
of sums LANES; all are loaded and stored as LANES lanes of 32 bits. One factor's bytes count from 0 to 255, the other's
from −128 to 127; shorts have a sign.

    load_bytes(address)               4 · LANES neighbouring bytes, from any address
    multiply_bytes(u, s, c)           c + u₀·s₀ + u₁·s₁ + u₂·s₂ + u₃·s₃
    flip_signs(v)                     signed bytes plus 128, as unsigned ones
    shift_up(v)                       integers times 256
    add_integers(v, w)  subtract_integers(v, w)  to_floats(v)
    power_below(v)                    of floats, positive and normal, the largest powers of two that are no larger;
                                      0 of 0
    sum_integer_rows(tile)            lane i of the result is the sum over the lanes of vector i
    store_high(address, v)  store_low(address, v)          second-lowest and lowest byte of every lane
    zip_rows_low(a, b)  zip_rows_high(a, b)                within each 16 bytes of a vector: a₀ b₀ a₁ b₁ …
    zip_words_low(a, b)  zip_words_high(a, b)              the same of elements of two bytes
    gather_quarters(a, b, c, d, i)    quarter i of each
    load_shorts(address)              2 · LANES neighbouring bytes with a sign, as shorts
    multiply_shorts(v, w, c)          c + v₀·w₀ + v₁·w₁
    pair_shorts(v, w)                 the low shorts of v's and w's lanes
    store_shorts(address, v)          the low short of every lane, LANES of them
    gather_low_halves(a, b)  gather_high_halves(a, b)      the first halves of both vectors, the second ones
    store_weights(address, v, n)      integers below 2^16, of n heads by token: for each head four tokens' high bytes,
                                      then for each four tokens' low ones
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from quire.kernels.cpu.simd.llvm import (
    LANES,
    assembly_of,
    call,
    every_lane,
    floats,
    i8,
    i16,
    i32,
    ints,
    pointer,
    shuffle,
    vector_of,
)
from quire.kernels.cpu.simd.pairs import has_pair_products
from quire.kernels.cpu.simd.vectors import sum_by_pairs, vector, word

_bytes, _shorts = vector_of(i8, 4 * LANES), vector_of(i16, 2 * LANES)
QUARTERS = 4  # of a vector of 512 bits, 16 bytes each


@functools.cache
def has_byte_products() -> bool:
    """Whether decode multiplies bytes: measured faster on AMD's CPUs from Zen 4 on, which ``pairs`` describes."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return has_pair_products() and "-avx512vnni" not in features.split(",")


@functools.cache
def has_short_products() -> bool:
    """Whether decode multiplies int8 pages as shorts: with AVX2 and no wider registers."""
    eight = "<8 x i32>"
    source = f"define {eight} @add({eight} %x, {eight} %y) {{\n %z = add {eight} %x, %y\n ret {eight} %z\n}}"
    return LANES == 8 and "%ymm" in assembly_of(source)


def _word(arity: int, emit: Callable[..., Any]) -> Any:
    """An intrinsic of vectors whose code is ``emit(builder, *llvm_values)``, a vector of any elements."""
    return word(vector, lambda builder, *values: builder.bitcast(emit(builder, *values), floats), arity)


def _emit_products(builder: Any, unsigned: Any, signed: Any, sums: Any) -> Any:
    operands = [builder.bitcast(x, ints) for x in (sums, unsigned, signed)]
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", ints, operands)


def _emit_short_products(builder: Any, a: Any, b: Any, sums: Any) -> Any:
    operands = [builder.bitcast(x, _shorts) for x in (a, b)]
    return builder.add(call(builder, "llvm.x86.avx2.pmadd.wd", ints, operands), builder.bitcast(sums, ints))


def _emit_pairs_of_shorts(builder: Any, low: Any, high: Any) -> Any:
    low = builder.and_(builder.bitcast(low, ints), every_lane(i32, 0xFFFF))
    return builder.or_(low, builder.shl(builder.bitcast(high, ints), every_lane(i32, 16)))


multiply_bytes = _word(3, _emit_products)
multiply_shorts = _word(3, _emit_short_products)
pair_shorts = _word(2, _emit_pairs_of_shorts)
flip_signs = _word(1, lambda b, v: b.xor(b.bitcast(v, ints), every_lane(i32, 0x80808080)))
shift_up = _word(1, lambda b, v: b.shl(b.bitcast(v, ints), every_lane(i32, 8)))
add_integers = _word(2, lambda b, v, w: b.add(b.bitcast(v, ints), b.bitcast(w, ints)))
subtract_integers = _word(2, lambda b, v, w: b.sub(b.bitcast(v, ints), b.bitcast(w, ints)))
power_below = _word(1, lambda b, v: b.and_(b.bitcast(v, ints), every_lane(i32, 0x7F800000)))
to_floats = _word(1, lambda b, v: b.sitofp(b.bitcast(v, ints), floats))


@intrinsic
def sum_integer_rows(typingctx: Any, registers: Any) -> Any:
    """Lane i of the result is the sum over the lanes of vector i of a tile of LANES vectors of integers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def add(a: Any, b: Any) -> Any:
            total = builder.add(builder.bitcast(a, ints), builder.bitcast(b, ints))
            return builder.bitcast(total, floats)

        return sum_by_pairs(builder, args[0], add)

    return vector(registers), codegen


@intrinsic
def load_bytes(typingctx: Any, address: Any) -> Any:
    """A vector of neighbouring bytes: a page's row may begin at any."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.load(pointer(builder, args[0], _bytes), align=1), floats)

    return vector(types.int64), codegen


@intrinsic
def load_shorts(typingctx: Any, address: Any) -> Any:
    """Neighbouring bytes with a sign, as many as there are shorts in a vector, from any address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = builder.load(pointer(builder, args[0], vector_of(i8, 2 * LANES)), align=1)
        return builder.bitcast(builder.sext(raw, _shorts), floats)

    return vector(types.int64), codegen


def _store_part(element: Any, shift: int) -> Any:
    """Store an integer out of every lane, from bit ``shift`` on."""

    @intrinsic
    def store_part(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            moved = builder.lshr(builder.bitcast(args[1], ints), every_lane(i32, shift))
            parts = vector_of(element)
            builder.store(builder.trunc(moved, parts), pointer(builder, args[0], parts), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, value), codegen

    return store_part


store_low, store_high, store_shorts = _store_part(i8, 0), _store_part(i8, 8), _store_part(i16, 0)


def _zipped_quarters(size: int, first: int) -> list[int]:
    """a₀ b₀ a₁ b₁ … within each 16 bytes of two vectors of ``size``, from element ``first`` of these on."""
    quarter = size * 4 // LANES
    return [
        start + first + i // 2 + i % 2 * size for start in range(0, size, quarter) for i in range(quarter)
    ]


def _zip(type_: Any, size: int, first: int) -> Any:
    def emit(builder: Any, a: Any, b: Any) -> Any:
        return shuffle(
            builder, builder.bitcast(a, type_), builder.bitcast(b, type_), _zipped_quarters(size, first)
        )

    return _word(2, emit)


zip_rows_low, zip_rows_high = _zip(_bytes, 4 * LANES, 0), _zip(_bytes, 4 * LANES, 8)
zip_words_low, zip_words_high = _zip(_shorts, 2 * LANES, 0), _zip(_shorts, 2 * LANES, 4)


def _gather_half(half: int) -> Any:
    order = [start + half * (LANES // 2) + i for start in (0, LANES) for i in range(LANES // 2)]
    return _word(2, lambda builder, a, b: shuffle(builder, a, b, order))


gather_low_halves, gather_high_halves = _gather_half(0), _gather_half(1)


@intrinsic(prefer_literal=True)
def gather_quarters(typingctx: Any, a: Any, b: Any, c: Any, d: Any, quarter: Any) -> Any:
    """Quarter i of each of four vectors."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = LANES // QUARTERS
        first = quarter.literal_value * size
        half = [*range(first, first + size), *range(LANES + first, LANES + first + size)]
        ab, cd = shuffle(builder, args[0], args[1], half), shuffle(builder, args[2], args[3], half)
        return shuffle(builder, ab, cd, list(range(LANES)))

    return vector(a, b, c, d, quarter), codegen


@intrinsic(prefer_literal=True)
def store_weights(typingctx: Any, address: Any, weights: Any, heads: Any) -> Any:
    """Integers below 2^16, lane j of head j % heads, as bytes of four tokens: the high ones, then the low ones."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        n = min(heads.literal_value, 4)  # a tile of more is never weighed in bytes
        lanes = [(group * 4 + t) * n + head for group in range(4 // n) for head in range(n) for t in range(4)]
        order = [lane * 4 + byte for byte in (1, 0) for lane in lanes]
        raw = builder.bitcast(args[1], _bytes)
        chosen = shuffle(builder, raw, raw, order)
        builder.store(chosen, pointer(builder, args[0], chosen.type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, weights, heads), codegen
