"""Rows in and rows out: scales through any strides; out 0 and lse the sink's logit, or −inf, where no key is seen."""

import math
from unittest import mock

import pytest
import torch
from support import Shape, make_batch, plan_for

from quire.planning import work_list

SHAPE = Shape(torch.float32, 16, 3)  # compiled by other modules too
own_worker = pytest.mark.xdist_group("decode-float32-same-d16-g3")
SINKS = torch.tensor([0.1, -3.7, 200.0, -1e-20, 3e38, -math.inf])


def run(seq_lens, q_lens, workers, sinks, tree_mask=None, **rules):
    batch = make_batch(SHAPE, seq_lens, q_lens)
    plan = plan_for(batch, workers, **rules)
    return plan, plan.run(*batch.pages, sinks=sinks, tree_mask=tree_mask, return_state=True)


def assert_saw_nothing(state, rows, sinks):
    wanted = torch.full((6,), -math.inf) if sinks is None else sinks
    assert torch.equal(state.out[rows], torch.zeros(len(rows), 6, 16))
    assert torch.equal(state.lse[rows], wanted.expand(len(rows), 6))


@own_worker
@pytest.mark.parametrize("sinks", [SINKS, None], ids=["sinks", "no sinks"])
@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
def test_empty_sequences_and_hidden_first_keys_in_decode(sinks, invariant):
    mask = torch.ones(4, 1, dtype=torch.bool)
    mask[3] = False  # the only key of the last sequence
    _, state = run([0, 700, 0, 1], None, 5, sinks, mask, batch_invariant=invariant)
    assert_saw_nothing(state, [0, 2, 3], sinks)
    assert state.lse[1].isfinite().sum() >= 5  # all but perhaps one whose sink is 3e38


@own_worker
@pytest.mark.parametrize("sinks", [SINKS, None], ids=["sinks", "no sinks"])
@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
def test_more_queries_than_keys(sinks, invariant):
    _, state = run([3, 0, 40], [9, 4, 2], 3, sinks, batch_invariant=invariant)
    assert_saw_nothing(state, [0, 1, 2, 3, 4, 5, 9, 10, 11, 12], sinks)


@own_worker
@pytest.mark.parametrize("sinks", [SINKS, None], ids=["sinks", "no sinks"])
def test_rows_without_keys_in_a_tile_that_is_split(sinks):
    """A tree mask hides all keys from two rows of a prompt whose tiles are merged from parts."""
    mask = torch.ones(300, 300, dtype=torch.bool)
    mask[[7, 290]] = False
    with mock.patch.object(work_list, "INVARIANT_KV_SPLIT", 128):
        for workers, invariant in ((1, False), (40, False), (5, True)):
            plan, state = run([300], [300], workers, sinks, mask, batch_invariant=invariant)
            assert (plan.step.prefill.num_merges > 0) == (workers > 1)
            assert_saw_nothing(state, [7, 290], sinks)
            seen = torch.tensor([i for i in range(300) if i not in (7, 290)])
            assert state.lse[seen, :2].isfinite().all()


@pytest.mark.xdist_group("decode-bfloat16-int8-d16-g3")
@pytest.mark.parametrize("q_lens", [None, [20, 90, 1]], ids=["decode", "prefill"])
def test_given_scales_are_read_through_strides_of_zero(q_lens):
    """One for each head, and one for all: the bits of the same scales for every token."""
    batch = make_batch(Shape(torch.bfloat16, 16, 3, "int8"), [300, 90, 7], q_lens, page_size=5)
    plan, sizes = plan_for(batch, 3), batch.k_pages.shape[:3]
    for given in (torch.tensor([0.02, 0.03]), torch.tensor([0.02]), torch.tensor(0.02)):
        each = given.view(-1, 1, 1).expand(sizes).contiguous()
        wanted = plan.run(*batch.pages, k_scale=each, v_scale=each * 2, return_state=True)
        got = plan.run(*batch.pages, k_scale=given, v_scale=given * 2, return_state=True)
        assert torch.equal(got.out, wanted.out)
        assert torch.equal(got.lse, wanted.lse)
        assert got.out.isfinite().all()
