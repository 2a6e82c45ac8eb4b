"""Planner: the results of ``plan``, in bounded memory; what is too large or too late is refused."""

import re
from types import SimpleNamespace

import pytest
import torch
from accuracy import exact
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Shape, attend, make_batch

import quire
from quire.ops.attention_plan import within_reach
from quire.planning.step import largest_work, plan_step
from quire.planning.work_list import TileShape, Tiling

SHAPE, PAGE = Shape(torch.float32, 16, group=2), 16  # compiled by other modules too
SPEC = SHAPE.spec(PAGE)
LIMITS = {"max_batch": 3, "max_seq_len": 100, "max_q_len": 20, "max_tokens": 30}
STEPS = {
    "mixed": ([50, 1, 100], [20, 1, 1]),
    "decode": ([17, 64], None),
    "empty sequences": ([0, 0, 3], [2, 0, 1]),
    "nothing": ([], []),
}


def planner(**changed):
    return quire.Planner(SPEC, **{**LIMITS, "device": "cpu", **changed})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_each_step_gives_the_bits_of_a_plan_of_its_own(backend):
    plans = planner(backend=backend)
    for lengths in STEPS.values():
        batch = make_batch(SHAPE, *lengths, page_size=PAGE)
        state = plans.plan(*batch.lengths).run(*batch.pages, return_state=True)
        wanted = attend(batch, backend=backend)
        assert torch.equal(state.out, wanted.out)
        assert torch.equal(state.lse, wanted.lse)


def test_its_rules_are_those_of_all_its_plans():
    batch = make_batch(SHAPE, *STEPS["mixed"], page_size=PAGE)
    rules = {"window_left": 5, "causal": False}
    state = planner(**rules).plan(*batch.lengths).run(*batch.pages, return_state=True)
    torch.testing.assert_close(state.out, exact(batch, **rules).out.float())


def test_decode_needs_no_cu_seqlens():
    batch = make_batch(SHAPE, [17, 64], page_size=PAGE)
    plan = planner().plan(batch.page_table, batch.seq_lens)
    assert torch.equal(plan.run(*batch.pages), attend(batch).out)


def test_a_plan_whose_memory_a_later_step_took_is_refused():
    plans, batch = planner(), make_batch(SHAPE, [17, 64], page_size=PAGE)
    first = plans.plan(*batch.lengths)
    first.run(*batch.pages)
    second = plans.plan(*batch.lengths)
    with pytest.raises(quire.ArgumentError, match="latest of its Planner"):
        first.run(*batch.pages)
    second.run(*batch.pages)


def test_a_plan_that_is_replaced_while_it_looks_up_a_call_is_refused_ever_after():
    """Its look-up stored the call again behind the back of the thread that planned."""
    plans, batch = planner(), make_batch(SHAPE, [17, 64], page_size=PAGE)
    plan = plans.plan(*batch.lengths)
    plan.run(*batch.pages)
    plan._last = None, None

    class OfTwoThreads(dict):
        def get(self, layout):
            found = super().get(layout)
            plans.plan(*batch.lengths)
            return found

    plan._bound = OfTwoThreads(plan._bound)
    plan.run(*batch.pages)
    for _ in range(2):
        with pytest.raises(quire.ArgumentError, match="the latest of its Planner"):
            plan.run(*batch.pages)


def test_what_it_keeps_for_numbers_of_tokens_is_bounded(monkeypatch):
    monkeypatch.setattr("quire.ops.planner.KEPT_BOUND", 2)
    plans = planner()
    kept = [plans._bound_for(tokens) for tokens in (1, 2, 1, 3)]
    assert kept[2] is kept[0]
    assert list(plans._bound) == [1, 3], "those used last"
    assert plans._bound_for(2) is not kept[1]


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("max_batch", ([1, 1, 1, 1], None)),
        ("max_seq_len", ([101], None)),
        ("max_q_len", ([50], [21])),
        ("max_tokens", ([20, 20], [20, 11])),
    ],
)
def test_a_step_above_a_limit_is_refused_and_the_plan_before_it_still_runs(name, lengths):
    plans, small = planner(), make_batch(SHAPE, [17, 64], page_size=PAGE)
    before = plans.plan(*small.lengths)
    batch = make_batch(SHAPE, *lengths, page_size=PAGE)
    with pytest.raises(
        quire.ArgumentError, match=rf"at most {name}={LIMITS[name]} .*; got {LIMITS[name] + 1}\. Fix"
    ):
        plans.plan(*batch.lengths)
    assert torch.equal(before.run(*small.pages), attend(small).out)


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_a_limit_must_be_a_size(name, value):
    with pytest.raises(
        quire.ArgumentError, match=f"{name} must be an int of at least 1; got {re.escape(repr(value))}"
    ):
        planner(**{name: value})


