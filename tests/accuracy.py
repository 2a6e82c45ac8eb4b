"""The one rule by which results are judged: against float64, with leave to err as plain PyTorch does in that dtype."""

from __future__ import annotations

import math
from typing import Any

import torch
from support import Batch, attend

import quire
from quire.kernels import reference
from quire.kernels.call import AttentionCall, Scoring
from quire.planning.step import plan_step
from quire.planning.work_list import StepPlan, TileShape, Tiling

# What a score of bfloat16 queries and int8 keys may be off by where a CPU multiplies bytes: a 32nd of what rounding
# a weight to bfloat16 changes (2⁻⁸ of it), so that no output shows it. docs/numerics.md says the same.
BYTE_PRODUCT_ERROR = 2.0**-13


def step_of(batch: Batch, causal: bool = True, window_left: int = -1) -> StepPlan:
    whole = TileShape(1 << 30, 1 << 30)
    return plan_step(
        batch.page_table, batch.seq_lens, batch.cu_seqlens_q,
        num_kv_heads=batch.shape.num_kv_heads, page_size=batch.page_size,
        causal=causal, window_left=window_left, tiling=Tiling(1, whole, whole),
    )  # fmt: skip


def exact(batch: Batch, *, causal: bool = True, window_left: int = -1, **scoring: Any) -> quire.SoftmaxState:
    """The float64 reference, not rounded to the batch's dtype."""
    out = torch.full(batch.q.shape, math.nan, dtype=torch.float64)
    lse = torch.full(batch.q.shape[:2], math.nan)
    call = AttentionCall(*batch.pages, out, lse, Scoring(**scoring, **batch.scales))
    reference.attend(step_of(batch, causal, window_left), call)
    return quire.SoftmaxState(out, lse)


def plain(batch: Batch, *, causal: bool = True, window_left: int = -1, **scoring: Any) -> torch.Tensor:
    """The same attention as anyone writes it in PyTorch: gathered, padded to nothing, in the batch's dtype."""
    out = torch.zeros(batch.q.shape, dtype=batch.shape.dtype)
    starts = batch.cu_seqlens_q.tolist()
    for i, seq_len in enumerate(batch.seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        q_len = rows.stop - rows.start
        pages = batch.page_table[i, : math.ceil(seq_len / batch.page_size)].long()
        k, v = (
            _gather(batch, cache, batch.scales.get(scale), pages, seq_len)
            for cache, scale in ((batch.k_pages, "k_scale"), (batch.v_pages, "v_scale"))
        )
        scale = scoring.get("softmax_scale")
        scores = (
            batch.q[rows].transpose(0, 1) @ k.mT * (batch.shape.head_dim**-0.5 if scale is None else scale)
        )
        if scoring.get("softcap"):
            scores = scoring["softcap"] * torch.tanh(scores / scoring["softcap"])
        position = torch.arange(seq_len - q_len, seq_len)[:, None]
        key = torch.arange(seq_len)
        if scoring.get("alibi_slopes") is not None:
            scores = scores - scoring["alibi_slopes"][:, None, None] * (position - key).abs()
        visible = _visible(position, key, q_len, causal, window_left, scoring.get("tree_mask"), rows)
        scores = scores.masked_fill(~visible, -math.inf)
        if scoring.get("sinks") is not None:
            sinks = scoring["sinks"].to(scores.dtype)[:, None, None].expand(-1, q_len, 1)
            scores = torch.cat([scores, sinks], -1)
        weights = torch.softmax(scores.float(), -1).to(batch.shape.dtype)[..., :seq_len]
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)
        out[rows] = (weights @ v).transpose(0, 1)
    return out


def _gather(
    batch: Batch, cache: torch.Tensor, scale: torch.Tensor | None, pages: torch.Tensor, seq_len: int
) -> torch.Tensor:
    values = cache.float()[:, pages]
    if scale is not None:
        values = values * scale[:, pages, :, None]
    return values.flatten(1, 2)[:, :seq_len].to(batch.shape.dtype).repeat_interleave(batch.shape.group, 0)


def _visible(
    position: torch.Tensor,
    key: torch.Tensor,
    q_len: int,
    causal: bool,
    window_left: int,
    tree_mask: torch.Tensor | None,
    rows: slice,
) -> torch.Tensor:
    """[q_len, seq_len], key by key as the public docstrings say."""
    visible = (key <= position) | (not causal)
    if window_left >= 0:
        visible = visible & (key >= position - window_left)
    if tree_mask is not None:
        new = key - (len(key) - q_len)  # the key's place among the step's tokens; negative for earlier ones
        allowed = tree_mask[rows][:, new.clamp(min=0)]
        visible = visible & (allowed | (new < 0))
    return visible


def assert_accurate(
    state: quire.SoftmaxState,
    wanted: quire.SoftmaxState,
    baseline: torch.Tensor,
    largest_value: float,
    score_slack: float = 0.0,
) -> None:
    """max error ≤ 2 × the error of plain PyTorch in the same dtype, plus four roundings of fp32, in which the
    kernels compute, at the size of the largest value, and one of a score, which changes its weight by as many parts;
    rows that see no key are exactly zero, and their lse is exactly the sink's logit, or −inf without a sink.
    ``score_slack`` is what scores may be off by, and so lse.

    The rule of FlashAttention's tests.
    """
    out, lse = state
    assert out.shape == wanted.out.shape
    assert out.isfinite().all(), "poison reached the output"
    if out.numel() == 0:
        return
    largest_score = (
        wanted.lse[wanted.lse.isfinite()].abs().max().item() if wanted.lse.isfinite().any() else 0.0
    )
    atol = (4 + largest_score) * torch.finfo(torch.float32).eps * largest_value
    allowed = 2 * (baseline.double() - wanted.out).abs().max().item() + atol
    error = (out.double() - wanted.out).abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    sees_nothing = (wanted.out == 0).all(-1)
    assert (out[sees_nothing] == 0).all()
    assert torch.equal(lse[sees_nothing], wanted.lse[sees_nothing])
    empty = wanted.lse.isneginf()
    assert (lse.isneginf() == empty).all()
    # The kernels' softmax is fp32 whatever the dtype, so lse is judged by fp32's own precision.
    torch.testing.assert_close(lse[~empty], wanted.lse[~empty], atol=2e-5 + score_slack, rtol=2e-6)


def check(batch: Batch, *, workers: int | None = None, **rules: Any) -> quire.SoftmaxState:
    """Run the CPU kernels and judge them."""
    state = attend(batch, workers=workers, **rules)
    shape = batch.shape
    whole_lines = shape.head_dim % 64 == 0 and shape.head_dim <= 512
    by_bytes = shape.dtype == torch.bfloat16 and shape.kv_dtype == "int8" and whole_lines
    slack = BYTE_PRODUCT_ERROR if by_bytes else 0.0
    assert_accurate(state, exact(batch, **rules), plain(batch, **rules), batch.largest_value, slack)
    return state
