"""The words that load and store: every dtype of a page, to and from 16 float32 lanes.

Memory is addressed by plain byte addresses (``tensor.data_ptr()`` plus offsets), because a page may lie
anywhere; callers guarantee that they are valid. ``dtype`` is one of the codes below, known at compile time.

    load(dtype, address)  load_head(dtype, address, n)          16 elements, or the first n and zeros
    load_even(address)  load_odd(address)                       of 32 bfloat16 elements
    store(dtype, address, v)  store_head(dtype, address, v, n)  rounded to nearest even
    load_f32  load_i32  load_i64  load_u8  store_f32  store_i64  one element
    store_steps(address, first, step)                           16 int64: first, first + step, …
    prefetch(address)                                           ask for the cache line

``load_head`` never touches what lies behind the n-th element: it may belong to someone else, and be NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from quire.kernels.compile import load_i32 as load_i32
from quire.kernels.compile import load_i64 as load_i64
from quire.kernels.compile import scalar_load
from quire.kernels.cpu.simd.vectors import LANES, vector

F32, F16, BF16, INT8, E4M3, E5M2 = range(6)
BYTES = (4, 2, 2, 1, 1, 1)

_f32, _f16 = ir.FloatType(), ir.HalfType()
_i1, _i8, _i16, _i32, _i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_ELEMENT = {F32: _f32, F16: _f16, BF16: _i16, INT8: _i8, E4M3: _i8, E5M2: _i8}


def _vector(element: Any) -> Any:
    return ir.VectorType(element, LANES)


def _all(element: Any, value: Any) -> Any:
    return ir.Constant(_vector(element), [value] * LANES)


def _pointer(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, element.as_pointer())


def _declare(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


# --- conversions: raw elements ↔ float32 -----------------------------------------------------------------


def _widen(builder: Any, dtype: int, raw: Any) -> Any:
    """16 raw elements as float32."""
    if dtype == F32:
        return raw
    if dtype == F16:
        return _widen_half(builder, raw)
    if dtype == BF16:  # the upper half of a float32
        bits = builder.shl(builder.zext(raw, _vector(_i32)), _all(_i32, 16))
        return builder.bitcast(bits, _vector(_f32))
    if dtype == INT8:
        return builder.sitofp(builder.sext(raw, _vector(_i32)), _vector(_f32))
    if dtype == E5M2:  # the upper byte of a float16
        half = builder.shl(builder.zext(raw, _vector(_i16)), _all(_i16, 8))
        return _widen_half(builder, builder.bitcast(half, _vector(_f16)))
    # E4M3: its bits after the sign, read as a float16's, are the value times 2^−8 (biases 7 and 15).
    # The one NaN (all ones) needs no care: write_kv never makes it from a finite value.
    wide = builder.zext(raw, _vector(_i16))
    sign = builder.shl(builder.and_(wide, _all(_i16, 0x80)), _all(_i16, 8))
    rest = builder.shl(builder.and_(wide, _all(_i16, 0x7F)), _all(_i16, 7))
    half = builder.bitcast(builder.or_(sign, rest), _vector(_f16))
    return builder.fmul(_widen_half(builder, half), _all(_f32, 256.0))


def narrow(builder: Any, dtype: int, values: Any) -> Any:
    """float32 lanes as raw elements, rounded to nearest even."""
    if dtype == F32:
        return values
    if dtype == F16:
        return _narrow_to_half(builder, values)
    if dtype == INT8:  # adding 1.5·2^23 leaves a small number, rounded by the addition, in the low bits
        shifted = builder.fadd(values, _all(_f32, 12582912.0))
        return builder.trunc(builder.bitcast(shifted, _vector(_i32)), _vector(_i8))
    if dtype == BF16:
        bits = builder.bitcast(values, _vector(_i32))
        odd = builder.and_(builder.lshr(bits, _all(_i32, 16)), _all(_i32, 1))
        rounded = builder.add(builder.add(bits, _all(_i32, 0x7FFF)), odd)
        is_nan = builder.fcmp_unordered("uno", values, values)
        quiet = builder.or_(bits, _all(_i32, 0x400000))
        return builder.trunc(
            builder.lshr(builder.select(is_nan, quiet, rounded), _all(_i32, 16)), _vector(_i16)
        )
    return builder.trunc(_narrow_float(builder, values, *_FP8_FORMAT[dtype]), _vector(_i8))


_FP8_FORMAT = {E4M3: (8, 3, 7), E5M2: (8, 2, 15)}  # bits in all, bits of mantissa, exponent bias
_HALF_FORMAT = (16, 10, 15)


def _narrow_float(builder: Any, values: Any, width: int, mantissa: int, bias: int) -> Any:
    """The bits of a smaller format, in its range, rounded to nearest even; beyond it the bits mean nothing.

    A normal number keeps its upper bits once its exponent is rebased. For a subnormal one, adding
    2^23 smallest steps leaves the number of steps in the low bits, rounded by the addition itself.
    """
    bits = builder.bitcast(values, _vector(_i32))
    sign = builder.and_(builder.lshr(bits, _all(_i32, 32 - width)), _all(_i32, 1 << (width - 1)))
    size = builder.and_(bits, _all(_i32, 0x7FFFFFFF))
    dropped = 23 - mantissa
    odd = builder.and_(builder.lshr(size, _all(_i32, dropped)), _all(_i32, 1))
    rounding = builder.add(odd, _all(_i32, (1 << (dropped - 1)) - 1))
    rebased = builder.sub(builder.add(size, rounding), _all(_i32, (127 - bias) << 23))
    normal = builder.lshr(rebased, _all(_i32, dropped))
    steps = _all(_f32, 2.0 ** (24 - bias - mantissa))
    shifted = builder.fadd(builder.bitcast(size, _vector(_f32)), steps)
    subnormal = builder.and_(builder.bitcast(shifted, _vector(_i32)), _all(_i32, 0x7FFFFF))
    is_normal = builder.icmp_unsigned(">=", size, _all(_i32, (128 - bias) << 23))
    return builder.or_(sign, builder.select(is_normal, normal, subnormal))


# --- float16 on every CPU --------------------------------------------------------------------------------


@functools.cache
def _converts_halves() -> bool:
    """Whether the CPU that Numba compiles for converts float16 by an instruction.

    Where it does not (x86 without F16C), LLVM calls a library function that no process need have loaded.
    """
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    probe = "define float @widen(half %x) {\n %y = fpext half %x to float\n ret float %y\n}"
    return "__extendhfsf2" not in machine.emit_assembly(llvm.parse_assembly(probe))


def _widen_half(builder: Any, half: Any) -> Any:
    """float16 lanes as float32."""
    if _converts_halves():
        return builder.fpext(half, _vector(_f32))
    bits = builder.zext(builder.bitcast(half, _vector(_i16)), _vector(_i32))
    sign = builder.shl(builder.and_(bits, _all(_i32, 0x8000)), _all(_i32, 16))
    size = builder.and_(bits, _all(_i32, 0x7FFF))
    rebase = _all(_i32, (127 - 15) << 23)
    normal = builder.add(builder.shl(size, _all(_i32, 13)), rebase)
    strange = builder.icmp_unsigned(">=", size, _all(_i32, 0x7C00))  # infinity or NaN: the largest exponent
    normal = builder.select(strange, builder.add(normal, rebase), normal)
    subnormal = builder.fmul(builder.sitofp(size, _vector(_f32)), _all(_f32, 2.0**-24))
    is_normal = builder.icmp_unsigned(">=", size, _all(_i32, 0x400))
    size = builder.select(is_normal, normal, builder.bitcast(subnormal, _vector(_i32)))
    return builder.bitcast(builder.or_(sign, size), _vector(_f32))


def _narrow_to_half(builder: Any, values: Any) -> Any:
    """float32 lanes as float16, rounded to nearest even; too large a number becomes infinite."""
    if _converts_halves():
        return builder.fptrunc(values, _vector(_f16))
    is_nan = builder.fcmp_unordered("uno", values, values)
    size = _declare(builder, f"llvm.fabs.v{LANES}f32", _vector(_f32), [values])
    beyond = builder.select(is_nan, _all(_i32, 0x7E00), _all(_i32, 0x7C00))
    sign = builder.and_(
        builder.lshr(builder.bitcast(values, _vector(_i32)), _all(_i32, 16)), _all(_i32, 0x8000)
    )
    fits = builder.fcmp_ordered("<", size, _all(_f32, 65520.0))
    narrow = _narrow_float(builder, values, *_HALF_FORMAT)
    bits = builder.select(fits, narrow, builder.or_(sign, beyond))
    return builder.bitcast(builder.trunc(bits, _vector(_i16)), _vector(_f16))


# --- vectors ---------------------------------------------------------------------------------------------


def _first_lanes(builder: Any, count: Any) -> Any:
    """A mask of the first ``count`` lanes."""
    wide = builder.trunc(count, _i32)
    empty = ir.Constant(_vector(_i32), ir.Undefined)
    limit = builder.shuffle_vector(builder.insert_element(empty, wide, _i32(0)), empty, _all(_i32, 0))
    return builder.icmp_signed("<", ir.Constant(_vector(_i32), list(range(LANES))), limit)


@intrinsic(prefer_literal=True)
def load(typingctx: Any, dtype: Any, address: Any) -> Any:
    """16 neighbouring elements as float32 lanes."""
    code = dtype.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = builder.load(_pointer(builder, args[1], _vector(_ELEMENT[code])), align=BYTES[code])
        return _widen(builder, code, raw)

    return vector(dtype, types.int64), codegen


def _half_of_pairs(emit: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def load_half(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pairs = builder.load(_pointer(builder, args[0], _vector(_i32)), align=BYTES[BF16])
            return builder.bitcast(emit(builder, pairs), _vector(_f32))

        return vector(types.int64), codegen

    return load_half


# The even and the odd ones of 32 neighbouring bfloat16 numbers; a float32 begins with the bits of a bfloat16.
load_even = _half_of_pairs(lambda builder, pairs: builder.shl(pairs, _all(_i32, 16)))
load_odd = _half_of_pairs(lambda builder, pairs: builder.and_(pairs, _all(_i32, 0xFFFF0000)))


@intrinsic(prefer_literal=True)
def load_head(typingctx: Any, dtype: Any, address: Any, count: Any) -> Any:
    """The first ``count`` of 16 elements as float32 lanes, the others zero and not read."""
    code = dtype.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # LLVM has masked loads of whole numbers for every target; a float16 travels as its bits.
        element = {_f16: _i16}.get(_ELEMENT[code], _ELEMENT[code])
        pointer = _pointer(builder, args[1], _vector(element))
        name = f"llvm.masked.load.v{LANES}{'f32' if element is _f32 else f'i{element.width}'}.p0"
        keep = _first_lanes(builder, args[2])
        raw = _declare(builder, name, _vector(element), [pointer, _i32(BYTES[code]), keep, _all(element, 0)])
        return _widen(builder, code, builder.bitcast(raw, _vector(_ELEMENT[code])))

    return vector(dtype, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def store(typingctx: Any, dtype: Any, address: Any, values: Any) -> Any:
    """Write 16 lanes to neighbouring elements."""
    code = dtype.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = narrow(builder, code, args[2])
        builder.store(raw, _pointer(builder, args[1], raw.type), align=BYTES[code])
        return context.get_dummy_value()

    return types.void(dtype, types.int64, values), codegen


@intrinsic(prefer_literal=True)
def store_head(typingctx: Any, dtype: Any, address: Any, values: Any, count: Any) -> Any:
    """Write the first ``count`` of 16 lanes."""
    code = dtype.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = narrow(builder, code, args[2])
        spill = cgutils.alloca_once(builder, raw.type)
        builder.store(raw, spill)
        with cgutils.for_range(builder, args[3], intp=_i64) as loop:
            element = builder.load(
                cgutils.gep_inbounds(
                    builder,
                    builder.bitcast(spill, ir.ArrayType(_ELEMENT[code], LANES).as_pointer()),
                    0,
                    loop.index,
                )
            )
            offset = builder.mul(loop.index, _i64(BYTES[code]))
            builder.store(
                element, _pointer(builder, builder.add(args[1], offset), _ELEMENT[code]), align=BYTES[code]
            )
        return context.get_dummy_value()

    return types.void(dtype, types.int64, values, types.int64), codegen


# --- single elements -------------------------------------------------------------------------------------


def _scalar_store(element: Any, accepted: Any) -> Any:
    @intrinsic
    def store_one(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], _pointer(builder, args[0], element))
            return context.get_dummy_value()

        return types.void(types.int64, accepted), codegen

    return store_one


load_f32 = scalar_load(_f32, types.float32)
load_u8 = scalar_load(_i8, types.int64, lambda builder, value: builder.zext(value, _i64))
store_f32 = _scalar_store(_f32, types.float32)
store_i64 = _scalar_store(_i64, types.int64)


@intrinsic
def store_steps(typingctx: Any, address: Any, first: Any, step: Any) -> Any:
    """Write 16 neighbouring int64: first, first + step, first + 2 · step, …."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        empty = ir.Constant(_vector(_i64), ir.Undefined)
        start, apart = (
            builder.shuffle_vector(builder.insert_element(empty, number, _i32(0)), empty, _all(_i32, 0))
            for number in args[1:]
        )
        numbers = ir.Constant(_vector(_i64), list(range(LANES)))
        steps = builder.add(start, builder.mul(apart, numbers))
        builder.store(steps, _pointer(builder, args[0], steps.type), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address, into the second level; a wrong address does no harm.

    The first level waits for few lines at a time: on Zen 4 twelve GB/s of a core, where the second has room for 28.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = _pointer(builder, args[0], _i8)
        _declare(builder, "llvm.prefetch.p0", ir.VoidType(), [line, _i32(0), _i32(2), _i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
