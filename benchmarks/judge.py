"""By what results are judged: attention as anyone writes it in PyTorch, in float64 and in the dtype at hand.

The rule of FlashAttention's tests: error against float64 ≤ 2 × the error of plain PyTorch in the same dtype, plus
four roundings of float32, in which the kernels compute, at the size of the largest value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Verdict:
    """The largest error of some outputs, and the error they were allowed."""

    error: float
    allowed: float

    @property
    def good(self) -> bool:
        """NaN is never good."""
        return self.error <= self.allowed

    def columns(self) -> dict[str, float]:
        """As columns of a row."""
        return {"max_error": self.error, "allowed_error": self.allowed}


def judge(out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, largest_value: float) -> Verdict:
    """Compare outputs with float64 and with plain PyTorch's."""
    if out.numel() == 0:
        return Verdict(0.0, 0.0)
    atol = 4 * torch.finfo(torch.float32).eps * largest_value
    error = (out.double() - exact).abs().max().item()
    return Verdict(error, 2 * (plain.double() - exact).abs().max().item() + atol)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: torch.Tensor,
    visible: torch.Tensor,
    *,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of attention over one sequence, all in the dtype of q, k and v but for a softmax in float32 or better.

    Args:
        q: [rows, num_qo_heads, head_dim].
        k, v: [num_kv_heads, seq_len, head_dim].
        position: [rows], where each row stands in the sequence.
        visible: bool [rows, seq_len].
    """
    rows, heads, head_dim = q.shape
    kv_heads, seq_len = k.shape[:2]
    group = heads // kv_heads
    grouped = (
        q.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)
    )  # [kv_heads, group · rows, d]
    scores = (grouped @ k.mT).view(kv_heads, group, rows, seq_len) * head_dim**-0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = (position[:, None] - torch.arange(seq_len, device=q.device)).abs()
        scores = scores - alibi_slopes.view(kv_heads, group, 1, 1) * distance
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        logits = sinks.to(scores.dtype).view(kv_heads, group, 1, 1).expand(-1, -1, rows, 1)
        scores = torch.cat([scores, logits], -1)
    weights = torch.softmax(scores.to(torch.promote_types(q.dtype, torch.float32)), -1)[..., :seq_len]
    weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0).to(q.dtype)
    out = weights.flatten(1, 2) @ v
    return out.view(kv_heads, group, rows, head_dim).permute(2, 0, 1, 3).flatten(1, 2)


def visible_keys(
    position: torch.Tensor, seq_len: int, *, causal: bool = True, window_left: int = -1
) -> torch.Tensor:
    """bool [rows, seq_len]: keys that rows at these positions may see."""
    key = torch.arange(seq_len, device=position.device)
    visible = (key <= position[:, None]) | (not causal)
    if window_left >= 0:
        visible = visible & (key >= position[:, None] - window_left)
    return visible