def test_other_arguments_are_checked_as_those_of_plan():
    with pytest.raises(quire.ArgumentError, match="spec must be an AttentionSpec"):
        quire.Planner("spec", **LIMITS, device="cpu")
    with pytest.raises(quire.ArgumentError, match="window_left"):
        planner(window_left=-2)
    with pytest.raises(quire.UnsupportedError, match="batch-invariant"):
        planner(batch_invariant=True, backend="reference")


def test_tokens_are_limited_by_sequences_and_queries_where_nothing_else_is_said():
    assert planner(max_tokens=None).limits.max_tokens == LIMITS["max_batch"] * LIMITS["max_q_len"]


limits = st.fixed_dictionaries(
    {
        "max_batch": st.integers(1, 6),
        "max_seq_len": st.sampled_from([1, 16, 100, 1000]),
        "max_q_len": st.integers(1, 20),
        "max_tokens": st.integers(1, 60),
    }
)
tilings = st.builds(
    lambda workers, few, kv_tokens, q_tokens, prefill_workers, part_cost, kv_split, whole, tile_cost: Tiling(
        workers,
        TileShape(few or 1, kv_tokens, part_cost=part_cost),
        TileShape(q_tokens, kv_tokens, prefill_workers),
        0 if kv_split else few,
        whole,
        kv_split=kv_split,
        prefill_tile_cost=tile_cost,
    ),
    st.integers(1, 40), st.integers(1, 4), st.sampled_from([1, 4, 16]), st.sampled_from([1, 3, 8]),
    st.sampled_from([0, 7, 60]), st.sampled_from([0, 5, 200]), st.sampled_from([0, 64]), st.booleans(),
    st.sampled_from([0, 30]),
)  # fmt: skip


@settings(max_examples=300)
@given(
    limits=limits,
    tiling=tilings,
    data=st.data(),
    heads=st.integers(1, 3),
    window_left=st.just(-1) | st.integers(0, 60),
)
def test_no_step_within_the_limits_has_more_work_than_there_is_room_for(
    limits, tiling, data, heads, window_left
):
    sequences, left = [], limits["max_tokens"]
    for _ in range(data.draw(st.integers(0, limits["max_batch"]))):
        q_len = data.draw(st.integers(0, min(left, limits["max_q_len"])))
        sequences.append((data.draw(st.integers(0, limits["max_seq_len"])), q_len))
        left -= q_len
    step = plan_step(
        torch.zeros(len(sequences), limits["max_seq_len"], dtype=torch.int32),
        torch.tensor([n for n, _ in sequences], dtype=torch.int64),
        torch.tensor([0, *[q for _, q in sequences]]).cumsum(0),
        num_kv_heads=heads, page_size=1, causal=True, window_left=window_left, tiling=tiling,
    )  # fmt: skip
    sizes = limits["max_batch"], limits["max_tokens"], limits["max_seq_len"], limits["max_q_len"]
    room = largest_work(tiling, heads, *sizes)
    for work, bound in zip((step.decode, step.prefill), room, strict=True):
        assert len(work.worker_indptr) - 1 == bound.num_workers
        assert len(work.items) <= bound.items
        assert work.num_partials <= bound.partials
        assert bound.partials <= max(2 * bound.num_workers, tiling.kv_split and bound.items)


def test_a_table_on_a_device_stays_there_only_for_kernels_that_read_it_there(monkeypatch):
    monkeypatch.setattr("quire.ops.planner.step_checks.check_host", lambda **tables: None)
    table = torch.zeros(1, 2, dtype=torch.int32, device="meta")  # stands for a GPU's
    kernels = SimpleNamespace(TAKES_DEVICE_TABLES=True)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: "copied")
    assert within_reach(table, kernels, table.device) is table
    assert within_reach(table, kernels, torch.device("cuda", 1)) == "copied"
    assert within_reach(table, SimpleNamespace(), table.device) == "copied"
