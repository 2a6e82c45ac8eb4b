"""The public operator: same values eagerly, planned and compiled; what is asked for is obeyed."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_accurate, exact, plain
from mixed_batch import PAGE, SHAPE, close, mixed, paged
from support import make_batch, plan_for
from torch.nn.functional import pad

import quire

# One worker compiles the kernels of this shape, not both.
pytestmark = pytest.mark.xdist_group("attention-float32-d16-g2")


# --- one call, and a plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize(
    "rules", [{}, {"causal": False, "window_left": 3, "softcap": 2.0}, {"softmax_scale": 0.1}], ids=str
)
def test_every_backend_computes_the_reference_on_a_mixed_batch(backend, rules):
    batch = mixed()
    state = paged(batch, backend=backend, return_state=True, **rules)
    assert_accurate(state, exact(batch, **rules), plain(batch, **rules), batch.largest_value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_planning_once_gives_the_bits_of_planning_on_the_way(backend):
    batch = mixed()
    planned = plan_for(batch, backend=backend).run(*batch.pages, return_state=True)
    at_once = paged(batch, backend=backend, return_state=True)
    assert torch.equal(planned.out, at_once.out)
    assert torch.equal(planned.lse, at_once.lse)


def test_without_cu_seqlens_q_every_sequence_has_one_query():
    batch = make_batch(SHAPE, [9, 3, 17], page_size=PAGE)
    out = quire.paged_attention(*batch.pages, batch.page_table, batch.seq_lens)
    close(out, batch)


def test_one_plan_serves_layers_with_different_pages():
    first, second = mixed(), mixed()
    second.k_pages.mul_(-1.0)
    second.v_pages.add_(1.0)
    plan = plan_for(first)
    close(plan.run(*first.pages), first)
    close(plan.run(*second.pages), second)


def test_a_batch_of_nothing_gives_nothing():
    batch = make_batch(SHAPE, [], [], page_size=PAGE)
    state = paged(batch, return_state=True)
    assert state.out.shape == (0, 4, 16)
    assert state.lse.shape == (0, 4)


def test_int64_lengths_are_as_good_as_int32():
    batch = mixed()
    wide = (batch.page_table, batch.seq_lens.long(), batch.cu_seqlens_q.long())
    assert torch.equal(quire.paged_attention(*batch.pages, *wide), paged(batch))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_may_be_any_view(dtype):
    batch = mixed()
    wanted = paged(batch)
    for name in ("seq_lens", "cu_seqlens_q"):
        lengths = getattr(batch, name).to(dtype)
        setattr(batch, name, torch.stack([lengths, lengths - 7], 1)[:, 0])
        assert not getattr(batch, name).is_contiguous()
    assert torch.equal(paged(batch), wanted)


def test_lengths_that_change_later_change_no_plan():
    batch = mixed()
    wanted = paged(batch)
    plan = plan_for(batch)
    batch.seq_lens.fill_(1 << 30)
    batch.cu_seqlens_q.fill_(-1)
    assert torch.equal(plan.run(*batch.pages), wanted)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("columns", [0, 5000])
def test_tensors_that_are_refilled_or_resized_later_change_no_plan(backend, columns):
    """A table of 5,000 columns more was the caller's own memory once."""
    batch = mixed()
    wanted = paged(batch, backend=backend)
    batch.page_table = pad(batch.page_table, (0, columns), value=-1)
    plan = plan_for(batch, backend=backend)
    for tensor in batch.lengths:
        tensor.fill_(10**6)
        tensor.resize_(1 << 20)
    assert torch.equal(plan.run(*batch.pages), wanted)


@pytest.mark.parametrize("spare", [0, 2048])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("view", ["transposed", "every other column", "columns of a wider table"])
def test_a_page_table_may_be_any_view(backend, view, spare):
    batch = mixed()
    wanted = paged(batch, backend=backend)
    table = pad(batch.page_table, (0, spare), value=10**6)
    if view == "transposed":
        batch.page_table = table.t().contiguous().t()
    elif view == "every other column":
        spread = torch.full((table.shape[0], 2 * table.shape[1]), 10**6, dtype=torch.int32)
        spread[:, ::2] = table
        batch.page_table = spread[:, ::2]
    else:
        wide = torch.full((table.shape[0], table.shape[1] + 3), 10**6, dtype=torch.int32)
        wide[:, 1 : 1 + table.shape[1]] = table
        batch.page_table = wide[:, 1 : 1 + table.shape[1]]
    assert not batch.page_table.is_contiguous()
    assert torch.equal(paged(batch, backend=backend), wanted)


