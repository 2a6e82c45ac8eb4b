"""What the public operator and a plan refuse, and that nothing is written then."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from mixed_batch import PAGE, SHAPE, close, mixed, paged, untouched
from support import plan_for
from torch._subclasses.fake_tensor import FakeTensorMode

import quire
from quire.kernels import reference, resolve_backend

# One worker compiles the kernels of this shape, not both.
pytestmark = pytest.mark.xdist_group("attention-float32-d16-g2")


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
    plan = quire.plan(
        *batch.lengths[:2], quire.AttentionSpec(**{**sizes, **spec}), batch.cu_seqlens_q, backend="reference"
    )
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
        quire.plan(*batch.lengths[:2], SHAPE.spec(PAGE), batch.cu_seqlens_q, device="meta", backend="cpu")


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


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("name", ["page_table", "seq_lens", "cu_seqlens_q"])
def test_a_step_that_only_pretends_to_hold_data_is_refused(name):
    batch = mixed()
    setattr(batch, name, FakeTensorMode().from_tensor(getattr(batch, name)))
    with pytest.raises(quire.ArgumentError, match=f"{name} must hold data; got a FakeTensor"):
        quire.plan(*batch.lengths[:2], SHAPE.spec(PAGE), batch.cu_seqlens_q)


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


# --- page ids outside the pool -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("page", [-1, -(2**31), 10**6, "num_pages"])
def test_pages_that_are_not_there_are_refused_and_nothing_is_written(backend, page):
    """A page of 1,000,000 ended the process, one just behind the pool read another head's keys."""
    batch = mixed()
    close(paged(batch, backend=backend), batch)  # padding may hold anything
    page = batch.k_pages.shape[1] if page == "num_pages" else page
    batch.page_table[2, 3] = page
    out = untouched(batch)
    with pytest.raises(quire.ArgumentError, match=rf"got {page} at \[2, 3\]\. Fix:"):
        paged(batch, backend=backend, out=out)
    with pytest.raises(quire.ArgumentError, match=rf"got {page} at \[2, 3\]\. Fix:"):
        plan_for(batch, backend=backend).run(*batch.pages, out=out)
    assert (out == 7.0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_plan_that_ran_on_one_pool_is_compared_with_every_other(backend):
    batch = mixed()
    plan = plan_for(batch, backend=backend)
    highest = int(plan.page_indices.max())
    close(plan.run(*batch.pages), batch)
    smaller = [pages[:, :highest] for pages in (batch.k_pages, batch.v_pages)]
    with pytest.raises(quire.ArgumentError, match=rf"from 0 to {highest - 1}; got {highest} at"):
        plan.run(batch.q, *smaller)
    fitting = [pages[:, : highest + 1] for pages in (batch.k_pages, batch.v_pages)]
    close(plan.run(batch.q, *fitting), batch)


def test_a_planners_next_plan_is_compared_with_the_pool_though_its_calls_are_bound():
    """Bound calls are shared between plans of a planner, so the layout of a call was seen before."""
    batch = mixed()
    planner = quire.Planner(
        SHAPE.spec(PAGE), max_batch=8, max_seq_len=64, max_q_len=8, backend="reference", device="cpu"
    )
    shared = {}
    planner._kernels = SimpleNamespace(bind=reference.bind, prepare=lambda spec, step, device, reserved: step)
    planner._reserved, planner._bound_for = object(), lambda num_tokens: shared
    planner.plan(*batch.lengths).run(*batch.pages)
    assert len(shared) == 1

    batch.page_table[0, 0] = batch.k_pages.shape[1]
    out = untouched(batch)
    with pytest.raises(quire.ArgumentError, match=r"at \[0, 0\]\. Fix:"):
        planner.plan(*batch.lengths).run(*batch.pages, out=out)
    assert (out == 7.0).all()


# --- other refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "hpu"])
def test_a_device_without_kernels_must_name_the_reference(device):
    with pytest.raises(quire.UnsupportedError, match=rf'on {device}.*got "auto"\. Fix: backend="reference"'):
        resolve_backend("auto", torch.device(device))
    assert resolve_backend("reference", torch.device(device)) == "reference"


def test_auto_on_meta_is_refused_at_every_door():
    spec, batch = SHAPE.spec(PAGE), mixed()
    with pytest.raises(quire.UnsupportedError, match='Fix: backend="reference"'):
        quire.plan(batch.page_table, batch.seq_lens, spec, device="meta")
    with pytest.raises(quire.UnsupportedError, match='Fix: backend="reference"'):
        quire.Planner(spec, max_batch=1, max_seq_len=1, device="meta")


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


# --- the arguments that the caller passed ------------------------------------------------------------------


def one_call(batch, **changed):
    """paged_attention with some of its arguments changed."""
    given = {"q": batch.q, "k_pages": batch.k_pages, "v_pages": batch.v_pages}
    step = dict(zip(("page_table", "seq_lens", "cu_seqlens_q"), batch.lengths, strict=True))
    return quire.paged_attention(**{**given, **step, **changed}, backend="reference")


@pytest.mark.parametrize("watched", [False, True])
def test_one_call_names_its_own_arguments(watched, monkeypatch):
    """It spoke of a plan that the caller never made, or of a spec."""
    if watched:
        monkeypatch.setattr("quire.ops.attention.is_watched", lambda tensor: True)
    batch = mixed()
    heads, num_pages = batch.q.shape[1], batch.k_pages.shape[1]
    with pytest.raises(
        quire.ShapeError, match=r"^cu_seqlens_q must end with the number of q's tokens, 13; got 14\."
    ):
        one_call(batch, cu_seqlens_q=batch.cu_seqlens_q + torch.tensor([0, 0, 0, 0, 1]))
    with pytest.raises(quire.ShapeError, match=r"^q must have one token for each of 4 sequences"):
        one_call(batch, cu_seqlens_q=None)
    three = batch.k_pages[:1].repeat(3, 1, 1, 1)
    with pytest.raises(quire.ShapeError, match=rf"^k_pages must .* a divisor of its {heads} heads; got"):
        one_call(batch, k_pages=three, v_pages=three)
    with pytest.raises(quire.ShapeError, match=r"^k_pages must .*head_dim=16 of q"):
        one_call(batch, k_pages=batch.k_pages[..., 1:], v_pages=batch.v_pages[..., 1:])
    with pytest.raises(quire.ShapeError, match=r"^v_pages must be like k_pages"):
        one_call(batch, v_pages=batch.v_pages[:, : num_pages - 1])
    with pytest.raises(quire.DtypeError, match=r"^v_pages must be torch\.float32 like q"):
        one_call(batch, v_pages=batch.v_pages.half())
    with pytest.raises(quire.ShapeError, match=r"^q must have at least one head"):
        one_call(batch, q=batch.q[:, :0])


@pytest.mark.parametrize("tokens", [10**12, 2**62])
def test_more_query_tokens_than_there_can_be_are_refused_before_work_is_cut_for_them(tokens):
    """Work for 10¹² tokens took 40 seconds, and then all memory."""
    q, pages = torch.randn(3, 4, 16), torch.randn(2, 2, PAGE, 16)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    starts, spec = torch.tensor([0, tokens]), SHAPE.spec(PAGE)
    with pytest.raises(quire.ShapeError, match=rf"cu_seqlens_q must end with .* q's tokens, 3; got {tokens}"):
        quire.paged_attention(q, pages, pages, table, lens, starts)
    with pytest.raises(
        quire.ArgumentError, match=rf"cu_seqlens_q must end with at most 2\d+ .*; got {tokens}"
    ):
        quire.plan(table, lens, spec, starts)
    planner = quire.Planner(spec, max_batch=2, max_seq_len=8, max_q_len=4, device="cpu")
    with pytest.raises(quire.ArgumentError, match=rf"at most max_q_len=4 .*; got {tokens}\. Fix: "):
        planner.plan(table, lens, starts)


def test_pages_in_another_order_are_told_the_view_that_mends_it():
    batch = mixed()
    pages = {"k_pages": batch.k_pages, "v_pages": batch.v_pages}
    nhd = {name: tensor.permute(1, 2, 0, 3) for name, tensor in pages.items()}
    hnd = {name: tensor.transpose(0, 1) for name, tensor in pages.items()}
    wrong = ((nhd, r"\.permute\(2, 0, 1, 3\)"), (hnd, r"\.transpose\(0, 1\)"))
    for given, fix in wrong:
        with pytest.raises(quire.ShapeError, match=rf"^k_pages must .*Fix: .*k_pages{fix}"):
            one_call(batch, **given)
        with pytest.raises(quire.ShapeError, match=rf"^k_pages must .*Fix: .*k_pages{fix}"):
            plan_for(batch).run(batch.q, **given)
        new = torch.zeros(1, *batch.k_pages.shape[::3])
        with pytest.raises(quire.ShapeError, match=rf"^k must .*Fix: .*k_pages{fix}"):
            quire.write_kv(new, new, **given, slot_mapping=torch.tensor([0]))
    close(one_call(batch, **{name: tensor.permute(2, 0, 1, 3) for name, tensor in nhd.items()}), batch)
