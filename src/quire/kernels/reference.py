"""Paged attention as its formula, in float64 PyTorch: the specification the other backends are tested against.

For query j of a sequence with keys k and values v, standing at position p = seq_len − q_len + j:

    s_t = softcap(scale · q·k_t) + alibi(p, t)     for every visible t
    out = Σ_t exp(s_t) v_t / (Σ_t exp(s_t) + exp(sink)),    lse = log(Σ_t exp(s_t) + exp(sink))

where softcap(x) = c·tanh(x / c), alibi(p, t) = −slope·|p − t|, and t is visible when

    t ≤ p (causal) and t ≥ p − window_left (window) and tree_mask[j, t − (seq_len − q_len)] (this step's keys).

A row that sees no key gives out 0, and lse = sink, or −inf where there is none. Values may be narrower than keys.
It runs wherever PyTorch does, one sequence at a time. It is slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from quire.kernels.call import AttentionCall, BoundCall
from quire.planning.work_list import StepPlan, TileShape, Tiling
from quire.spec import LARGEST, AttentionSpec


def why_not(spec: AttentionSpec, device: torch.device) -> str | None:
    """It serves everything."""
    return None


def tiling(spec: AttentionSpec, device: torch.device, batch: int) -> Tiling:
    """One worker and whole sequences: the work lists are not used."""
    whole = TileShape(q_tokens=1 << 30, kv_tokens=1 << 30)
    return Tiling(num_workers=1, decode=whole, prefill=whole)


def prepare(spec: AttentionSpec, step: StepPlan, device: torch.device) -> StepPlan:
    """Nothing to compute ahead."""
    return step


def bind(step: StepPlan, call: AttentionCall) -> BoundCall:
    """A call like this one on other tensors."""
    numbers = call.scoring.numbers

    def run(*tensors: torch.Tensor | None) -> None:
        attend(step, AttentionCall.of(tensors, numbers))

    return run


def attend(step: StepPlan, call: AttentionCall) -> None:
    """Attend every sequence's queries to its own pages; see the module's formula."""
    scoring = call.scoring
    for i, seq_len in enumerate(step.seq_lens.tolist()):
        begin, end = step.cu_seqlens_q[i : i + 2].tolist()
        if begin == end:
            continue
        rows = slice(begin, end)
        # Pages before the first query's window may hold anything, as those behind the last token may.
        unseen = 0
        if step.window_left >= 0:
            unseen = max(seq_len - (end - begin) - step.window_left, 0) // step.page_size
        page_ids = step.page_table[i, unseen : step.pages_per_sequence[i]]
        pages = torch.from_numpy(page_ids.astype("int64")).to(call.q.device)
        num_keys = seq_len - unseen * step.page_size
        k = gather_pages(call.k_pages, scoring.k_scale, pages, num_keys)
        v = gather_pages(call.v_pages, scoring.v_scale, pages, num_keys)
        visible = visible_keys(end - begin, seq_len, step.causal, step.window_left, call.q.device)
        visible = visible[:, seq_len - num_keys :]
        if scoring.tree_mask is not None:
            visible = with_tree_mask(visible, scoring.tree_mask[rows])
        out, lse = attend_one(call, call.q[rows].double(), k, v, visible)
        call.out[rows] = out.to(call.out.dtype)
        if call.lse is not None:
            call.lse[rows] = lse.float()


def gather_pages(
    pages: torch.Tensor, scale: torch.Tensor | None, page_ids: torch.Tensor, seq_len: int
) -> torch.Tensor:
    """A sequence's keys or values in float64, [num_kv_heads, seq_len, head_dim or value_dim], dequantised."""
    gathered = pages[:, page_ids].flatten(1, 2)[:, :seq_len].double()
    if scale is not None:
        gathered = gathered * scale[:, page_ids].flatten(1, 2)[:, :seq_len, None].double()
    return gathered


