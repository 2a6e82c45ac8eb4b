"""The words that load and store: every dtype of a page, to and from float32 lanes.

Memory is addressed by plain byte addresses (``tensor.data_ptr()`` plus offsets), because a page may lie
anywhere; callers guarantee that they are valid. ``dtype`` is one of the codes below, known at compile time.

    load(dtype, address)  load_head(dtype, address, n)          LANES elements, or the first n and zeros
    load_even(address)  load_odd(address)                       of 2 · LANES bfloat16 elements
    store(dtype, address, v)  store_head(dtype, address, v, n)  rounded to nearest even
    load_f32  load_i32  load_i64  load_u8  store_f32  store_i64  one element
    store_steps(address, first, step)                           LANES int64: first, first + step, …
    prefetch(address)                                           of a cache line

``load_head`` never reads behind the n-th element: that may be another tensor's memory, or NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quire.kernels.compile import load_i32 as load_i32
from quire.kernels.compile import load_i64 as load_i64
from quire.kernels.compile import scalar_load
from quire.kernels.cpu.simd.llvm import (
    LANES,
    assembly_of,
    broadcast,
    call,
    every_lane,
    f16,
    f32,
    floats,
    i8,
    i16,
    i32,
    i64,
    ints,
    pointer,
    vector_of,
)
from quire.kernels.cpu.simd.vectors import vector

F32, F16, BF16, INT8, E4M3, E5M2 = range(6)
BYTES = (4, 2, 2, 1, 1, 1)

_ELEMENT = {F32: f32, F16: f16, BF16: i16, INT8: i8, E4M3: i8, E5M2: i8}


# --- conversions: raw elements ↔ float32 -----------------------------------------------------------------


def _widen(builder: Any, dtype: int, raw: Any) -> Any:
    """Raw elements as float32."""
    if dtype == F32:
        return raw
    if dtype == F16:
        return _widen_half(builder, raw)
    if dtype == BF16:  # the upper half of a float32
        bits = builder.shl(builder.zext(raw, ints), every_lane(i32, 16))
        return builder.bitcast(bits, floats)
    if dtype == INT8:
        return builder.sitofp(builder.sext(raw, ints), floats)
    if dtype == E5M2:  # the upper byte of a float16
        half = builder.shl(builder.zext(raw, vector_of(i16)), every_lane(i16, 8))
        return _widen_half(builder, builder.bitcast(half, vector_of(f16)))
    # E4M3: its bits after the sign, read as a float16's, are the value times 2^−8 (biases 7 and 15).
    # The one NaN (all ones) needs no care: write_kv never makes it from a finite value.
    wide = builder.zext(raw, vector_of(i16))
    sign = builder.shl(builder.and_(wide, every_lane(i16, 0x80)), every_lane(i16, 8))
    rest = builder.shl(builder.and_(wide, every_lane(i16, 0x7F)), every_lane(i16, 7))
    half = builder.bitcast(builder.or_(sign, rest), vector_of(f16))
    return builder.fmul(_widen_half(builder, half), every_lane(f32, 256.0))


def narrow(builder: Any, dtype: int, values: Any) -> Any:
    """float32 lanes as raw elements, rounded to nearest even. NaN becomes NaN, or 0 of int8."""
    if dtype == F32:
        return values
    if dtype == F16:
        return _narrow_to_half(builder, values)
    if dtype == INT8:  # adding 1.5·2^23 leaves a small number, rounded by the addition, in the low bits
        shifted = builder.bitcast(builder.fadd(values, every_lane(f32, 12582912.0)), ints)
        number = builder.select(_is_nan(builder, values), every_lane(i32, 0), shifted)
        return builder.trunc(number, vector_of(i8))
    if dtype == BF16:
        bits = builder.bitcast(values, ints)
        odd = builder.and_(builder.lshr(bits, every_lane(i32, 16)), every_lane(i32, 1))
        rounded = builder.add(builder.add(bits, every_lane(i32, 0x7FFF)), odd)
        quiet = builder.or_(bits, every_lane(i32, 0x400000))
        kept = builder.select(_is_nan(builder, values), quiet, rounded)
        return builder.trunc(builder.lshr(kept, every_lane(i32, 16)), vector_of(i16))
    rounded = _narrow_float(builder, values, *_FP8_FORMAT[dtype])
    number = builder.select(_is_nan(builder, values), every_lane(i32, 0x7F), rounded)
    return builder.trunc(number, vector_of(i8))


def _is_nan(builder: Any, values: Any) -> Any:
    return builder.fcmp_unordered("uno", values, values)


_FP8_FORMAT = {E4M3: (8, 3, 7), E5M2: (8, 2, 15)}  # bits in all, bits of mantissa, exponent bias
_HALF_FORMAT = (16, 10, 15)


def _narrow_float(builder: Any, values: Any, width: int, mantissa: int, bias: int) -> Any:
    """The bits of a smaller format, in its range, rounded to nearest even; beyond it the bits mean nothing.

    A normal number keeps its upper bits once its exponent is rebased. For a subnormal one, adding
    2^23 smallest steps leaves the number of steps in the low bits, rounded by the addition itself.
    """
    bits = builder.bitcast(values, ints)
    sign = builder.and_(builder.lshr(bits, every_lane(i32, 32 - width)), every_lane(i32, 1 << (width - 1)))
    size = builder.and_(bits, every_lane(i32, 0x7FFFFFFF))
    dropped = 23 - mantissa
    odd = builder.and_(builder.lshr(size, every_lane(i32, dropped)), every_lane(i32, 1))
    rounding = builder.add(odd, every_lane(i32, (1 << (dropped - 1)) - 1))
    rebased = builder.sub(builder.add(size, rounding), every_lane(i32, (127 - bias) << 23))
    normal = builder.lshr(rebased, every_lane(i32, dropped))
    steps = every_lane(f32, 2.0 ** (24 - bias - mantissa))
    shifted = builder.fadd(builder.bitcast(size, floats), steps)
    subnormal = builder.and_(builder.bitcast(shifted, ints), every_lane(i32, 0x7FFFFF))
    is_normal = builder.icmp_unsigned(">=", size, every_lane(i32, (128 - bias) << 23))
    return builder.or_(sign, builder.select(is_normal, normal, subnormal))


# --- float16 on every CPU --------------------------------------------------------------------------------


@functools.cache
def _converts_halves() -> bool:
    """Whether the CPU that Numba compiles for converts float16 by an instruction.

    Where it does not (x86 without F16C), LLVM calls a library function that no process need have loaded.
    """
    widen = "define float @widen(half %x) {\n %y = fpext half %x to float\n ret float %y\n}"
    return "__extendhfsf2" not in assembly_of(widen)


def _widen_half(builder: Any, half: Any) -> Any:
    """float16 lanes as float32."""
    if _converts_halves():
        return builder.fpext(half, floats)
    bits = builder.zext(builder.bitcast(half, vector_of(i16)), ints)
    sign = builder.shl(builder.and_(bits, every_lane(i32, 0x8000)), every_lane(i32, 16))
    size = builder.and_(bits, every_lane(i32, 0x7FFF))
    rebase = every_lane(i32, (127 - 15) << 23)
    normal = builder.add(builder.shl(size, every_lane(i32, 13)), rebase)
    largest_exponent = builder.icmp_unsigned(">=", size, every_lane(i32, 0x7C00))  # infinity or NaN
    normal = builder.select(largest_exponent, builder.add(normal, rebase), normal)
    subnormal = builder.fmul(builder.sitofp(size, floats), every_lane(f32, 2.0**-24))
    is_normal = builder.icmp_unsigned(">=", size, every_lane(i32, 0x400))
    size = builder.select(is_normal, normal, builder.bitcast(subnormal, ints))
    return builder.bitcast(builder.or_(sign, size), floats)


def _narrow_to_half(builder: Any, values: Any) -> Any:
    """float32 lanes as float16, rounded to nearest even; too large a number becomes infinite."""
    if _converts_halves():
        return builder.fptrunc(values, vector_of(f16))
    size = call(builder, f"llvm.fabs.v{LANES}f32", floats, [values])
    beyond = builder.select(_is_nan(builder, values), every_lane(i32, 0x7E00), every_lane(i32, 0x7C00))
    sign = builder.and_(
        builder.lshr(builder.bitcast(values, ints), every_lane(i32, 16)), every_lane(i32, 0x8000)
    )
    fits = builder.fcmp_ordered("<", size, every_lane(f32, 65520.0))
    narrow = _narrow_float(builder, values, *_HALF_FORMAT)
    bits = builder.select(fits, narrow, builder.or_(sign, beyond))
    return builder.bitcast(builder.trunc(bits, vector_of(i16)), vector_of(f16))


# --- vectors ---------------------------------------------------------------------------------------------


def _first_lanes(builder: Any, count: Any) -> Any:
    """A mask of the first ``count`` lanes."""
    limit = broadcast(builder, builder.trunc(count, i32))
    return builder.icmp_signed("<", ir.Constant(ints, list(range(LANES))), limit)


@intrinsic(prefer_literal=True)
def load(typingctx: Any, dtype: Any, address: Any) -> Any:
    """Neighbouring elements as float32 lanes."""
    code = dtype.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = builder.load(pointer(builder, args[1], vector_of(_ELEMENT[code])), align=BYTES[code])
        return _widen(builder, code, raw)

    return vector(dtype, types.int64), codegen


def _half_of_pairs(emit: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def load_half(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pairs = builder.load(pointer(builder, args[0], ints), align=BYTES[BF16])
            return builder.bitcast(emit(builder, pairs), floats)

        return vector(types.int64), codegen

    return load_half


# The even and the odd ones of neighbouring bfloat16 numbers; a float32 begins with the bits of a bfloat16.
load_even = _half_of_pairs(lambda builder, pairs: builder.shl(pairs, every_lane(i32, 16)))
load_odd = _half_of_pairs(lambda builder, pairs: builder.and_(pairs, every_lane(i32, 0xFFFF0000)))


@intrinsic(prefer_literal=True)
def load_head(typingctx: Any, dtype: Any, address: Any, count: Any) -> Any:
    """The first ``count`` of LANES elements as float32 lanes, the others zero and not read."""
    code = dtype.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # LLVM has masked loads of whole numbers for every target; a float16 travels as its bits.
        element = {f16: i16}.get(_ELEMENT[code], _ELEMENT[code])
        row = pointer(builder, args[1], vector_of(element))
        name = f"llvm.masked.load.v{LANES}{'f32' if element is f32 else f'i{element.width}'}.p0"
        keep = _first_lanes(builder, args[2])
        operands = [row, i32(BYTES[code]), keep, every_lane(element, 0)]
        raw = call(builder, name, vector_of(element), operands)
        return _widen(builder, code, builder.bitcast(raw, vector_of(_ELEMENT[code])))

    return vector(dtype, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def store(typingctx: Any, dtype: Any, address: Any, values: Any) -> Any:
    """Write all lanes to neighbouring elements."""
    code = dtype.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = narrow(builder, code, args[2])
        builder.store(raw, pointer(builder, args[1], raw.type), align=BYTES[code])
        return context.get_dummy_value()

    return types.void(dtype, types.int64, values), codegen


@intrinsic(prefer_literal=True)
def store_head(typingctx: Any, dtype: Any, address: Any, values: Any, count: Any) -> Any:
    """Write the first ``count`` lanes."""
    code = dtype.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = narrow(builder, code, args[2])
        spill = cgutils.alloca_once(builder, raw.type)
        builder.store(raw, spill)
        with cgutils.for_range(builder, args[3], intp=i64) as loop:
            element = builder.load(
                cgutils.gep_inbounds(
                    builder,
                    builder.bitcast(spill, ir.ArrayType(_ELEMENT[code], LANES).as_pointer()),
                    0,
                    loop.index,
                )
            )
            offset = builder.mul(loop.index, i64(BYTES[code]))
            builder.store(
                element, pointer(builder, builder.add(args[1], offset), _ELEMENT[code]), align=BYTES[code]
            )
        return context.get_dummy_value()

    return types.void(dtype, types.int64, values, types.int64), codegen


# --- single elements -------------------------------------------------------------------------------------


def _scalar_store(element: Any, accepted: Any) -> Any:
    @intrinsic
    def store_one(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], pointer(builder, args[0], element))
            return context.get_dummy_value()

        return types.void(types.int64, accepted), codegen

    return store_one


load_f32 = scalar_load(f32, types.float32)
load_u8 = scalar_load(i8, types.int64, lambda builder, value: builder.zext(value, i64))
store_f32 = _scalar_store(f32, types.float32)
store_i64 = _scalar_store(i64, types.int64)


@intrinsic
def store_steps(typingctx: Any, address: Any, first: Any, step: Any) -> Any:
    """Write LANES neighbouring int64: first, first + step, first + 2 · step, …."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start, apart = (broadcast(builder, number) for number in args[1:])
        numbers = ir.Constant(vector_of(i64), list(range(LANES)))
        steps = builder.add(start, builder.mul(apart, numbers))
        builder.store(steps, pointer(builder, args[0], steps.type), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Prefetch the cache line at an address into the second level; an invalid address does no harm.

    The first level has few buffers: on Zen 4 a core then reads 12 GB/s, and 28 GB/s through the second.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = pointer(builder, args[0], i8)
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [line, i32(0), i32(2), i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
