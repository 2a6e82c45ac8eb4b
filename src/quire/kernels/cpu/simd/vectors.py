"""A small SIMD language inside Numba: the words the CPU kernels compute with.

Every word is a Numba intrinsic over LLVM vectors of LANES float32 lanes: 16 with AVX-512, else 8. ``memory`` holds the
words that load and store.

    registers   tile(n): n vectors, read and written as [i]; n is known at compile time
    values      splat(x)
    arithmetic  add  sub  mul  div  fma(a, b, c) = a·b + c  maximum  magnitude  exp2  tanh
    masks       at_least(a, b)  less_than(a, b)  both(m, n)  select(m, a, b) = a where m else b
    across      first_lane(v)  repeat(v, n)  zip_low(a, b)  zip_high(a, b)  fold_sum(v, n)  fold_max(v, n)
                sum_rows(tile)  transpose(tile)  interleave(a, b, c, d, i)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from quire.kernels.cpu.simd.llvm import (
    LANES,
    broadcast,
    call,
    every_lane,
    f32,
    floats,
    i1,
    i32,
    ints,
    shuffle,
    vector_of,
    zipped,
)


class LaneType(types.Type):
    """A vector: "f32" values, or the "mask" of a comparison."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(f"quire_{kind}x{LANES}")


class TileType(types.Type):
    """A tile of vectors that LLVM keeps in registers once its loops are unrolled."""

    def __init__(self, size: int) -> None:
        self.size = size
        super().__init__(f"quire_tile{size}")


vector, mask = LaneType("f32"), LaneType("mask")


@register_model(LaneType)
class _LaneModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: LaneType) -> None:
        super().__init__(manager, fe_type, vector_of(f32 if fe_type.kind == "f32" else i1))


@register_model(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: TileType) -> None:
        super().__init__(manager, fe_type, ir.ArrayType(floats, fe_type.size).as_pointer())


