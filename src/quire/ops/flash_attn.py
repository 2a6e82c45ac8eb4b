"""flash-attn's paged signature over Quire's operator, for people who come from there."""

from __future__ import annotations

import torch

from quire.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from quire.kernels.call import AttentionCall, Scoring
from quire.ops import checks
from quire.ops.planner import plan
from quire.ops.store import write_kv
from quire.planning.checks import check_host, check_page_ids, check_tensor, describe
from quire.state import SoftmaxState


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
    _check_caches(q, k_cache, v_cache)
    batch, seqlen_q = q.shape[:2]
    page_size = k_cache.shape[1]
    page_table = _page_table(block_table, batch, k_cache)
    in_cache = _lengths(cache_seqlens, batch, page_table.shape[1] * page_size)
    k_pages, v_pages = k_cache.permute(2, 0, 1, 3), v_cache.permute(2, 0, 1, 3)
    if (k is None) != (v is None):
        raise ArgumentError(
            "k and v must be given together; got only one of them. Fix: pass both, or neither"
        )
    rows, scoring, slots = q.flatten(0, 1), Scoring(softmax_scale, softcap, alibi_slopes), None
    spec, window_left = checks.check_layer(rows, k_pages, v_pages), _window_left(window_size, causal)
    if k is not None and v is not None:
        slots = _new_slots(q, k, v, k_cache, page_table, in_cache)
        in_cache = in_cache + k.shape[1]
    elif page_table.is_cpu:
        check_page_ids(page_table.numpy(), in_cache.numpy(), page_size, k_cache.shape[0], name="block_table")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cpu") * seqlen_q
    planned = plan(
        page_table,
        in_cache,
        spec,
        starts,
        causal=causal,
        window_left=window_left,
        backend=backend,
        device=q.device,
    )
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if k is not None and v is not None and slots is not None:
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            checks.check_own_memory(name, cache)
        # A call that is refused writes nothing.
        checks.check_beside_layer(spec, AttentionCall(rows, k_pages, v_pages, out, None, scoring))
        write_kv(k.flatten(0, 1), v.flatten(0, 1), k_pages, v_pages, slots.to(k.device), backend=backend)
    result = planned.run(
        rows, k_pages, v_pages, **scoring._asdict(), out=out, return_state=return_softmax_lse
    )
    if not isinstance(result, SoftmaxState):
        return out.view_as(q)
    return result.out.view_as(q), result.lse.view(batch, seqlen_q, -1).transpose(1, 2)


def _window_left(window_size: tuple[int, int], causal: bool) -> int:
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not pair or any(type(limit) is not int or limit < -1 for limit in window_size):
        raise ArgumentError(
            f"window_size must be (left, right), each −1 (off) or an int of at least 0; got {window_size!r}. "
            "Fix: window_size=(-1, -1)"
        )
    left, right = window_size
    if right != -1 and not (causal and right == 0):
        raise UnsupportedError(
            f"window_size must have no right limit beyond causal's; got {window_size} with causal={causal}. "
            "Fix: window_size=(left, -1), with causal=True to hide later keys"
        )
    return left


def _check_caches(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    layout = "[num_pages, page_size, num_kv_heads, head_dim]"
    heads, head_dim = q.shape[2:]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache, 4, layout)
        checks.check_devices("q", q.device, **{name: cache})
        checks.check_last_dim_contiguous(name, cache)
        if cache.dtype != q.dtype:
            raise DtypeError(
                f"{name} must be {q.dtype} like q; got {describe(cache)}. Fix: {name}.to({q.dtype})"
            )
        if 0 in cache.shape or heads % cache.shape[2] or cache.shape[3] != head_dim:
            raise ShapeError(
                f"{name} must be {layout} with head_dim={head_dim} of q and num_kv_heads a divisor of its {heads} "
                f"heads; got {describe(cache)}. Fix: the cache of this layer in that order"
            )
    if k_cache.shape != v_cache.shape:
        raise ShapeError(
            f"v_cache must be like k_cache, {describe(k_cache)}; got {describe(v_cache)}. Fix: allocate both alike"
        )


