"""Neither plans nor planners keep the tensors that they ran on alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support import Shape, make_batch

import quire

SHAPE, PAGE = Shape(torch.float32, 16, group=2, kv_dtype="int8"), 4

# One worker compiles the kernels of this shape, not both.
pytestmark = pytest.mark.xdist_group("attention-float32-int8-d16-g2")


def planned(batch, by, backend):
    spec = SHAPE.spec(PAGE)
    if by == "plan":
        return quire.plan(*batch.lengths[:2], spec, batch.cu_seqlens_q, backend=backend), None
    planner = quire.Planner(spec, max_batch=4, max_seq_len=64, max_q_len=8, backend=backend, device="cpu")
    return planner.plan(*batch.lengths), planner


def watch(*tensors):
    return [weakref.ref(tensor) for tensor in tensors]


def alive(watched):
    gc.collect()
    return [tensor() for tensor in watched if tensor() is not None]


@pytest.mark.parametrize("given_scales", [False, True])
@pytest.mark.parametrize("by", ["plan", "planner"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_tensor_of_a_call_dies_with_its_caller(backend, by, given_scales):
    batch = make_batch(SHAPE, [9, 5], [1, 3], page_size=PAGE)
    plan, planner = planned(batch, by, backend)
    scales = {name: torch.ones(SHAPE.num_kv_heads) for name in batch.scales} if given_scales else batch.scales
    sinks, mask = torch.zeros(batch.q.shape[1]), torch.ones(4, 8, dtype=torch.bool)
    out = torch.empty_like(batch.q)
    state = plan.run(*batch.pages, **scales, sinks=sinks, tree_mask=mask, out=out, return_state=True)
    watched = watch(
        *batch.pages, *batch.lengths, *scales.values(), *batch.scales.values(), sinks, mask, *state
    )

    del batch, scales, sinks, mask, out, state

    assert alive(watched) == []
    assert plan.num_tokens == 4
    assert planner is None or planner.limits.max_batch == 4


@pytest.mark.parametrize("given_scales", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_write_kv_keeps_nothing(backend, given_scales):
    k, v = torch.randn(2, 3, 2, 16)
    pages = list(torch.zeros(2, 2, 5, PAGE, 16, dtype=torch.int8))
    scales = [torch.ones(2) if given_scales else torch.ones(2, 5, PAGE) for _ in "kv"]
    slots = torch.tensor([3, -1, 17])
    quire.write_kv(k, v, *pages, slots, k_scale=scales[0], v_scale=scales[1], backend=backend)
    watched = watch(k, v, *pages, *scales, slots)

    del k, v, pages, scales, slots

    assert alive(watched) == []


def test_a_plan_dies_with_its_caller():
    plan, _ = planned(make_batch(SHAPE, [9]), "plan", "reference")
    watched = watch(plan)
    del plan
    assert alive(watched) == []