# --- results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_is_written_and_returned_itself(backend):
    batch = mixed()
    wanted = paged(batch, backend=backend)
    given = torch.full_like(batch.q, math.nan)
    assert paged(batch, backend=backend, out=given) is given
    assert torch.equal(given, wanted)

    given.fill_(math.nan)
    assert plan_for(batch, backend=backend).run(*batch.pages, out=given) is given
    assert torch.equal(given, wanted)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_may_be_a_strided_view_and_nothing_beside_it_is_written(backend):
    batch = mixed()
    tokens, heads, head_dim = batch.q.shape
    around = torch.full((heads + 2, tokens + 1, head_dim + 3), 7.0)
    view = around[1:-1, :-1, 2 : head_dim + 2].transpose(0, 1)

    state = paged(batch, backend=backend, out=view, return_state=True)

    assert state.out is view
    assert torch.equal(view, paged(batch, backend=backend))
    view.fill_(7.0)
    assert (around == 7.0).all()


@pytest.mark.parametrize("view", ["cut out of a fused projection", "heads first"])
def test_queries_may_be_any_view_and_out_is_contiguous_all_the_same(view):
    batch = mixed(strided_q=view != "heads first")
    if view == "heads first":
        batch.q = batch.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not batch.q.is_contiguous()
    out = paged(batch)
    assert out.is_contiguous()
    batch.q = batch.q.contiguous()
    assert torch.equal(paged(batch), out)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_state_is_asked_for_and_changes_no_bit_of_out(backend):
    batch = mixed()
    state = paged(batch, backend=backend, return_state=True)
    assert isinstance(state, quire.SoftmaxState)
    assert state.lse.dtype == torch.float32
    torch.testing.assert_close(state.lse, exact(batch).lse, atol=2e-5, rtol=2e-6)
    assert torch.equal(state.out, paged(batch, backend=backend))
    assert (state.out[-1] == 0).all()
    assert state.lse[-1].isneginf().all()


# --- the plan's own facts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4, 7])
def test_index_lists_are_what_a_loop_over_pages_collects(page_size):
    batch = make_batch(SHAPE, [9, 0, 7, 14, 1], [1, 0, 7, 3, 1], page_size=page_size)
    plan = plan_for(batch, backend="reference")

    indptr, indices, offsets, valid = [0], [], [], []
    for row, seq_len in zip(batch.page_table.tolist(), batch.seq_lens.tolist(), strict=True):
        for start in range(0, seq_len, page_size):
            indices.append(row[start // page_size])
            offsets.append(start)
            valid.append(min(page_size, seq_len - start))
        indptr.append(len(indices))

    for name, wanted in (
        ("page_indptr", indptr),
        ("page_indices", indices),
        ("page_offsets", offsets),
        ("page_valid_lengths", valid),
    ):
        got = getattr(plan, name)
        assert got.dtype == torch.int32
        assert got.tolist() == wanted, name


def test_a_plan_knows_its_step():
    batch = mixed()
    plan = plan_for(batch)
    assert (plan.num_tokens, plan.max_q_len, plan.backend) == (13, 6, "cpu")
    assert plan.device == torch.device("cpu")
    assert plan.spec == SHAPE.spec(PAGE)


def test_a_plan_made_where_tensors_default_to_meta_still_runs():
    spec = quire.AttentionSpec(4, 2, 16, page_size=4, dtype=torch.float32)
    k, v, q = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16), torch.randn(1, 4, 16)
    table, lens = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    expected = quire.plan(table, lens, spec).run(q, k, v)
    with torch.device("meta"):
        plan = quire.plan(table, lens, spec)
    torch.testing.assert_close(plan.run(q, k, v), expected, rtol=0, atol=0)


def test_layers_of_one_plan_may_lie_differently_in_memory_and_score_differently():
    """What a plan keeps of a call it accepted is never taken for another's."""
    plan = plan_for(mixed())
    sinks, slopes = torch.randn(4), torch.rand(4)
    for rules in ({}, {"softmax_scale": 0.3}, {"softcap": 2.0}, {"sinks": sinks}, {"alibi_slopes": slopes}):
        for how in ({}, {"layout": "nhd"}, {"layout": "gaps"}, {"layout": "apart"}, {"strided_q": True}):
            batch = mixed(**how)
            for return_state in (True, False):
                result = plan.run(*batch.pages, return_state=return_state, **rules)
                close(result.out if return_state else result, batch, **rules)
            around = torch.full((13, 6, 20), 7.0)
            close(plan.run(*batch.pages, out=around[:, 1:5, 2:18], **rules), batch, **rules)
