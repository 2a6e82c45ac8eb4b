"""How tests call one word of the kernels."""

import math

import numba
import torch

from quire.kernels.cpu.memory import F32, load, store
from quire.kernels.cpu.simd import LANES


def applied(word, *operands):
    """A word over flat float32 tensors, 16 lanes at a time."""
    count = len(operands)

    @numba.njit
    def one(a, out, n):
        for i in range(0, n * 4, LANES * 4):
            store(F32, out + i, word(load(F32, a + i)))

    @numba.njit
    def two(a, b, out, n):
        for i in range(0, n * 4, LANES * 4):
            store(F32, out + i, word(load(F32, a + i), load(F32, b + i)))

    @numba.njit
    def three(a, b, c, out, n):
        for i in range(0, n * 4, LANES * 4):
            store(F32, out + i, word(load(F32, a + i), load(F32, b + i), load(F32, c + i)))

    out = torch.full_like(operands[0], math.nan)
    run = {1: one, 2: two, 3: three}[count]
    run(*(t.data_ptr() for t in operands), out.data_ptr(), len(out))
    return out
