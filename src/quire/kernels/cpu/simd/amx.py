"""Words for AMX's eight tile registers: 16 rows of 64 bytes each, products of bfloat16 pairs summed in float32.

    configure_tiles(address)            all eight have 16 rows of 64 bytes; uses 64 bytes at the address
    release_tiles()                     the thread's registers hold nothing any more, and cost nothing to save
    zero_tile(n)
    load_tile(n, address, stride)  store_tile(n, address, stride)      rows lie ``stride`` bytes apart
    multiply_tiles(c, a, b)             c[i, j] += Σ_k a[i, 2k] · b[k, 2j] + a[i, 2k+1] · b[k, 2j+1]

Registers are named by their numbers, known at compile time, so that none is ever moved to memory by the compiler. They
belong to the thread. Denormal numbers count as zero in a product.

Source: Intel's Software Developer's Manual, volume 2, and its Architecture Instruction Set Extensions, chapter 3.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quire.kernels.cpu.simd.llvm import call, i8, i64, pointer

TILE_ROWS = 16
TILE_BYTES = 64  # of a row
TILES = 8
CONFIG_BYTES = 64
# Eight 64-bit words: palette 1; from byte 16 on each tile's bytes in a row, of 16 bits; from byte 48 on its rows.
CONFIG = (1, 0, *[TILE_BYTES * 0x0001000100010001] * 2, 0, 0, TILE_ROWS * 0x0101010101010101, 0)

_void = ir.VoidType()


@intrinsic
def configure_tiles(typingctx: Any, address: Any) -> Any:
    """Give all eight registers their full size; they are zero then."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for i, number in enumerate(CONFIG):
            at = builder.add(args[0], i64(8 * i))
            builder.store(i64(number), pointer(builder, at, i64), align=8)
        call(builder, "llvm.x86.ldtilecfg", _void, [pointer(builder, args[0], i8)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def release_tiles(typingctx: Any) -> Any:
    """Give the registers back: a thread that keeps them has them saved at each switch of threads."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        call(builder, "llvm.x86.tilerelease", _void, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def zero_tile(typingctx: Any, number: Any) -> Any:
    """All elements become 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        call(builder, "llvm.x86.tilezero", _void, [i8(number.literal_value)])
        return context.get_dummy_value()

    return types.void(number), codegen


def _mover(name: str) -> Any:
    @intrinsic(prefer_literal=True)
    def move(typingctx: Any, number: Any, address: Any, stride: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            operands = [i8(number.literal_value), pointer(builder, args[1], i8), args[2]]
            call(builder, name, _void, operands)
            return context.get_dummy_value()

        return types.void(number, types.int64, types.int64), codegen

    return move


load_tile, store_tile = _mover("llvm.x86.tileloadd64"), _mover("llvm.x86.tilestored64")


@intrinsic(prefer_literal=True)
def multiply_tiles(typingctx: Any, sums: Any, a: Any, b: Any) -> Any:
    """Add the product of two tiles of bfloat16 pairs to a tile of float32 sums."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        call(builder, "llvm.x86.tdpbf16ps", _void, [i8(number.literal_value) for number in (sums, a, b)])
        return context.get_dummy_value()

    return types.void(sums, a, b), codegen
