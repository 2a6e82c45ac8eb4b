"""Merge: combine the partial states of split tiles.

Over the parts i of a row, each a state (m_i, l_i, acc_i) of the online softmax over its own keys:

    m = max_i m_i,   w_i = 2^(m_i − m),   l = Σ w_i · l_i,   acc = Σ w_i · acc_i,   then out = acc / l as ever.

A part without keys has l_i = 0 and acc_i = 0. Where only one part has keys its w_i is 1, and the row has the bits that
it has unsplit.

Source: FlashDecoding; arXiv:2501.01005 §2.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.kernels.compile import compiled, part
from quire.kernels.cpu.attend.rows import LOWEST, MERGE_AT, MERGE_BYTES, ZERO, Call, Step, finish_row
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import F32, load, load_f32, load_i64, store
from quire.kernels.cpu.simd.vectors import fma, splat
from quire.kernels.cpu.threads import parallel_for


@compiled
def merge(cfg: Any, threads: int, merges: int, step: Step, call: Call) -> None:
    """Merge every split tile."""
    parallel_for(merge_tile, threads, merges, (cfg, step, call))


@part
def merge_tile(number: int, cfg: Any, step: Step, call: Call) -> None:
    """Merge the parts of one tile, row by row, in the place of the first, and write the results."""
    entry = step.merges + number * MERGE_BYTES
    kv_head, first_token = load_i64(entry + MERGE_AT.kv_head), load_i64(entry + MERGE_AT.q_begin)
    q_len = load_i64(entry + MERGE_AT.q_len)
    first, count = load_i64(entry + MERGE_AT.first_partial), load_i64(entry + MERGE_AT.num_partials)
    for row in range(q_len * step.group):
        highest = LOWEST
        for state in range(first, first + count):
            highest = max(highest, load_f32(step.partial_softmax + (state * step.partial_rows + row) * 8))
        total = ZERO
        acc = step.partial_out + (first * step.partial_rows + row) * cfg.row_bytes
        for state in range(first, first + count):
            at = state * step.partial_rows + row
            weight = np.exp2(load_f32(step.partial_softmax + at * 8) - highest)
            total += weight * load_f32(step.partial_softmax + at * 8 + 4)
            for i in range(0, cfg.row_bytes, LANES * 4):
                gathered = splat(ZERO) if state == first else load(F32, acc + i)
                part_out = load(F32, step.partial_out + at * cfg.row_bytes + i)
                store(F32, acc + i, fma(splat(weight), part_out, gathered))
        head = kv_head * step.group + row % step.group
        finish_row(cfg, call, first_token + row // step.group, head, acc, highest, total)
