"""A CUDA graph captured once serves every step of its Planner: here, launches written down and made again."""

import math
from dataclasses import replace

import interpreter
import pytest
import torch
from pairs import one_in
from support import Shape, attend, features, make_batch

import quire
from quire.planning import work_list as work

pytestmark = pytest.mark.interpreted

PAGE, NUM_PAGES, TOKENS = 16, 60, 42
SHAPES = [
    Shape(torch.bfloat16, 32, group=4),
    Shape(torch.float16, 40, group=1, kv_dtype="int8"),
    Shape(torch.bfloat16, 16, group=2, kv_dtype="fp8_e5m2"),
]
# seq_len and q_len of each sequence; as a graph's tensors keep their shapes, all steps have so many tokens.
STEPS = {
    "mixed": ([300, 17, 40], [1, 1, 40]),
    "one long decode, and prompts": ([500, 40, 2], [1, 40, 1]),
    "prefill alone": ([40, 140], [32, 10]),
    "short chunks": ([90, 33, 7, 400, 64], [2, 3, 7, 5, 25]),
    "empty sequences": ([0, 0], [40, 2]),
}
DECODES = {
    "captured": ([300, 17, 40, 0], None),
    "others": ([1, 500, 64, 65], None),
    "fewer, and padding": ([0, 0, 0, 90], None),
}


class Tape:
    """Launches as a graph keeps them: each kernel, its grid, and its arguments' addresses and values."""

    def __init__(self, monkeypatch):
        self.launches, self.launch = [], interpreter.CheckedGrid.__call__

        def noted(grid, *arguments, **options):
            self.launches.append((grid, arguments, options))
            self.launch(grid, *arguments, **options)

        monkeypatch.setattr(interpreter.CheckedGrid, "__call__", noted)

    def cut(self):
        """The launches since the last cut."""
        launches, self.launches = self.launches, []
        return launches

    def replay(self, launches):
        for grid, arguments, options in launches:
            self.launch(grid, *arguments, **options)


@pytest.fixture
def tape(monkeypatch):
    return Tape(monkeypatch)


def in_one_pool(batch):
    """The batch with as many pages as every other; what nobody owns is poison."""
    pages = []
    for small in (batch.k_pages, batch.v_pages, *batch.scales.values()):
        large = torch.full((small.shape[0], NUM_PAGES, *small.shape[2:]), 127, dtype=torch.int8)
        large = (
            large.to(small.dtype)
            if small.dtype == torch.int8
            else torch.full_like(large.float(), math.nan).to(small.dtype)
        )
        large[:, : small.shape[1]] = small
        pages.append(large)
    return replace(
        batch, k_pages=pages[0], v_pages=pages[1], scales=dict(zip(batch.scales, pages[2:], strict=True))
    )


def overwrite(tensors, others):
    for tensor, other in zip(tensors, others, strict=True):
        tensor.copy_(other)


def poison(planner):
    """What a plan does not write must not be read: huge items and ids, NaN partial states."""
    planner._reserved.plan.page_table.buffer.fill_(0x7FFFFFFF)


def replay_each(shape, steps, tape, limits, asked=None, **rules):
    """Capture the first step's run, then replay it on the plans of all: every time the bits of a plan of its own."""
    planner = quire.Planner(shape.spec(PAGE), **limits, **rules, backend="triton", device="cpu")
    batches = [in_one_pool(make_batch(shape, *lengths, page_size=PAGE)) for lengths in steps.values()]
    first = batches[0]
    scoring = features(first, **asked or {})
    if "tree_mask" in scoring:
        scoring["tree_mask"] = torch.rand(TOKENS, limits["max_q_len"]) < 0.7

    poison(planner)
    out, seen = torch.empty_like(first.q), (*first.pages, *first.scales.values())
    tape.cut()
    plan = planner.plan(*first.lengths)
    lse = plan.run(*first.pages, out=out, return_state=True, **first.scales, **scoring).lse
    graph = tape.cut()
    for name, batch in zip(steps, batches, strict=True):
        own = quire.plan(*batch.lengths[:2], shape.spec(PAGE), batch.cu_seqlens_q, backend="triton", **rules)
        wanted = own.run(*batch.pages, return_state=True, **batch.scales, **scoring)
        poison(planner)
        planner.plan(*batch.lengths)
        overwrite(seen, (*batch.pages, *batch.scales.values()))
        out.fill_(math.nan)
        lse.fill_(math.nan)
        tape.replay(graph)
        assert torch.equal(out, wanted.out), name
        assert torch.equal(lse, wanted.lse), name
    return graph


MOST = {"max_batch": 5, "max_seq_len": 512, "max_q_len": 40, "max_tokens": 64}
MOST_DECODES = {"max_batch": 4, "max_seq_len": 512}


FIRST_AND_MORE = [*SHAPES[:1], *(pytest.param(shape, marks=pytest.mark.exhaustive) for shape in SHAPES[1:])]


@pytest.mark.parametrize("shape", FIRST_AND_MORE, ids=str)
def test_a_captured_step_serves_every_later_plan(shape, tape):
    assert len(replay_each(shape, STEPS, tape, MOST)) == 2


@pytest.mark.parametrize("shape", FIRST_AND_MORE, ids=str)
def test_a_graph_of_decodes_has_one_launch_and_serves_any(shape, tape):
    assert len(replay_each(shape, DECODES, tape, MOST_DECODES)) == 1


@pytest.mark.parametrize("first", one_in(2, list(STEPS)))
def test_it_does_not_matter_which_step_was_captured(first, tape):
    replay_each(SHAPES[0], {first: STEPS[first]} | STEPS, tape, MOST)


@pytest.mark.parametrize(
    ("asked", "rules"),
    [
        ({"tree": True, "sinks": True}, {}),
        pytest.param({"alibi": True, "softcap": True}, {"window_left": 70}, marks=pytest.mark.exhaustive),
        pytest.param({}, {"causal": False}, marks=pytest.mark.exhaustive),
        ({}, {"batch_invariant": True}),
    ],
    ids=str,
)
def test_rules_and_features_survive_a_new_plan(asked, rules, tape, monkeypatch):
    monkeypatch.setattr(work, "INVARIANT_KV_SPLIT", 128)
    replay_each(SHAPES[0], STEPS, tape, MOST, asked, **rules)


def test_a_plan_is_one_copy_of_what_the_step_needs():
    planner = quire.Planner(SHAPES[0].spec(PAGE), **MOST_DECODES, backend="triton", device="cpu")
    buffer = planner._reserved.plan.page_table.buffer
    batch = make_batch(SHAPES[0], *DECODES["others"], page_size=PAGE)
    for _ in range(2):  # the second time on counters that a broken step left behind
        plan = planner.plan(*batch.lengths)
        assert planner._reserved.plan.page_table.buffer is buffer
        state = plan.run(*batch.pages, return_state=True)
        assert torch.equal(state.out, attend(batch, backend="triton").out)
        planner._reserved.plan.decode.arrivals.tensor.fill_(1)