def visible_keys(
    q_len: int, seq_len: int, causal: bool, window_left: int, device: torch.device
) -> torch.Tensor:
    """[q_len, seq_len]: which keys each query may see by position alone."""
    position = torch.arange(seq_len - q_len, seq_len, device=device)[:, None]
    key = torch.arange(seq_len, device=device)[None, :]
    visible = torch.ones(q_len, seq_len, dtype=torch.bool, device=device)
    if causal:
        visible &= key <= position
    if window_left >= 0:
        visible &= key >= position - window_left
    return visible


def with_tree_mask(visible: torch.Tensor, tree_mask: torch.Tensor) -> torch.Tensor:
    """Hide those of this step's own keys that the mask hides."""
    q_len, seq_len = visible.shape
    new_keys = min(q_len, seq_len)
    visible = visible.clone()
    visible[:, seq_len - new_keys :] &= tree_mask[:, q_len - new_keys : q_len]
    return visible


def attend_one(
    call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: q [q_len, num_qo_heads, head_dim] to out [.., .., value_dim] and lse [q_len, num_qo_heads]."""
    scoring, group_size = call.scoring, q.shape[1] // k.shape[0]
    k, v = k.repeat_interleave(group_size, 0), v.repeat_interleave(group_size, 0)

    scores = call.scale * torch.einsum("qhd,htd->hqt", q, k)
    if scoring.softcap:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.alibi_slopes is not None:
        q_len, seq_len = visible.shape
        position = torch.arange(seq_len - q_len, seq_len, device=q.device)[:, None]
        distance = (position - torch.arange(seq_len, device=q.device)).abs()
        scores = scores - scoring.alibi_slopes.double()[:, None, None] * distance
    scores = scores.masked_fill(~visible, float("-inf"))

    lse = torch.logsumexp(scores, -1)
    sees_nothing = ~visible.any(-1)
    if scoring.sinks is not None:
        lse = torch.logaddexp(lse, scoring.sinks.double()[:, None])
    weights = torch.exp(scores - lse[..., None]).masked_fill(sees_nothing[:, None], 0.0)
    # 0 times NaN is NaN, so no unused slot may be in v: it ends at seq_len.
    return torch.einsum("hqt,htd->qhd", weights, v), lse.T


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric quantisation per token and head: values of ``dtype`` and fp32 scales, x ≈ values · scale.

    scale = max|x| / largest(dtype), so the largest element keeps its full precision. A row of zeros has scale 0
    and stays zero, and so does one whose scale would be subnormal, which has too few bits to divide by.
    """
    x = x.float()
    scale = x.abs().amax(-1) / LARGEST[dtype]
    scale = torch.where(scale < torch.finfo(torch.float32).smallest_normal, 0.0, scale)
    return divided(x, scale, dtype), scale


def divided(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x / scale, rounded to ``dtype`` and clamped to its largest number; 0 where the scale is 0 or NaN.

    A NaN in x is stored as the NaN of an fp8 dtype, and as 0 in int8.
    """
    largest = LARGEST[dtype]
    scaled = torch.where(scale[..., None] > 0, x / scale[..., None], 0.0).clamp(-largest, largest)
    if dtype == torch.int8:
        scaled = scaled.round().nan_to_num(0.0)
    return scaled.to(dtype)


def bind_write(*like: Any) -> Callable[..., None]:
    """``write_kv``, with scales given or not."""
    return functools.partial(write_kv, given=True) if like[-1] else write_kv


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    given: bool = False,
) -> None:
    """Write each token's K and V into its slot; slot −1 writes nowhere. Scales are computed and written, or given."""
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    page, offset = slots // k_pages.shape[2], slots % k_pages.shape[2]
    for values, pages, scales in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
        values = values[: len(slot_mapping)][written]
        if scales is not None and given:
            values = divided(values.float(), scales[:, page, offset].T, pages.dtype)
        elif scales is not None:
            values, scale = quantize(values, pages.dtype)
            scales[:, page, offset] = scale.T
        pages[:, page, offset] = values.transpose(0, 1).to(pages.dtype)
