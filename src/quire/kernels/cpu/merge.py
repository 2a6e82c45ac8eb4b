"""Merge: fold the partial states that split tiles left in the workspace.

Over the parts i of a row, each normalised over its own keys, in base 2:

    M = max_i lse_i,   w_i = 2^(lse_i − M),   l = Σ w_i,   out = Σ w_i · out_i / l

which is the online softmax once more, with (m, l) = (M, l). Parts without keys weigh nothing.

Source: FlashDecoding; arXiv:2501.01005 §2.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.cpu.launch import kernel, parallel_for, part
from quire.kernels.cpu.memory import F32, load, load_f32, load_i64, store
from quire.kernels.cpu.rows import LOWEST, ZERO, Call, Step, finish_row
from quire.kernels.cpu.simd import LANES, fma, splat


@kernel
def merge(cfg: Any, threads: int, merges: int, step: Step, call: Call) -> None:
    """Fold every split tile."""
    parallel_for(merge_tile, threads, merges, (cfg, step, call))


@part
def merge_tile(number: int, cfg: Any, step: Step, call: Call) -> None:
    """Fold the parts of one tile, row by row, into the first part's place, and write the results."""
    entry = step.merges + number * 40
    kv_head, first_token, q_len = load_i64(entry), load_i64(entry + 8), load_i64(entry + 16)
    first, count = load_i64(entry + 24), load_i64(entry + 32)
    for row in range(q_len * step.group):
        highest = LOWEST
        for state in range(first, first + count):
            highest = max(highest, load_f32(step.partial_lse + (state * step.partial_rows + row) * 4))
        total = ZERO
        acc = step.partial_out + (first * step.partial_rows + row) * cfg.row_bytes
        for state in range(first, first + count):
            at = state * step.partial_rows + row
            weight = np.exp2(load_f32(step.partial_lse + at * 4) - highest)
            total += weight
            for i in range(0, cfg.row_bytes, LANES * 4):
                gathered = splat(ZERO) if state == first else load(F32, acc + i)
                part_out = load(F32, step.partial_out + at * cfg.row_bytes + i)
                store(F32, acc + i, fma(splat(weight), part_out, gathered))
        head = kv_head * step.group + row % step.group
        finish_row(cfg, call, first_token + row // step.group, head, acc, highest, total)
