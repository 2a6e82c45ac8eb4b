"""How tests call one word of the kernels."""

import math

import numba
import torch

from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import F32, load, store


def applied(word, *operands):
    """A word over flat float32 tensors, a vector at a time."""
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


def applied_to_four(word, source):
    """The results for 0 to 3 of a word of four vectors and a number, the vectors as they lie in ``source``."""

    @numba.njit
    def four(source, out):
        a, b = load(F32, source), load(F32, source + LANES * 4)
        c, d = load(F32, source + LANES * 8), load(F32, source + LANES * 12)
        store(F32, out, word(a, b, c, d, 0))
        store(F32, out + LANES * 4, word(a, b, c, d, 1))
        store(F32, out + LANES * 8, word(a, b, c, d, 2))
        store(F32, out + LANES * 12, word(a, b, c, d, 3))

    out = torch.zeros_like(source)
    four(source.data_ptr(), out.data_ptr())
    return out
