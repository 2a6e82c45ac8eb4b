"""Rows behind those of a step: an engine pads its batches, and the padding is neither read nor written."""

import math

import pytest
import torch
from mixed_batch import PAGE, SHAPE, mixed
from support import plan_for

import quire

BACKENDS = ["cpu", "reference"]
# One worker compiles the kernels of this shape, not both.
pytestmark = pytest.mark.xdist_group("attention-float32-d16-g2")


def padded(rows, count=3, fill=math.nan):
    return torch.cat([rows, torch.full((count, *rows.shape[1:]), fill, dtype=rows.dtype)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_of_queries_is_not_read_and_its_results_are_left_alone(backend):
    batch = mixed()
    plan = plan_for(batch, backend=backend)
    wanted = plan.run(*batch.pages)
    q, out = padded(batch.q), torch.full((len(batch.q) + 3, *batch.q.shape[1:]), 7.0)
    plan.run(q, batch.k_pages, batch.v_pages, out=out)
    assert torch.equal(out[:-3], wanted)
    assert (out[-3:] == 7.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("watched", [False, True], ids=["eager", "compiled"])
def test_new_results_of_padding_are_those_of_rows_that_see_no_key(backend, watched):
    batch = mixed()
    plan = plan_for(batch, backend=backend)
    wanted = plan.run(*batch.pages, return_state=True)
    run = lambda q, k, v: plan.run(q, k, v, return_state=True)  # noqa: E731
    if watched:
        run = torch.compile(run, fullgraph=True, backend="eager")
    state = run(padded(batch.q), batch.k_pages, batch.v_pages)
    assert torch.equal(state.out[:-3], wanted.out)
    assert torch.equal(state.lse[:-3], wanted.lse)
    assert (state.out[-3:] == 0).all()
    assert (state.lse[-3:] == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tree_mask_may_be_padded_as_its_queries_are(backend):
    batch = mixed()
    plan = plan_for(batch, backend=backend)
    mask = torch.rand(len(batch.q), plan.max_q_len, generator=torch.Generator().manual_seed(0)) < 0.6
    wanted = plan.run(*batch.pages, tree_mask=mask)
    got = plan.run(
        padded(batch.q), batch.k_pages, batch.v_pages, tree_mask=torch.cat([mask, mask[:3]]),
    )  # fmt: skip
    assert torch.equal(got[:-3], wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_keys_and_values_behind_the_last_slot_are_not_written(backend, kv_dtype):
    generator = torch.Generator().manual_seed(0)
    heads, dim = SHAPE.num_kv_heads, SHAPE.head_dim
    k, v = torch.randn(2, 5, heads, dim, generator=generator)
    spec = quire.AttentionSpec(heads, heads, dim, PAGE, torch.float32, kv_dtype)
    slots = torch.tensor([9, -1, 2, 3, -1])

    def write(k, v):
        pool = quire.KVPool(spec, num_layers=1, num_pages=3)
        for pages in (pool.k, pool.v):
            pages.zero_()
        scales = {}
        if kv_dtype:
            scales = {"k_scale": pool.k_scale[0].zero_(), "v_scale": pool.v_scale[0].zero_()}
        quire.write_kv(k, v, pool.k[0], pool.v[0], slots, **scales, backend=backend)
        return [pool.k[0], pool.v[0], *scales.values()]

    for got, wanted in zip(write(padded(k), padded(v, 1)), write(k, v), strict=True):
        assert wanted.any()
        assert torch.equal(got, wanted)
    with pytest.raises(quire.ShapeError, match="to fit slot_mapping"):
        write(k[:-1], v)
