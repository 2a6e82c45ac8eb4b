"""The public operator: same values eagerly, planned and compiled; what is asked for is obeyed or refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import Batch, Shape, assert_accurate, exact, make_batch, plain, plan_for

import quire

SHAPE = Shape(torch.float32, head_dim=16, group=2)
PAGE = 4

# One worker compiles the kernels of this shape, not both.
pytestmark = pytest.mark.xdist_group("attention-float32-d16-g2")


def mixed(seed: int = 0, **how: Any) -> Batch:
    """Decode, prefill, a chunk behind a cached prefix, and an empty sequence."""
    return make_batch(SHAPE, [9, 6, 14, 0], [1, 6, 5, 1], page_size=PAGE, seed=seed, **how)


def paged(batch: Batch, **rules: Any) -> Any:
    return quire.paged_attention(*batch.pages, *batch.lengths, **rules)


def close(result: torch.Tensor, batch: Batch, **rules: Any) -> None:
    torch.testing.assert_close(result.double(), exact(batch, **rules).out, atol=2e-6, rtol=2e-6)


def untouched(batch: Batch) -> torch.Tensor:
    """An output that shows whether anything was written."""
    return torch.full(batch.q.shape, 7.0, dtype=batch.q.dtype)


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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("view", ["transposed", "every other column", "columns of a wider table"])
def test_a_page_table_may_be_any_view(backend, view):
    batch = mixed()
    wanted = paged(batch, backend=backend)
    table = batch.page_table
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


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ({"num_qo_heads": 8}, quire.ShapeError),
        ({"num_kv_heads": 4}, quire.ShapeError),
        ({"head_dim": 32}, quire.ShapeError),
        ({"page_size": 8}, quire.ShapeError),
        ({"dtype": torch.bfloat16}, quire.DtypeError),
        ({"kv_dtype": "int8"}, quire.DtypeError),
    ],
    ids=str,
)
def test_a_plan_for_another_spec_is_refused_and_nothing_is_written(spec, wanted):
    batch = mixed()
    sizes = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": PAGE, "dtype": torch.float32}
    plan = quire.plan(*batch.lengths, quire.AttentionSpec(**{**sizes, **spec}), backend="reference")
    out = untouched(batch)
    with pytest.raises(wanted, match=r"planned.*Fix:"):
        plan.run(*batch.pages, out=out)
    assert (out == 7.0).all()


def test_a_plan_for_another_number_of_tokens_is_refused():
    batch = mixed()
    with pytest.raises(
        quire.ShapeError, match=r"q must be \[13, 4, 16\] as planned; got float32 \[12, 4, 16\]"
    ):
        plan_for(batch).run(batch.q[:-1], batch.k_pages, batch.v_pages)


# --- refusals ----------------------------------------------------------------------------------------------


def test_gradients_are_refused_where_they_would_be_recorded():
    batch = mixed()
    plan = plan_for(batch, backend="reference")
    batch.q.requires_grad_()
    with pytest.raises(quire.UnsupportedError, match="inference_mode"):
        paged(batch, backend="reference")
    with pytest.raises(quire.UnsupportedError, match="inference_mode"):
        plan.run(*batch.pages)
    with torch.no_grad():
        close(paged(batch, backend="reference"), batch)
    with torch.inference_mode():
        close(plan.run(*batch.pages), batch)


def test_an_unknown_backend_is_named_beside_those_there_are():
    batch = mixed()
    with pytest.raises(quire.ArgumentError, match=r"cpu, reference, triton; got 'cuda'\. Fix:"):
        paged(batch, backend="cuda")
    with pytest.raises(quire.ArgumentError, match=r"got 'cuda'\. Fix:"):
        plan_for(batch, backend="cuda")


def test_a_backend_that_cannot_serve_host_memory_is_refused_not_replaced():
    batch = mixed()
    out = untouched(batch)
    with pytest.raises(quire.UnsupportedError, match=r'backend "triton".*Fix:'):
        paged(batch, backend="triton", out=out)
    assert (out == 7.0).all()
    with pytest.raises(quire.UnsupportedError, match=r'backend "triton".*Fix:'):
        plan_for(batch, backend="triton")
    with pytest.raises(quire.UnsupportedError, match=r'backend "cpu".*meta'):
        quire.plan(*batch.lengths, SHAPE.spec(PAGE), device="meta", backend="cpu")


@pytest.mark.parametrize(
    "name", ["k_pages", "v_pages", "page_table", "seq_lens", "cu_seqlens_q", "out", "sinks"]
)
def test_a_tensor_without_data_is_refused_before_torch_takes_the_call_for_a_trace(name):
    batch = mixed()
    given = {
        "k_pages": batch.k_pages,
        "v_pages": batch.v_pages,
        "page_table": batch.page_table,
        "seq_lens": batch.seq_lens,
        "cu_seqlens_q": batch.cu_seqlens_q,
        "out": untouched(batch),
        "sinks": torch.zeros(4),
    }
    out = given["out"]
    given[name] = given[name].to("meta")
    with pytest.raises(quire.DeviceError, match=rf"{name} must .*meta.*Fix:"):
        quire.paged_attention(batch.q, **given)
    assert (out == 7.0).all()


BAD = {
    "q of another dtype": lambda given: {"q": given["q"].double()},
    "fewer queries": lambda given: {"q": given["q"][1:]},
    "q with gaps between elements": lambda given: {"q": given["q"].repeat_interleave(2, -1)[..., ::2]},
    "q with a gradient": lambda given: {"q": given["q"].clone().requires_grad_()},
    "v_pages of a smaller pool": lambda given: {"v_pages": given["v_pages"][:, 1:]},
    "k_pages of another dtype": lambda given: {"k_pages": given["k_pages"].half()},
    "pages of another size": lambda given: {n: given[n][:, :, 1:] for n in ("k_pages", "v_pages")},
    "k_pages of another head_dim": lambda given: {"k_pages": given["k_pages"][..., 1:]},
    "k_pages that are no tensor": lambda given: {"k_pages": None},
    "out of another shape": lambda given: {"out": given["out"][..., 1:]},
    "out without memory of its own": lambda given: {"out": given["out"][:1].expand(given["q"].shape)},
    "out on meta": lambda given: {"out": given["out"].to("meta")},
    "sinks of another dtype": lambda given: {"sinks": torch.zeros(4).double()},
    "too few slopes": lambda given: {"alibi_slopes": torch.zeros(3)},
    "a narrow mask": lambda given: {"tree_mask": torch.ones(13, 5, dtype=torch.bool)},
    "scales for pages without": lambda given: {"k_scale": torch.ones(given["k_pages"].shape[:3])},
    "an infinite scale": lambda given: {"softmax_scale": math.inf},
    "no number": lambda given: {"softcap": math.nan},
}


@pytest.mark.parametrize("bad", BAD)
def test_a_plan_that_accepted_a_layer_still_refuses_another(bad):
    batch = mixed()
    plan = plan_for(batch)
    given = {"q": batch.q, "k_pages": batch.k_pages, "v_pages": batch.v_pages, "out": untouched(batch)}
    for _ in range(2):
        close(plan.run(**given), batch)
    given["out"] = untouched(batch)
    with pytest.raises(quire.QuireError, match="Fix:"):
        plan.run(**{**given, **BAD[bad](given)})
    assert (given["out"] == 7.0).all()
    close(plan.run(**given), batch)


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


# --- debug runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("page", [-1, 10**6, "num_pages"])
def test_debug_runs_refuse_pages_that_are_not_there_and_write_nothing(monkeypatch, backend, page):
    batch = mixed()
    monkeypatch.setenv("QUIRE_DEBUG", "1")
    close(paged(batch, backend=backend), batch)  # padding may hold anything, in debug runs too

    page = batch.k_pages.shape[1] if page == "num_pages" else page
    batch.page_table[2, 3] = page
    out = untouched(batch)
    with pytest.raises(quire.ArgumentError, match=rf"got {page} at \[2, 3\]\. Fix:"):
        paged(batch, backend=backend, out=out)
    with pytest.raises(quire.ArgumentError, match=rf"got {page} at \[2, 3\]\. Fix:"):
        plan_for(batch, backend=backend).run(*batch.pages, out=out)
    assert (out == 7.0).all()


def test_a_plan_made_where_tensors_default_to_meta_still_runs():
    spec = quire.AttentionSpec(4, 2, 16, page_size=4, dtype=torch.float32)
    k, v, q = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16), torch.randn(1, 4, 16)
    table, lens = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    expected = quire.plan(table, lens, None, spec).run(q, k, v)
    with torch.device("meta"):
        plan = quire.plan(table, lens, None, spec)
    torch.testing.assert_close(plan.run(q, k, v), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softmax_scale", math.nan),
        ("softmax_scale", "1"),
        ("softcap", None),
        ("softcap", "1"),
        ("window_left", True),
        ("causal", None),
        ("batch_invariant", 1),
        ("backend", None),
    ],
)
def test_numbers_that_are_none_are_refused(name, value):
    k, q = torch.randn(2, 3, 4, 16), torch.randn(1, 4, 16)
    table, lens = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    with pytest.raises(quire.ArgumentError, match=f"{name} must be"):
        quire.paged_attention(q, k, k, table, lens, **{name: value})


def test_pages_of_different_pools_and_overlapping_results_are_refused():
    k, q = torch.randn(2, 3, 4, 16), torch.randn(2, 4, 16)
    table, lens = torch.tensor([[2, 0]] * 2, dtype=torch.int32), torch.tensor([6, 6], dtype=torch.int32)
    with pytest.raises(quire.ShapeError, match="v_pages must be like k_pages"):
        quire.paged_attention(q, k, k[:, :2], table, lens)
    with pytest.raises(quire.ShapeError, match="out must have memory of its own"):
        quire.paged_attention(q, k, k, table, lens, out=torch.empty(1, 4, 16).expand(2, 4, 16))
