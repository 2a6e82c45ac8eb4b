"""One planner serves the steps of a kind of layer, and makes room for larger ones between steps."""

from __future__ import annotations

import pytest
import torch

from quire.hf import Step
from quire.hf.planners import Planners
from quire.spec import AttentionSpec, Visibility

SPEC = AttentionSpec(4, 2, 16, 4, torch.float32)
ALL = Visibility()


def step_of(lengths, new):
    """Sequences of these lengths, whose last `new` tokens are the step's."""
    tokens = sum(new)
    pages = -(-max(lengths) // SPEC.page_size)
    return Step(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        position_ids=torch.zeros(tokens, dtype=torch.int64),
        page_table=torch.arange(len(lengths) * pages, dtype=torch.int32).view(-1, pages),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *new]).cumsum(0).to(torch.int32),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64),
        logits_indices=torch.tensor([0]),
    )


@pytest.fixture
def planners():
    return Planners("reference", torch.device("cpu"))


def limits_of(planners):
    return {(key[1], key[2]): tuple(planner.limits) for key, planner in planners._planners.items()}


def test_a_planner_has_room_for_its_largest_step_rounded_up_and_keeps_it(planners):
    planners.plan(step_of([9, 3, 5], [5, 3, 1]), SPEC, ALL)
    # sequences, KV tokens (three columns of four), query tokens of a sequence, and of the step
    assert limits_of(planners) == {(ALL, False): (4, 16, 8, 16)}
    [first] = planners._planners.values()
    planners.plan(step_of([16, 1, 1, 1], [8, 1, 1, 1]), SPEC, ALL)
    planners.plan(step_of([2], [2]), SPEC, ALL)
    assert list(planners._planners.values()) == [first]
    planners.plan(step_of([17], [2]), SPEC, ALL)
    assert limits_of(planners) == {(ALL, False): (4, 32, 8, 16)}


def test_growing_one_by_one_replaces_the_planner_once_per_power_of_two(planners):
    seen = set()
    for length in range(1, 65):
        planners.plan(step_of([length], [1]), SPEC, ALL)
        seen |= {id(planner): planner for planner in planners._planners.values()}.items()
    assert len(seen) == 5  # 4, 8, 16, 32 and 64 tokens


def test_decode_and_every_kind_of_layer_have_planners_of_their_own(planners):
    chunks, window = Visibility(chunk_size=8), Visibility(window_left=5)
    for visibility in (ALL, chunks, window):
        planners.plan(step_of([20, 3], [1, 1]), SPEC, visibility)
        planners.plan(step_of([20, 3], [20, 1]), SPEC, visibility)
    kinds = {(visibility, decode) for visibility in (ALL, chunks, window) for decode in (False, True)}
    assert limits_of(planners).keys() == kinds
    assert limits_of(planners)[chunks, False] == (4, 8, 8, 32)  # three chunks and one, each a sequence
    assert {planner.window_left for key, planner in planners._planners.items() if key[1] == window} == {5}


def test_plans_of_two_planners_do_not_disturb_one_another(planners):
    other = Planners("reference", torch.device("cpu"))
    q, pages = torch.randn(2, 4, 16), torch.randn(2, 2, 20, 4, 16)
    plan = planners.plan(step_of([20, 3], [1, 1]), SPEC, ALL)
    before = plan.run(q, *pages)
    other.plan(step_of([5], [1]), SPEC, ALL)
    planners.plan(step_of([5], [5]), SPEC, ALL)
    planners.plan(step_of([5], [1]), SPEC, Visibility(window_left=1))
    assert torch.equal(plan.run(q, *pages), before)
