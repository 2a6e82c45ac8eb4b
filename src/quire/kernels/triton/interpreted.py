"""Whether kernels run in Triton's interpreter here, and whether that computes as a GPU does."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # Triton decides when it is imported


@triton.jit
def add(a, b, out):
    """One sum, in the dtype of its operands."""
    tl.store(out, tl.load(a) + tl.load(b))


@functools.cache
def rounds_as_a_gpu() -> bool:
    """Whether this interpreter adds two bfloat16 numbers and rounds the sum to the nearest one.

    Triton's own adds their bits, and cuts where hardware rounds.
    """
    a, b, out = torch.tensor([[1.0], [0.75 * 2.0**-7], [0.0]], dtype=torch.bfloat16, device="cpu")
    add[(1,)](a, b, out)
    return bool(out == a + b)
