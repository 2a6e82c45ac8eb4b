"""A plan moved to another page table is the plan of that table."""

import pytest
import torch
from mixed_batch import PAGE, SHAPE, mixed
from support import make_batch, plan_for

import quire

# One worker compiles the kernels of this shape, not both.
pytestmark = pytest.mark.xdist_group("attention-float32-d16-g2")


def elsewhere(batch, columns):
    """The same tokens on other pages, under a table with so many more or fewer unused columns."""
    torch.manual_seed(1)
    num_pages = batch.k_pages.shape[1]
    order = torch.randperm(num_pages)
    table = torch.full((len(batch.page_table), batch.page_table.shape[1] + columns), -5, dtype=torch.int32)
    for i, seq_len in enumerate(batch.seq_lens.tolist()):
        used = -(-seq_len // batch.page_size)
        table[i, :used] = order[batch.page_table[i, :used].long()]
    k_pages, v_pages = torch.empty_like(batch.k_pages), torch.empty_like(batch.v_pages)
    k_pages[:, order], v_pages[:, order] = batch.k_pages, batch.v_pages
    return table, k_pages, v_pages


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("columns", [-2, 0, 3])
@pytest.mark.parametrize(
    "rules", [{}, {"window_left": 3}, {"batch_invariant": True}, {"causal": False}], ids=str
)
def test_a_moved_plan_computes_what_a_plan_of_that_table_does(backend, columns, rules):
    if backend == "reference" and "batch_invariant" in rules:
        pytest.skip("the reference has no such plans")
    batch = mixed()
    table, *pages = elsewhere(batch, columns)
    first = plan_for(batch, 3, backend=backend, **rules)
    moved = first.with_page_table(table)
    wanted = first.run(*batch.pages)
    assert torch.equal(moved.run(batch.q, *pages), wanted)
    assert torch.equal(first.run(*batch.pages), wanted)
    direct = quire.plan(table, batch.seq_lens, SHAPE.spec(PAGE), batch.cu_seqlens_q, backend=backend, **rules)
    for name in ("page_indptr", "page_indices", "page_offsets", "page_valid_lengths"):
        assert torch.equal(getattr(moved, name), getattr(direct, name))


def test_split_work_moves_with_its_merges():
    batch = make_batch(SHAPE, [1200, 40], [1, 9], page_size=PAGE)
    table, *pages = elsewhere(batch, 1)
    first = plan_for(batch, 3)
    assert first.step.decode.num_merges
    moved = first.with_page_table(table)
    assert torch.equal(moved.run(batch.q, *pages), first.run(*batch.pages))


def test_a_table_that_does_not_fit_the_step_is_refused():
    batch = mixed()
    plan, table = plan_for(batch), batch.page_table
    with pytest.raises(
        quire.ShapeError, match=r"page_table must have 4 columns for this step's lengths; got 3"
    ):
        plan.with_page_table(table[:, :3])
    with pytest.raises(quire.ShapeError, match=r"seq_lens must be \[batch\] with batch=3"):
        plan.with_page_table(table[:3])
    with pytest.raises(quire.DtypeError, match="page_table must be int32"):
        plan.with_page_table(table.long())
    negative = table.clone()
    negative[1, 0] = -1
    with pytest.raises(quire.ArgumentError, match="page_table must hold page ids that are not negative"):
        plan.with_page_table(negative)
    far = table.clone()
    far[1, 0] = 10**6
    moved = plan.with_page_table(far)
    with pytest.raises(quire.ArgumentError, match="page_table must hold page ids from 0 to"):
        moved.run(*batch.pages)
