"""The specification itself: against PyTorch's own attention, and against sums done by hand."""

import math

import numpy as np
import pytest
import torch
from accuracy import exact, plain, step_of
from support import Shape, attend, features, give_back_unseen, make_batch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import quire
from quire.kernels import reference
from quire.kernels.call import AttentionCall

F32 = torch.float32
LN = math.log


def by_hand(scores, values, **call):
    """One query of one head with head_dim 1: q = 1, so that keys are the scores themselves."""
    n = len(scores)
    keys = torch.tensor(scores).view(1, 1, n, 1)
    value_pages = torch.tensor(values).view(1, 1, n, 1)
    rules = {name: call.pop(name) for name in ("causal", "window_left") if name in call}
    q_len = call.pop("q_len", 1)
    state = quire.paged_attention(
        torch.ones(q_len, 1, 1),
        keys,
        value_pages,
        torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([n], dtype=torch.int32),
        torch.tensor([0, q_len], dtype=torch.int32),
        return_state=True,
        backend="reference",
        **rules,
        **call,
    )
    return state.out[:, 0, 0].tolist(), state.lse[:, 0].tolist()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 3])
def test_it_equals_pytorchs_attention_over_the_gathered_pages(causal, group):
    batch = make_batch(Shape(F32, 16, group), [7, 40, 40], [7, 40, 11], page_size=3, share=0.3)
    out = exact(batch, causal=causal).out
    for i, (seq_len, first, last) in enumerate([(7, 0, 7), (40, 7, 47), (40, 47, 58)]):
        pages = batch.page_table[i, : -(-seq_len // 3)].long()
        k, v = (p[:, pages].flatten(1, 2)[:, :seq_len].double() for p in (batch.k_pages, batch.v_pages))
        q = batch.q[first:last].transpose(0, 1).double()
        q_len = last - first
        mask = torch.ones(q_len, seq_len, dtype=torch.bool).tril(seq_len - q_len) if causal else None
        wanted = sdpa(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(out[first:last], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_it_equals_attention_written_key_by_key_with_every_feature(seed):
    batch = make_batch(Shape(F32, 5, 2), [3, 20, 9, 0], [5, 1, 9, 2], page_size=4, share=0.3, seed=seed)
    asked = {name: (seed >> i) % 2 == 0 for i, name in enumerate(["window", "softcap", "alibi"])}
    rules = features(batch, sinks=seed % 3 == 0, tree=seed % 2 == 1, seed=seed, **asked)
    rules["causal"] = seed % 4 != 3
    torch.testing.assert_close(exact(batch, **rules).out.float(), plain(batch, **rules), atol=2e-6, rtol=0)


def test_softmax_weights_and_lse_are_those_of_the_formula():
    out, lse = by_hand([LN(1.0), LN(3.0)], [10.0, 20.0])
    assert out == pytest.approx([17.5])
    assert lse == pytest.approx([LN(4.0)])


def test_softmax_scale_multiplies_the_scores():
    out, lse = by_hand([LN(1.0), LN(3.0)], [10.0, 20.0], softmax_scale=2.0)
    assert out == pytest.approx([19.0])
    assert lse == pytest.approx([LN(10.0)])


def test_the_scale_of_none_is_one_over_the_root_of_head_dim():
    batch = make_batch(Shape(F32, 16), [30])
    given, default = exact(batch, softmax_scale=0.25), exact(batch)
    assert torch.equal(given.out, default.out)


def test_causal_rows_see_the_keys_up_to_their_own():
    out, _ = by_hand([0.0] * 4, [1.0, 2.0, 3.0, 4.0], q_len=3)
    assert out == pytest.approx([1.5, 2.0, 2.5])
    out, _ = by_hand([0.0] * 4, [1.0, 2.0, 3.0, 4.0], q_len=3, causal=False)
    assert out == pytest.approx([2.5, 2.5, 2.5])


def test_a_window_counts_the_keys_behind_the_query_and_not_itself():
    out, _ = by_hand([0.0] * 4, [1.0, 2.0, 3.0, 4.0], q_len=2, window_left=1)
    assert out == pytest.approx([2.5, 3.5])
    out, _ = by_hand([0.0] * 4, [1.0, 2.0, 3.0, 4.0], q_len=2, window_left=1, causal=False)
    assert out == pytest.approx([3.0, 3.5])  # it bounds what lies behind, nothing ahead


def test_pages_before_a_window_are_never_read():
    rules = {"window_left": 5, "backend": "reference"}
    batch = make_batch(Shape(F32, 16, 2), [7, 40, 21], [7, 1, 11], page_size=3)
    scoring = features(batch, alibi=True, tree=True)
    whole = attend(batch, **rules, **scoring)
    assert give_back_unseen(batch, 5)
    for part, wanted in zip(attend(batch, **rules, **scoring), whole, strict=True):
        assert torch.equal(part, wanted)


def test_softcap_bounds_scores_by_a_tanh():
    out, lse = by_hand([0.0, 2.0 * math.atanh(LN(3.0) / 2.0)], [10.0, 20.0], softcap=2.0)
    assert out == pytest.approx([17.5])
    assert lse == pytest.approx([LN(4.0)])


def test_alibi_takes_slope_times_distance_off_a_score():
    out, lse = by_hand([0.0, 0.0, 0.0], [1.0, 2.0, 4.0], alibi_slopes=torch.tensor([LN(2.0)]))
    assert out == pytest.approx([(0.25 * 1 + 0.5 * 2 + 4) / 1.75])
    assert lse == pytest.approx([LN(1.75)])


def test_alibi_is_symmetric_where_later_keys_are_seen():
    out, _ = by_hand([0.0] * 3, [1.0, 2.0, 4.0], q_len=3, causal=False, alibi_slopes=torch.tensor([LN(2.0)]))
    assert out == pytest.approx([(1 + 1 + 1) / 1.75, (0.5 + 2 + 2) / 2, (0.25 + 1 + 4) / 1.75])


def test_softcap_comes_before_alibi():
    raw = 2.0 * math.atanh(LN(3.0) / 2.0)
    out, _ = by_hand([raw, 0.0], [10.0, 20.0], softcap=2.0, alibi_slopes=torch.tensor([LN(3.0)]))
    assert out == pytest.approx([15.0])  # log 3 − log 3 · 1 = 0


def test_a_sink_takes_its_share_and_gives_no_value():
    out, lse = by_hand([LN(1.0), LN(3.0)], [10.0, 20.0], sinks=torch.tensor([LN(4.0)]))
    assert out == pytest.approx([8.75])
    assert lse == pytest.approx([LN(8.0)])


def test_a_tree_mask_hides_new_keys_only():
    mask = torch.tensor([[True, False], [False, True]])
    out, _ = by_hand([0.0] * 4, [1.0, 2.0, 3.0, 4.0], q_len=2, tree_mask=mask)
    assert out == pytest.approx([2.0, 7 / 3])
    out, _ = by_hand([0.0] * 4, [1.0, 2.0, 3.0, 4.0], q_len=2, tree_mask=~mask)
    assert out == pytest.approx([1.5, 2.0])  # a mask never shows what causality hides


@pytest.mark.parametrize("sink", [-math.inf, 1.25])
def test_rows_without_a_key_are_zero_and_their_lse_is_the_sinks(sink):
    sinks = None if math.isinf(sink) else torch.tensor([sink])
    out, lse = by_hand([0.0, 0.0], [1.0, 2.0], q_len=4, sinks=sinks)
    assert out[:2] == [0.0, 0.0]
    assert lse[:2] == [sink, sink]
    out, lse = by_hand([0.0], [1.0], tree_mask=torch.tensor([[False]]), sinks=sinks)
    assert (out, lse) == ([0.0], [sink])


def test_an_empty_sequence_reads_no_page():
    batch = make_batch(Shape(F32, 4), [0, 3], [2, 1])
    state = attend(batch, backend="reference")
    assert (state.out[:2] == 0).all()
    assert state.lse[:2].isneginf().all()
    assert state.out[2].abs().min() > 0


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_quantised_pages_are_read_as_value_times_scale(kv_dtype):
    batch = make_batch(Shape(F32, 8, 2, kv_dtype=kv_dtype), [21, 6], page_size=4)
    wide = make_batch(Shape(F32, 8, 2), [21, 6], page_size=4)
    wide.q, wide.page_table = batch.q, batch.page_table
    wide.k_pages = batch.k_pages.float() * batch.scales["k_scale"][..., None]
    wide.v_pages = batch.v_pages.float() * batch.scales["v_scale"][..., None]
    torch.testing.assert_close(exact(batch).out, exact(wide).out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kv_dtype", "step"), [("int8", 0.5 / 127), ("fp8_e4m3", 2**-4), ("fp8_e5m2", 2**-3)]
)
def test_quantising_keeps_each_element_within_half_a_step_and_the_largest_exactly(kv_dtype, step):
    dtype = quire.spec.QUANTIZED_DTYPES[kv_dtype]
    x = torch.randn(50, 3, 24) * torch.logspace(-3, 3, 50)[:, None, None]
    values, scale = reference.quantize(x, dtype)
    assert values.dtype == dtype
    assert scale.shape == (50, 3)
    back = values.double() * scale[..., None].double()
    largest = x.abs().amax(-1, keepdim=True).double()
    # int8 has equal steps over the row; fp8 steps are relative to the element, down to its smallest ones.
    error, allowed = (back - x).abs(), step * (largest if kv_dtype == "int8" else x.abs().double())
    assert (error <= allowed * 1.0001 + largest * 2e-5).all()
    at = x.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(back.gather(-1, at), x.double().gather(-1, at), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", quire.spec.QUANTIZED_DTYPES.values())
def test_a_row_of_zeros_is_quantised_to_zeros(dtype):
    values, scale = reference.quantize(torch.zeros(2, 3, 4), dtype)
    assert (values.float() == 0).all()
    assert (scale == 0).all()


def test_write_kv_fills_the_mapped_slots_and_no_other():
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    k_pages, v_pages = torch.full((2, 3, 2, 4), math.nan), torch.full((2, 3, 2, 4), math.nan)
    reference.write_kv(k, v, k_pages, v_pages, torch.tensor([5, -1, 2]), None, None)
    for rows, pages in ((k, k_pages), (v, v_pages)):
        assert torch.equal(pages[:, 2, 1], rows[0])
        assert torch.equal(pages[:, 1, 0], rows[2])
        assert pages.isnan().sum() == 4 * 8


def test_a_step_may_be_planned_for_any_number_of_sequences_without_queries():
    batch = make_batch(Shape(F32, 4), [3, 5, 2], [0, 2, 0])
    state = exact(batch)
    assert state.out.isfinite().all()
    alone = make_batch(Shape(F32, 4), [5], [2])
    alone.q, alone.k_pages, alone.v_pages = batch.pages
    alone.page_table = batch.page_table[1:2]
    assert torch.equal(exact(alone).out, state.out)


def test_an_lse_is_written_only_where_asked_for():
    batch = make_batch(Shape(F32, 4), [3])
    out = torch.empty_like(batch.q)
    reference.attend(step_of(batch), AttentionCall(*batch.pages, out, None))
    assert np.isfinite(out.numpy()).all()


# --- values narrower than keys -----------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_values_may_be_the_first_columns_of_keys(kv_dtype):
    """As in MLA: the result is the first columns of attention over values that are the keys themselves."""
    narrow = 5
    batch = make_batch(Shape(F32, 8, kv_dtype=kv_dtype), [9, 0, 3], [2, 1, 3], page_size=4)
    batch.v_pages = batch.k_pages
    if kv_dtype:
        batch.scales["v_scale"] = batch.scales["k_scale"]
    whole = attend(batch, backend="reference")

    state = quire.paged_attention(
        batch.q, batch.k_pages, batch.k_pages[..., :narrow], *batch.lengths,
        return_state=True, backend="reference", **batch.scales,
    )  # fmt: skip

    assert state.out.shape == (*batch.q.shape[:2], narrow)
    assert torch.equal(state.out, whole.out[..., :narrow])
    assert torch.equal(state.lse, whole.lse)


def test_a_plan_and_a_pool_of_narrow_values():
    spec = quire.AttentionSpec(4, 2, 8, page_size=4, dtype=F32, value_dim=3)
    pool = quire.KVPool(spec, num_layers=1, num_pages=3)
    assert pool.k.shape[-1] == 8
    assert pool.v.shape[-1] == 3
    assert pool.nbytes == sum(x.untyped_storage().nbytes() for x in (pool.k, pool.v))
    pool.k.fill_(math.nan)
    pool.v.fill_(math.nan)
    k, v, q = torch.randn(6, 2, 8), torch.randn(6, 2, 3), torch.randn(1, 4, 8)
    slots = torch.tensor([8, 9, 10, 11, 0, 1])
    quire.write_kv(k, v, *pool.layer(0), slots, backend="reference")
    plan = quire.plan(torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([6]), spec, backend="reference")

    out = plan.run(q, *pool.layer(0))

    weights = torch.softmax(torch.einsum("hd,thd->ht", q[0], k.repeat_interleave(2, 1)) * 8**-0.5, -1)
    torch.testing.assert_close(out[0], torch.einsum("ht,thd->hd", weights, v.repeat_interleave(2, 1)))
    given = torch.full_like(out, 7.0)
    assert torch.equal(plan.run(q, *pool.layer(0), out=given), out)
    with pytest.raises(quire.ShapeError, match=r"out must be .*\[1, 4, 3\]"):
        plan.run(q, *pool.layer(0), out=torch.empty_like(q))
    with pytest.raises(quire.ShapeError, match=r"v_pages must be \[2, num_pages, 4, 3\] as planned"):
        plan.run(q, pool.k[0], pool.k[0])


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_kernels_that_lack_narrow_values_say_so(backend):
    spec = quire.AttentionSpec(4, 2, 8, page_size=4, dtype=F32, value_dim=3)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(
        quire.UnsupportedError, match=r"values must be as wide as keys; got value_dim=3\. Fix"
    ):
        quire.plan(table, lens, spec, backend=backend)
    k_pages = torch.randn(2, 1, 4, 8)
    with pytest.raises(
        quire.UnsupportedError, match=r"values must be as wide as keys; got value_dim=3\. Fix"
    ):
        quire.paged_attention(torch.randn(1, 4, 8), k_pages, k_pages[..., :3], table, lens, backend=backend)
    with pytest.raises(
        quire.UnsupportedError, match=r"values must be as wide as keys; got value_dim=3\. Fix"
    ):
        quire.write_kv(
            torch.randn(1, 2, 8), torch.randn(1, 2, 3), k_pages, k_pages[..., :3], torch.tensor([0]), backend=backend
        )  # fmt: skip
