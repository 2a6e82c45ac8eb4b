"""flash-attn's signature computes what flash-attn documents, shown against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import quire
from quire import flash_attn_with_kvcache

PAGE, PAGES, KV_HEADS, HEADS, DIM = 16, 12, 2, 4, 16


@pytest.fixture
def cache():
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, PAGES, PAGE, KV_HEADS, DIM, generator=generator)
    block_table = torch.randperm(PAGES, generator=generator)[:6].view(2, 3).int()
    return k, v, block_table


def sequence(cache_tensor, pages, length):
    """[num_kv_heads, length, head_dim] of one sequence."""
    return cache_tensor[pages.long()].flatten(0, 1)[:length].transpose(0, 1)


def expected(q, k, v, causal):
    """q [seqlen_q, heads, dim] against k, v [kv_heads, seq_len, dim], queries aligned with the end."""
    visible = torch.ones(q.shape[0], k.shape[1], dtype=torch.bool)
    if causal:
        visible = visible.tril(k.shape[1] - q.shape[0])
    out = scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=visible, enable_gqa=True)
    return out.transpose(0, 1)


@pytest.mark.parametrize("causal", [True, False])
def test_new_keys_are_appended_and_attended(cache, causal):
    k_cache, v_cache, block_table = cache
    q, k, v = (
        torch.randn(2, 3, HEADS, DIM),
        torch.randn(2, 3, KV_HEADS, DIM),
        torch.randn(2, 3, KV_HEADS, DIM),
    )
    lengths = torch.tensor([20, 31], dtype=torch.int32)

    out, lse = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=lengths,
        block_table=block_table,
        causal=causal,
        return_softmax_lse=True,
    )

    for i, length in enumerate((23, 34)):
        keys, values = (sequence(x, block_table[i], length) for x in (k_cache, v_cache))
        torch.testing.assert_close(keys[:, -3:], k[i].transpose(0, 1))
        torch.testing.assert_close(out[i], expected(q[i], keys, values, causal))
        scores = torch.einsum("qhd,hkd->hqk", q[i], keys.repeat_interleave(2, 0)) * DIM**-0.5
        if causal:
            scores = scores.masked_fill(
                ~torch.ones(3, length, dtype=torch.bool).tril(length - 3), float("-inf")
            )
        torch.testing.assert_close(lse[i], scores.logsumexp(-1))


def test_a_contiguous_cache_is_one_page_per_sequence(cache):
    k_cache, v_cache, _ = cache
    q = torch.randn(PAGES, 1, HEADS, DIM)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=9, causal=True)
    for i in range(PAGES):
        keys, values = k_cache[i, :9].transpose(0, 1), v_cache[i, :9].transpose(0, 1)
        torch.testing.assert_close(out[i], expected(q[i], keys, values, True))


def test_a_left_window_counts_keys_before_the_query(cache):
    k_cache, v_cache, block_table = cache
    q = torch.randn(2, 1, HEADS, DIM)
    lengths = torch.tensor([30, 40], dtype=torch.int32)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, block_table=block_table, causal=True, window_size=(4, 0)
    )
    for i, length in enumerate((30, 40)):
        keys, values = (sequence(x, block_table[i], length)[:, -5:] for x in (k_cache, v_cache))
        torch.testing.assert_close(out[i], expected(q[i], keys, values, False))


@pytest.mark.parametrize("name", ["rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad"])
def test_what_belongs_to_the_caller_is_refused(cache, name):
    k_cache, v_cache, block_table = cache
    with pytest.raises(quire.UnsupportedError, match=name):
        flash_attn_with_kvcache(
            torch.randn(2, 1, HEADS, DIM), k_cache, v_cache, cache_seqlens=8, block_table=block_table,
            **{name: torch.zeros(1)},
        )  # fmt: skip


def test_a_right_window_is_refused(cache):
    k_cache, v_cache, block_table = cache
    with pytest.raises(quire.UnsupportedError, match="window_size"):
        flash_attn_with_kvcache(
            torch.randn(2, 1, HEADS, DIM),
            k_cache,
            v_cache,
            cache_seqlens=8,
            block_table=block_table,
            window_size=(4, 4),
        )


def test_misfits_are_refused_and_nothing_is_written(cache):
    k_cache, v_cache, block_table = cache
    before = k_cache.clone()
    q, new = torch.randn(2, 1, HEADS, DIM), torch.randn(2, 1, KV_HEADS, DIM)
    full = torch.tensor([10, 3 * PAGE], dtype=torch.int32)
    with pytest.raises(quire.ShapeError, match="room"):
        flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=full, block_table=block_table)
    with pytest.raises(quire.ArgumentError, match="together"):
        flash_attn_with_kvcache(q, k_cache, v_cache, new, cache_seqlens=8, block_table=block_table)
    with pytest.raises(quire.ShapeError, match="cache_seqlens"):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=full[:1], block_table=block_table)
    with pytest.raises(quire.ShapeError, match="block_table"):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=8)
    torch.testing.assert_close(k_cache, before, rtol=0, atol=0)


OWN = {
    "k_cache: three heads": ("k_cache", lambda c: {"k_cache": c["k_cache"][:, :, :1].repeat(1, 1, 3, 1)}),
    "k_cache: heads first": ("k_cache", lambda c: {"k_cache": c["k_cache"].permute(2, 0, 1, 3)}),
    "k_cache: bfloat16": ("k_cache", lambda c: {"k_cache": c["k_cache"].bfloat16()}),
    "k_cache: a list": ("k_cache", lambda c: {"k_cache": []}),
    "v_cache: fewer pages": ("v_cache", lambda c: {"v_cache": c["v_cache"][1:]}),
    "v_cache: another head_dim": ("v_cache", lambda c: {"v_cache": c["v_cache"][..., 1:]}),
    "cache_seqlens: a list": ("cache_seqlens", lambda c: {"cache_seqlens": [8, 8]}),
    "cache_seqlens: a bool": ("cache_seqlens", lambda c: {"cache_seqlens": True}),
    "cache_seqlens: float": ("cache_seqlens", lambda c: {"cache_seqlens": torch.tensor([8.0, 8.0])}),
    "cache_seqlens: negative": ("cache_seqlens", lambda c: {"cache_seqlens": -1}),
    "cache_seqlens: one negative": ("cache_seqlens", lambda c: {"cache_seqlens": torch.tensor([8, -1])}),
    "cache_seqlens: too long": ("cache_seqlens", lambda c: {"cache_seqlens": 3 * PAGE + 1}),
    "cache_seqlens: meta": ("cache_seqlens", lambda c: {"cache_seqlens": torch.ones(2, device="meta").int()}),
    "cache_seqlens: beyond 64 bits": ("cache_seqlens", lambda c: {"cache_seqlens": 2**70}),
    "k_cache: strided": ("k_cache", lambda c: {"k_cache": c["k_cache"].repeat_interleave(2, -1)[..., ::2]}),
    "k_cache: meta": ("k_cache", lambda c: {"k_cache": c["k_cache"].to("meta")}),
    "v_cache: meta": ("v_cache", lambda c: {"v_cache": c["v_cache"].to("meta")}),
    "window_size: None": ("window_size", lambda c: {"window_size": None}),
    "window_size: one number": ("window_size", lambda c: {"window_size": 3}),
    "window_size: below -1": ("window_size", lambda c: {"window_size": (-5, -1)}),
    "softcap: negative": ("softcap", lambda c: {"softcap": -1.0}),
    "softmax_scale: nan": ("softmax_scale", lambda c: {"softmax_scale": float("nan")}),
    "alibi_slopes: one": ("alibi_slopes", lambda c: {"alibi_slopes": torch.ones(1)}),
    "causal: None": ("causal", lambda c: {"causal": None}),
    "block_table: int64": ("block_table", lambda c: {"block_table": c["block_table"].long()}),
    "block_table: a list": ("block_table", lambda c: {"block_table": c["block_table"].tolist()}),
    "block_table: one row": ("block_table", lambda c: {"block_table": c["block_table"][:1]}),
    "block_table: flat": ("block_table", lambda c: {"block_table": c["block_table"].flatten()}),
    "block_table: no such page": ("block_table", lambda c: {"block_table": c["block_table"] + PAGES}),
    "block_table: negative": ("block_table", lambda c: {"block_table": c["block_table"] - PAGES}),
}


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize(("name", "change"), OWN.values(), ids=OWN.keys())
def test_errors_name_its_own_arguments(cache, name, change, appends):
    k_cache, v_cache, block_table = cache
    given = {"k_cache": k_cache, "v_cache": v_cache, "block_table": block_table, "cache_seqlens": 8}
    new = torch.randn(2, 1, KV_HEADS, DIM)
    before = k_cache.clone()
    with pytest.raises(quire.ArgumentError, match=rf"^{name} must .*; got .*Fix: "):
        flash_attn_with_kvcache(
            torch.randn(2, 1, HEADS, DIM), **{**given, **change(given)}, **({"k": new, "v": new} if appends else {})
        )  # fmt: skip
    assert torch.equal(k_cache, before)


@pytest.mark.parametrize("refused", [{"window_size": (2, 3)}, {"backend": "triton"}])
def test_a_call_that_is_refused_appends_nothing(cache, refused):
    k_cache, v_cache, block_table = cache
    before, new = k_cache.clone(), torch.randn(2, 1, KV_HEADS, DIM)
    q, given = torch.randn(2, 1, HEADS, DIM), {"cache_seqlens": 8, "block_table": block_table}
    with pytest.raises(quire.UnsupportedError):
        flash_attn_with_kvcache(q, k_cache, v_cache, new, new, **given, **refused)
    assert torch.equal(k_cache, before)


def test_queries_may_be_one_row_for_all_where_keys_are_appended(cache):
    k_cache, v_cache, block_table = cache
    q, new = torch.randn(1, 1, HEADS, DIM).expand(2, 1, HEADS, DIM), torch.randn(2, 1, KV_HEADS, DIM)
    got, wanted = (
        flash_attn_with_kvcache(rows, k_cache, v_cache, new, new, cache_seqlens=8, block_table=block_table)
        for rows in (q, q.contiguous())
    )
    assert torch.equal(got, wanted)


def test_a_cache_that_overlaps_itself_is_read_and_not_appended_to(cache):
    k_cache, v_cache, block_table = cache
    q, new = torch.randn(2, 1, HEADS, DIM), torch.randn(2, 1, KV_HEADS, DIM)
    one, given = k_cache[:1].expand(k_cache.shape), {"cache_seqlens": 8, "block_table": block_table}
    wanted = flash_attn_with_kvcache(q, one.contiguous(), v_cache, **given)
    assert torch.equal(flash_attn_with_kvcache(q, one, v_cache, **given), wanted)
    with pytest.raises(quire.ShapeError, match=r"^k_cache must have memory of its own"):
        flash_attn_with_kvcache(q, one, v_cache, new, new, **given)


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("wrong", ["heads", "dtype", "batch", "tokens"])
def test_new_tokens_that_do_not_fit_are_named(cache, name, wrong):
    k_cache, v_cache, block_table = cache
    new = torch.randn(2, 2, KV_HEADS, DIM)
    bad = {"heads": new[:, :, :1], "dtype": new.half(), "batch": new[:1], "tokens": new[:, :1]}[wrong]
    given = {"k": new, "v": new, name: bad}
    if (name, wrong) == ("k", "tokens"):
        name = "v"  # k's number of tokens is the one that v is compared with
    with pytest.raises(quire.ShapeError, match=rf"^{name} must .*; got .*Fix: "):
        flash_attn_with_kvcache(
            torch.randn(2, 1, HEADS, DIM), k_cache, v_cache, **given, cache_seqlens=8, block_table=block_table
        )