def word(result: Any, emit: Callable[..., Any], arity: int) -> Any:
    """An intrinsic of ``arity`` arguments whose code is ``emit(builder, *llvm_values)``."""

    def typed(*args: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            emitted = emit(builder, *values)
            return context.get_dummy_value() if result is types.void else emitted

        return result(*args), codegen

    # Numba reads the parameters' names off the function, so each arity needs its own.
    forms = {
        1: lambda typingctx, a: typed(a),
        2: lambda typingctx, a, b: typed(a, b),
        3: lambda typingctx, a, b, c: typed(a, b, c),
    }
    return intrinsic(forms[arity])


# --- registers -------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def tile(typingctx: Any, size: Any) -> Any:
    """A register tile of ``size`` vectors, a compile-time number; read and written with ``[i]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        registers = cgutils.alloca_once(builder, ir.ArrayType(floats, size.literal_value))
        registers.align = 64
        return registers

    return TileType(size.literal_value)(size), codegen


@intrinsic
def _read(typingctx: Any, registers: Any, index: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(cgutils.gep_inbounds(builder, args[0], 0, args[1]))

    return vector(registers, index), codegen


@intrinsic
def _write(typingctx: Any, registers: Any, index: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], cgutils.gep_inbounds(builder, args[0], 0, args[1]))
        return context.get_dummy_value()

    return types.void(registers, index, value), codegen


@overload(operator.getitem)
def _tile_getitem(registers, index):  # type: ignore[no-untyped-def]  # Numba compares this signature with the next
    if isinstance(registers, TileType):
        return lambda registers, index: _read(registers, index)
    return None


@overload(operator.setitem)
def _tile_setitem(registers, index, value):  # type: ignore[no-untyped-def]
    if isinstance(registers, TileType):
        return lambda registers, index, value: _write(registers, index, value)
    return None


# --- arithmetic ------------------------------------------------------------------------------------------


def _emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """One rounding where the CPU can; where it cannot, two, rather than a library's exact but endless code."""
    return call(builder, f"llvm.fmuladd.v{LANES}f32", floats, [a, b, c])


def _emit_maximum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _emit_magnitude(builder: Any, x: Any) -> Any:
    return call(builder, f"llvm.fabs.v{LANES}f32", floats, [x])


# 2^f on [−1/2, 1/2]: our own fit of degree 6 with constant 1, relative error 2e-9 before rounding.
_EXP2_COEFFICIENTS = (
    1.53533591e-4, 1.33988754e-3, 9.61843738e-3, 5.55033247e-2, 2.40226479e-1, 6.93147203e-1, 1.0,
)  # fmt: skip
_ROUND = 12582912.0  # 1.5·2^23: adding it leaves a number rounded to an integer in the low bits


def _emit_exp2(builder: Any, x: Any) -> Any:
    """2^x for x ≤ 0, zero below 2^−126, NaN for NaN: x = n + f, 2^x = 2^n · p(f)."""
    shifted = builder.fadd(x, every_lane(f32, _ROUND + 127.0))
    fraction = builder.fsub(x, builder.fsub(shifted, every_lane(f32, _ROUND + 127.0)))
    power = every_lane(f32, _EXP2_COEFFICIENTS[0])
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        power = _emit_fma(builder, power, fraction, every_lane(f32, coefficient))
    exponent = builder.shl(builder.bitcast(shifted, ints), every_lane(i32, 23))
    scaled = builder.fmul(power, builder.bitcast(exponent, floats))
    underflows = builder.fcmp_ordered("<", x, every_lane(f32, -126.0))
    return builder.select(underflows, every_lane(f32, 0.0), scaled)


# tanh on [0, 0.55] as x·p(x²): our own fit, where (1 − e)/(1 + e) would cancel.
_TANH_COEFFICIENTS = (
    -0.00619869165, 0.0210205356, -0.0538405152, 0.133324805, -0.333333147, 1.0,
)  # fmt: skip
_TANH_SMALL = 0.55
_TWO_LOG2_E = 2.8853900817779268


def _emit_tanh(builder: Any, x: Any) -> Any:
    """tanh |x| = (1 − e)/(1 + e) with e = 2^(−2·log2(e)·|x|), or a polynomial near zero, with the sign of x."""
    size = _emit_magnitude(builder, x)
    decay = _emit_exp2(builder, builder.fmul(size, every_lane(f32, -_TWO_LOG2_E)))
    one = every_lane(f32, 1.0)
    far = builder.fdiv(builder.fsub(one, decay), builder.fadd(one, decay))
    square = builder.fmul(x, x)
    near = every_lane(f32, _TANH_COEFFICIENTS[0])
    for coefficient in _TANH_COEFFICIENTS[1:]:
        near = _emit_fma(builder, near, square, every_lane(f32, coefficient))
    near = builder.fmul(near, size)
    result = builder.select(builder.fcmp_ordered("<", size, every_lane(f32, _TANH_SMALL)), near, far)
    return call(builder, f"llvm.copysign.v{LANES}f32", floats, [result, x])


splat = word(vector, broadcast, 1)
add = word(vector, lambda b, x, y: b.fadd(x, y), 2)
sub = word(vector, lambda b, x, y: b.fsub(x, y), 2)
mul = word(vector, lambda b, x, y: b.fmul(x, y), 2)
div = word(vector, lambda b, x, y: b.fdiv(x, y), 2)
fma = word(vector, _emit_fma, 3)
maximum = word(vector, _emit_maximum, 2)
magnitude = word(vector, _emit_magnitude, 1)
exp2 = word(vector, _emit_exp2, 1)
tanh = word(vector, _emit_tanh, 1)
at_least = word(mask, lambda b, x, y: b.fcmp_ordered(">=", x, y), 2)
less_than = word(mask, lambda b, x, y: b.fcmp_ordered("<", x, y), 2)
both = word(mask, lambda b, x, y: b.and_(x, y), 2)
select = word(vector, lambda b, m, x, y: b.select(m, x, y), 3)


# --- across lanes ----------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def repeat(typingctx: Any, value: Any, times: Any) -> Any:
    """Each of the first lanes ``times`` times (a power of two): lane i of the result is lane i // times."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return shuffle(builder, args[0], args[0], [i // times.literal_value for i in range(LANES)])

    return vector(value, times), codegen


def _fold(combine: Callable[..., Any]) -> Any:
    @intrinsic(prefer_literal=True)
    def fold(typingctx: Any, value: Any, period: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            folded, step = args[0], period.literal_value
            while step < LANES:
                turned = shuffle(builder, folded, folded, [(i + step) % LANES for i in range(LANES)])
                folded, step = combine(builder, folded, turned), 2 * step
            return folded

        return vector(value, period), codegen

    return fold


# a0 b0 a1 b1 …, its first and its second half.
zip_low = word(vector, lambda builder, a, b: shuffle(builder, a, b, zipped(LANES, 0)), 2)
zip_high = word(vector, lambda builder, a, b: shuffle(builder, a, b, zipped(LANES, LANES // 2)), 2)

first_lane = word(types.float32, lambda builder, v: builder.extract_element(v, i32(0)), 1)

# Combine the lanes that are equal modulo a period (a power of two), leaving the result in each of them.
fold_sum = _fold(lambda builder, a, b: builder.fadd(a, b))
fold_max = _fold(_emit_maximum)


@intrinsic(prefer_literal=True)
def interleave(typingctx: Any, a: Any, b: Any, c: Any, d: Any, number: Any) -> Any:
    """Quarter ``number`` of four vectors of int64, element by element in turn: a₀ b₀ c₀ d₀ a₁ …."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, each = LANES // 2, LANES // 8  # elements in a vector, and of each vector in the result
        wide = [builder.bitcast(x, ir.VectorType(ir.IntType(64), size)) for x in args[:4]]
        taken = range(number.literal_value * each, (number.literal_value + 1) * each)
        order = [first + i for i in taken for first in (0, size)]
        ab = shuffle(builder, wide[0], wide[1], order)
        cd = shuffle(builder, wide[2], wide[3], order)
        turns = [first + 2 * i + j for i in range(each) for first in (0, 2 * each) for j in range(2)]
        return builder.bitcast(shuffle(builder, ab, cd, turns), floats)

    return vector(a, b, c, d, number), codegen


def sum_by_pairs(builder: Any, registers: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """The code of ``sum_rows``: a tree of LANES − 1 pairwise steps, each halving the vectors.

    After a step with distance d, lane j of pair (a, b) holds part of a's sum if bit d of j is clear, of b's if it is
    set; rows are paired so that row i's sum ends in lane i. Of the two addends one stays in its lanes, which a CPU
    blends at half the price of moving lanes.
    """
    rows = [builder.load(cgutils.gep_inbounds(builder, registers, 0, i)) for i in range(LANES)]
    distance = LANES // 2
    while distance:
        half = len(rows) // 2
        stay = [i if not i & distance else LANES + i for i in range(LANES)]
        move = [i + distance if not i & distance else LANES + i - distance for i in range(LANES)]
        rows = [
            combine(shuffle(builder, a, b, stay), shuffle(builder, a, b, move))
            for a, b in zip(rows[:half], rows[half:], strict=True)
        ]
        distance //= 2
    return rows[0]


@intrinsic
def sum_rows(typingctx: Any, registers: Any) -> Any:
    """Lane i of the result is the sum over the lanes of vector i of a tile of LANES vectors.

    Cheaper than as many separate reductions.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return sum_by_pairs(builder, args[0], builder.fadd)

    return vector(registers), codegen


@intrinsic
def transpose(typingctx: Any, registers: Any) -> Any:
    """Exchange lane i of vector j with lane j of vector i in a tile of LANES vectors, by halves, quarters, …."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        places = [cgutils.gep_inbounds(builder, args[0], 0, i) for i in range(LANES)]
        rows = [builder.load(place) for place in places]
        distance = LANES // 2
        while distance:
            low = [i if not i & distance else LANES + i - distance for i in range(LANES)]
            high = [i + distance if not i & distance else LANES + i for i in range(LANES)]
            for i in range(LANES):
                if not i & distance:
                    a, b = rows[i], rows[i + distance]
                    rows[i], rows[i + distance] = shuffle(builder, a, b, low), shuffle(builder, a, b, high)
            distance //= 2
        for row, place in zip(rows, places, strict=True):
            builder.store(row, place)
        return context.get_dummy_value()

    return types.void(registers), codegen
