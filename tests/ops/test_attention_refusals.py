"""What the public operator and a plan refuse, and that nothing is written then."""

from __future__ import annotations

import math

import pytest
import torch
from mixed_batch import PAGE, SHAPE, close, mixed, paged, untouched
from support import plan_for
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import pad

import quire
from quire.planning.step import COPIED_PAGES

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
@pytest.mark.parametrize("spare", [0, COPIED_PAGES], ids=["copied", "too large to be copied"])
@pytest.mark.parametrize("name", ["page_table", "seq_lens", "cu_seqlens_q"])
def test_a_step_that_only_pretends_to_hold_data_is_refused(name, spare):
    batch = mixed()
    batch.page_table = pad(batch.page_table, (0, spare))
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
