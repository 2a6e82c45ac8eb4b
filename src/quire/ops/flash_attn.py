"""flash-attn's paged signature over Quire's operator, for people who come from there."""

from __future__ import annotations

import torch

from quire.errors import ArgumentError, ShapeError, UnsupportedError
from quire.ops.attention import paged_attention
from quire.ops.store import write_kv
from quire.planning.checks import check_tensor, describe


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Append k and v to the cache, if given, and attend to it; arguments as in flash-attn 2.

    Args:
        q: [batch, seqlen_q, num_qo_heads, head_dim].
        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim] with a block_table, otherwise
            [batch, max_seqlen, num_kv_heads, head_dim], which is one large page per sequence.
        k, v: [batch, seqlen_new, num_kv_heads, head_dim], written to the cache behind cache_seqlens.
        cache_seqlens: int32 [batch] or one int: tokens in the cache before k and v; all of it when None.
        block_table: int32 [batch, max_pages], the page table.
        causal: queries are aligned with the end of the keys.
        window_size: (left, right), −1 for no limit; a right limit other than causal's 0 is refused.
        num_splits: accepted and ignored, the plan decides.
        return_softmax_lse: also return lse, float32 [batch, num_qo_heads, seqlen_q].
    Returns:
        [batch, seqlen_q, num_qo_heads, head_dim], and lse where asked for.
    Raises:
        UnsupportedError: rotary embedding, cache_batch_idx or cache_leftpad, which belong to the caller here.
        ShapeError, ArgumentError: arguments that do not fit together.
    Cost: one plan per call; see ``quire.plan`` for many layers.
    Source: the interface of flash-attn's flash_attn_with_kvcache (FlashAttention-2, arXiv:2307.08691).
    """
    for name, value in (
        ("rotary_cos", rotary_cos),
        ("rotary_sin", rotary_sin),
        ("cache_batch_idx", cache_batch_idx),
        ("cache_leftpad", cache_leftpad),
    ):
        if value is not None:
            raise UnsupportedError(
                f"{name} must be None: Quire attends and leaves rotation and batch order to the caller; "
                f"got a tensor. Fix: apply it to q, k or block_table first"
            )
    check_tensor("q", q, 4, "[batch, seqlen_q, num_qo_heads, head_dim]")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache, 4, "[num_pages, page_size, num_kv_heads, head_dim]")
    batch, seqlen_q = q.shape[:2]
    page_table = _page_table(block_table, batch, k_cache)
    in_cache = _lengths(cache_seqlens, batch, page_table.shape[1] * k_cache.shape[1])
    k_pages, v_pages = k_cache.permute(2, 0, 1, 3), v_cache.permute(2, 0, 1, 3)
    if (k is None) != (v is None):
        raise ArgumentError(
            "k and v must be given together; got only one of them. Fix: pass both, or neither"
        )
    if k is not None and v is not None:
        in_cache = _append(k, v, k_pages, v_pages, page_table, in_cache, backend)

    result = paged_attention(
        q.flatten(0, 1),
        k_pages,
        v_pages,
        page_table,
        in_cache.to(torch.int32),
        torch.arange(batch + 1, dtype=torch.int32) * seqlen_q,
        causal=causal,
        softmax_scale=softmax_scale,
        window_left=_window_left(window_size, causal),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_state=return_softmax_lse,
        backend=backend,
    )
    if not return_softmax_lse:
        out: torch.Tensor = result.view_as(q)
        return out
    return result.out.view_as(q), result.lse.view(batch, seqlen_q, -1).transpose(1, 2)


def _window_left(window_size: tuple[int, int], causal: bool) -> int:
    left, right = window_size
    if right != -1 and not (causal and right == 0):
        raise UnsupportedError(
            f"window_size must have no right limit beyond causal's; got {window_size} with causal={causal}. "
            "Fix: window_size=(left, -1), with causal=True to hide later keys"
        )
    return left


def _page_table(block_table: torch.Tensor | None, batch: int, k_cache: torch.Tensor) -> torch.Tensor:
    if block_table is not None:
        return block_table
    if k_cache.shape[0] != batch:
        raise ShapeError(
            f"k_cache must be [batch, max_seqlen, num_kv_heads, head_dim] with batch={batch} when block_table is "
            f"None; got {describe(k_cache)}. Fix: pass block_table for a paged cache"
        )
    return torch.arange(batch, dtype=torch.int32)[:, None]


def _lengths(cache_seqlens: int | torch.Tensor | None, batch: int, capacity: int) -> torch.Tensor:
    if isinstance(cache_seqlens, torch.Tensor):
        if cache_seqlens.shape != (batch,):
            raise ShapeError(
                f"cache_seqlens must be int32 [batch] = [{batch}]; got {describe(cache_seqlens)}. "
                "Fix: one length per sequence"
            )
        return cache_seqlens.to("cpu", torch.int64)
    return torch.full((batch,), capacity if cache_seqlens is None else cache_seqlens)


def _append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    in_cache: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """Write k and v behind each sequence's cached tokens; returns the new lengths."""
    check_tensor("k", k, 4, "[batch, seqlen_new, num_kv_heads, head_dim]")
    check_tensor("v", v, 4, "[batch, seqlen_new, num_kv_heads, head_dim]")
    page_size, new = k_pages.shape[2], k.shape[1]
    positions = in_cache[:, None] + torch.arange(new)
    capacity = page_table.shape[1] * page_size
    if positions.numel() and (int(positions.max()) >= capacity or int(positions.min()) < 0):
        raise ShapeError(
            f"block_table must have room for cache_seqlens + {new} new tokens; got {page_table.shape[1]} pages of "
            f"{page_size} for {int(in_cache.max()) + new} tokens. Fix: give the sequences more pages"
        )
    pages = page_table.cpu().long().gather(1, positions // page_size)
    slots = pages * page_size + positions % page_size
    write_kv(
        k.flatten(0, 1), v.flatten(0, 1), k_pages, v_pages, slots.flatten().to(k.device), backend=backend
    )
    return in_cache + new
