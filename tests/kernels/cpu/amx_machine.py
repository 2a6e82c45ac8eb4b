"""A pytest plugin that stands in for AMX's tile registers, in a process of its own: ``-p amx_machine``.

The words of ``simd.amx`` become plain code that does what Intel's manual says of the instructions, number by number, on
registers that lie in memory. There is one set of them, so kernels must run on one thread. What the processor would end
a program for, an instruction before the registers were configured, is counted in ``faults``.
"""

import numpy as np

from quire.kernels.compile import load_i64, part
from quire.kernels.cpu import amx
from quire.kernels.cpu.attend import prefill, tile_products
from quire.kernels.cpu.simd import amx as words
from quire.kernels.cpu.simd import pairs
from quire.kernels.cpu.simd.memory import BF16, F32, load, load_even, load_odd, narrow, store, store_i64
from quire.kernels.cpu.simd.vectors import add, first_lane, fma, less_than, magnitude, mul, select, splat

REGISTER_BYTES = words.TILE_ROWS * words.TILE_BYTES
_memory = np.zeros(words.TILES * REGISTER_BYTES + 256, np.uint8)
_state = np.zeros(4, np.int64)
REGISTERS = -(-_memory.ctypes.data // 64) * 64
CONFIGURED, FAULTS, PRODUCTS, SESSIONS = (_state.ctypes.data + 8 * i for i in range(4))
ZERO, SMALLEST, NAN = np.float32(0.0), np.float32(2.0**-126), np.float32(np.nan)


def counts():
    """Whether registers are configured now, and how many faults, products and configurations there were."""
    return dict(zip(("configured", "faults", "products", "sessions"), _state.tolist(), strict=True))


@part
def touch():
    if load_i64(CONFIGURED) != 1:
        store_i64(FAULTS, load_i64(FAULTS) + 1)


@part
def fill(value):
    for at in range(REGISTERS, REGISTERS + 8 * REGISTER_BYTES, 64):
        store(F32, at, splat(value))


@part
def configure_tiles(address):
    store_i64(address, 1)  # the configuration is written there
    store_i64(CONFIGURED, 1)
    store_i64(SESSIONS, load_i64(SESSIONS) + 1)
    fill(ZERO)


@part
def release_tiles():
    store_i64(CONFIGURED, 0)
    fill(NAN)


@part
def zero_tile(number):
    touch()
    for r in range(16):
        store(F32, REGISTERS + number * REGISTER_BYTES + r * 64, splat(ZERO))


@part
def load_tile(number, address, stride):
    touch()
    for r in range(16):
        store(F32, REGISTERS + number * REGISTER_BYTES + r * 64, load(F32, address + r * stride))


@part
def store_tile(number, address, stride):
    touch()
    for r in range(16):
        store(F32, address + r * stride, load(F32, REGISTERS + number * REGISTER_BYTES + r * 64))


@part
def flush(x):
    """Denormal numbers become zero, with their sign."""
    return select(less_than(magnitude(x), splat(SMALLEST)), mul(x, splat(ZERO)), x)


@part
def multiply_tiles(sums, a, b):
    """Even and odd elements are summed apart, each by fused products in order, and then meet the sums so far."""
    touch()
    store_i64(PRODUCTS, load_i64(PRODUCTS) + 1)
    left, right = REGISTERS + a * REGISTER_BYTES, REGISTERS + b * REGISTER_BYTES
    target = REGISTERS + sums * REGISTER_BYTES
    for m in range(16):
        even, odd = splat(ZERO), splat(ZERO)
        for k in range(16):
            at = left + m * 64 + k * 4
            x, y = splat(first_lane(load(BF16, at))), splat(first_lane(load(BF16, at + 2)))
            even = flush(fma(flush(x), flush(load_even(right + k * 64)), even))
            odd = flush(fma(flush(y), flush(load_odd(right + k * 64)), odd))
        total = flush(add(even, odd))
        store(F32, target + m * 64, flush(add(flush(load(F32, target + m * 64)), total)))


def _round(builder, values):
    """Machines with AMX have an instruction for it; elsewhere LLVM would call a library's function."""
    return narrow(builder, BF16, values)


WORDS = (configure_tiles, release_tiles, zero_tile, load_tile, store_tile, multiply_tiles)
for module in (prefill, tile_products):  # the words are looked up there when a kernel is compiled
    for word in WORDS:
        name = word.py_func.__name__
        if hasattr(module, name):
            setattr(module, name, word)
pairs._round = _round
amx.in_use = lambda: True