def _page_table(block_table: torch.Tensor | None, batch: int, k_cache: torch.Tensor) -> torch.Tensor:
    if block_table is not None:
        layout = "int32 [batch, max_pages]"
        table = check_tensor("block_table", block_table, 2, layout)
        if table.dtype != torch.int32:
            raise DtypeError(
                f"block_table must be {layout}; got {describe(table)}. Fix: block_table.to(torch.int32)"
            )
        check_host(block_table=table)
        if len(table) != batch:
            raise ShapeError(
                f"block_table must be {layout} with batch={batch} of q; got {describe(table)}. "
                "Fix: one row per sequence"
            )
        return table
    if k_cache.shape[0] != batch:
        raise ShapeError(
            f"k_cache must be [batch, max_seqlen, num_kv_heads, head_dim] with batch={batch} when block_table is "
            f"None; got {describe(k_cache)}. Fix: pass block_table for a paged cache"
        )
    return torch.arange(batch, dtype=torch.int32, device="cpu")[:, None]


def _lengths(cache_seqlens: int | torch.Tensor | None, batch: int, capacity: int) -> torch.Tensor:
    """int64 [batch] on the host, each from 0 to capacity."""
    if cache_seqlens is None:
        cache_seqlens = capacity
    layout = f"an int or int32 [batch] = [{batch}]"
    if type(cache_seqlens) is int:
        lowest = highest = cache_seqlens
    elif not isinstance(cache_seqlens, torch.Tensor):
        raise ArgumentError(
            f"cache_seqlens must be {layout}; got {describe(cache_seqlens)}. Fix: the tokens in the cache"
        )
    else:
        check_host(cache_seqlens=cache_seqlens)
        lengths = check_tensor("cache_seqlens", cache_seqlens, 1, layout)
        if lengths.dtype not in (torch.int32, torch.int64) or len(lengths) != batch:
            raise ShapeError(
                f"cache_seqlens must be {layout}; got {describe(lengths)}. Fix: one length per sequence"
            )
        lengths = lengths.to("cpu", torch.int64)
        lowest, highest = (int(lengths.min()), int(lengths.max())) if batch else (0, 0)
    if lowest < 0 or highest > capacity:
        raise ArgumentError(
            f"cache_seqlens must be from 0 to the {capacity} tokens that the cache has room for; got values from "
            f"{lowest} to {highest}. Fix: the tokens in the cache before k and v"
        )
    return torch.full((batch,), cache_seqlens, device="cpu") if type(cache_seqlens) is int else lengths


def _new_slots(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, page_table: torch.Tensor,
    in_cache: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The slots behind each sequence's cached tokens, for k and v."""
    batch, (num_pages, page_size, heads, head_dim) = len(q), k_cache.shape
    for name, rows in (("k", k), ("v", v)):
        check_tensor(name, rows, 4, "[batch, seqlen_new, num_kv_heads, head_dim]")
        checks.check_devices("q", q.device, **{name: rows})
        wanted = [batch, k.shape[1], heads, head_dim]
        if list(rows.shape) != wanted or rows.dtype != q.dtype:
            raise ShapeError(
                f"{name} must be {q.dtype} [batch, seqlen_new, num_kv_heads, head_dim] = {wanted}; "
                f"got {describe(rows)}. Fix: k and v of the same new tokens"
            )
    lengths = in_cache + k.shape[1]
    capacity = page_table.shape[1] * page_size
    if batch and int(lengths.max()) > capacity:
        raise ShapeError(
            f"block_table must have room for cache_seqlens + {k.shape[1]} new tokens; got {page_table.shape[1]} pages "
            f"of {page_size} for {int(lengths.max())} tokens. Fix: give the sequences more pages"
        )
    table = page_table.cpu()
    check_page_ids(table.numpy(), lengths.numpy(), page_size, num_pages, name="block_table")
    positions = in_cache[:, None] + torch.arange(k.shape[1], device="cpu")
    return (table.long().gather(1, positions // page_size) * page_size + positions % page_size).flatten()
