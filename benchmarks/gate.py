"""Is a peer's attention right? Judged against float64, by the error plain PyTorch makes in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases import Case, Inputs
from benchmarks.judge import Verdict, attention, judge, visible_keys

BLOCK = 256  # query rows at a time: scores of a long prompt, of all heads in float64, are many gigabytes


@dataclass(frozen=True)
class Gate:
    """What a case's output should be, and how far plain PyTorch in the case's dtype is from it."""

    exact: torch.Tensor
    plain: torch.Tensor
    largest_value: float

    def judge(self, out: torch.Tensor) -> Verdict:
        """Error and allowed error of an output [tokens, num_qo_heads, head_dim]."""
        if out.shape != self.exact.shape or not out.isfinite().all():
            return Verdict(
                float("inf"), judge(self.plain, self.exact, self.plain, self.largest_value).allowed
            )
        return judge(out, self.exact, self.plain, self.largest_value)


def make_gate(case: Case, inputs: Inputs) -> Gate:
    """Compute a case twice without Quire: in float64, and in its own dtype."""
    exact = torch.empty(inputs.q.shape, dtype=torch.float64)
    plain = torch.empty_like(inputs.q)
    largest = 0.0
    starts = inputs.cu_seqlens_q.tolist()
    for row, (seq_len, q_len) in enumerate(zip(case.seq_lens, case.q_lens, strict=True)):
        k, v = inputs.tokens(row)
        largest = max(largest, v.abs().max().item())
        for first in range(0, q_len, BLOCK):
            rows = slice(starts[row] + first, starts[row] + min(first + BLOCK, q_len))
            position = torch.arange(seq_len - q_len + first, seq_len - q_len + first + rows.stop - rows.start)
            # Keys behind the block's last row are seen by none of its rows.
            last = int(position[-1]) + 1
            visible = visible_keys(position, last)
            for out in (exact, plain):
                q, keys, values = (x.to(out.dtype) for x in (inputs.q[rows], k[:, :last], v[:, :last]))
                out[rows] = attention(q, keys, values, position, visible)
    return Gate(exact, plain, largest)
