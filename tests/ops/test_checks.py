"""Bad arguments of the public functions: one sentence each with name, expected, got and fix, and nothing written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import quire
from quire import ArgumentError, DeviceError, DtypeError, ShapeError

HEADS, KV_HEADS, DIM, PAGE, PAGES, TOKENS = 4, 2, 16, 4, 5, 4  # three sequences: 1, 2 and 1 queries
HUGE = 10**6


def spread(tensor: torch.Tensor, step: int = 2) -> torch.Tensor:
    """The same values, `step` elements apart in the last dimension."""
    return tensor.repeat_interleave(step, -1)[..., ::step]


def step_arguments() -> dict[str, Any]:
    return {
        "page_table": torch.tensor([[0, 1, HUGE], [2, HUGE, HUGE], [3, 4, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([5, 4, 12], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 1, 3, 4], dtype=torch.int32),
    }


def layer_arguments(kv_dtype: torch.dtype | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    layer = {
        "q": torch.randn(TOKENS, HEADS, DIM, generator=generator),
        "k_pages": torch.randn(KV_HEADS, PAGES, PAGE, DIM, generator=generator),
        "v_pages": torch.randn(KV_HEADS, PAGES, PAGE, DIM, generator=generator),
        "out": torch.full((TOKENS, HEADS, DIM), 7.0),
    }
    if kv_dtype is not None:
        for name in ("k", "v"):
            layer[f"{name}_pages"] = (layer[f"{name}_pages"] * 8).to(kv_dtype)
            layer[f"{name}_scale"] = torch.full((KV_HEADS, PAGES, PAGE), 0.125)
    return layer


def store_arguments(kv_dtype: torch.dtype | None = None) -> dict[str, Any]:
    pages = {"dtype": torch.float32 if kv_dtype is None else kv_dtype}
    store = {
        "k": torch.randn(3, KV_HEADS, DIM),
        "v": torch.randn(3, KV_HEADS, DIM),
        "k_pages": torch.full((KV_HEADS, PAGES, PAGE, DIM), 7, **pages),
        "v_pages": torch.full((KV_HEADS, PAGES, PAGE, DIM), 7, **pages),
        "slot_mapping": torch.tensor([0, 6, 19]),
    }
    if kv_dtype is not None:
        store["k_scale"], store["v_scale"] = torch.full((2, KV_HEADS, PAGES, PAGE), 7.0)
    return store


def assert_one_sentence(error: pytest.ExceptionInfo[Exception], wanted: type, name: str) -> None:
    """Of exactly that type, and in four parts: name, expected, got, fix."""
    assert error.type is wanted
    message = str(error.value)
    what, fix = message.split(". Fix: ")
    expected, got = what.split("; got ") if "; got " in what else what.split(": got ")
    assert message.startswith(f"{name} must "), message
    assert len(expected) > len(f"{name} must ")
    assert got
    assert fix
    assert "\n" not in message


INT8 = torch.int8

# changed argument → its wrong value, the error's type
LAYER = {
    "q: a list": ("q", lambda q: q.tolist(), ArgumentError),
    "q: None": ("q", lambda q: None, ArgumentError),
    "q: two dimensions": ("q", lambda q: q[0], ShapeError),
    "q: float64": ("q", lambda q: q.double(), DtypeError),
    "q: int8": ("q", lambda q: q.to(INT8), DtypeError),
    "q: last dim not contiguous": ("q", lambda q: q.transpose(0, 2).contiguous().transpose(0, 2), ShapeError),
    "q: every second element": ("q", spread, ShapeError),
    "k_pages: meta": ("k_pages", lambda k: k.to("meta"), DeviceError),
    "k_pages: None": ("k_pages", lambda k: None, ArgumentError),
    "k_pages: a string": ("k_pages", lambda k: "pages", ArgumentError),
    "k_pages: all layers": ("k_pages", lambda k: k[None], ShapeError),
    "k_pages: no page": ("k_pages", lambda k: k[:, :0], ShapeError),
    "k_pages: last dim not contiguous": ("k_pages", lambda k: k.mT.contiguous().mT, ShapeError),
    "k_pages: another dtype": ("k_pages", lambda k: k.bfloat16(), DtypeError),
    "v_pages: None": ("v_pages", lambda v: None, ArgumentError),
    "v_pages: flat": ("v_pages", lambda v: v.flatten(1, 2), ShapeError),
    "v_pages: another dtype": ("v_pages", lambda v: v.half(), DtypeError),
    "v_pages: wider than keys": ("v_pages", lambda v: v.repeat(1, 1, 1, 2), ShapeError),
    "v_pages: another page_size": ("v_pages", lambda v: v[:, :, :2], ShapeError),
    "v_pages: another head count": ("v_pages", lambda v: v[:1], ShapeError),
    "v_pages: last dim not contiguous": ("v_pages", spread, ShapeError),
    "k_scale: superfluous": ("k_scale", lambda _: torch.ones(KV_HEADS, PAGES, PAGE), ArgumentError),
    "v_scale: superfluous": ("v_scale", lambda _: torch.ones(KV_HEADS, PAGES, PAGE), ArgumentError),
    "out: a list": ("out", lambda out: [], ArgumentError),
    "out: two dimensions": ("out", lambda out: out.flatten(1), ShapeError),
    "out: a token short": ("out", lambda out: out[:-1], ShapeError),
    "out: another dtype": ("out", lambda out: out.half(), DtypeError),
    "out: rows that overlap": ("out", lambda out: out.as_strided(out.shape, (DIM, DIM, 1)), ShapeError),
    "softmax_scale: a bool": ("softmax_scale", lambda _: True, ArgumentError),
    "out: last dim not contiguous": ("out", spread, ShapeError),
    "alibi_slopes: per kv head": ("alibi_slopes", lambda _: torch.ones(KV_HEADS), ShapeError),
    "alibi_slopes: float64": ("alibi_slopes", lambda _: torch.ones(HEADS).double(), DtypeError),
    "alibi_slopes: a matrix": ("alibi_slopes", lambda _: torch.ones(1, HEADS), ShapeError),
    "alibi_slopes: strided": ("alibi_slopes", lambda _: torch.ones(2 * HEADS)[::2], ShapeError),
    "alibi_slopes: one number for all": ("alibi_slopes", lambda _: torch.ones(1).expand(HEADS), ShapeError),
    "alibi_slopes: a list": ("alibi_slopes", lambda _: [1.0] * HEADS, ArgumentError),
    "sinks: one too many": ("sinks", lambda _: torch.ones(HEADS + 1), ShapeError),
    "sinks: bfloat16": ("sinks", lambda _: torch.ones(HEADS).bfloat16(), DtypeError),
    "sinks: strided": ("sinks", lambda _: torch.ones(2 * HEADS)[::2], ShapeError),
    "tree_mask: int": ("tree_mask", lambda _: torch.ones(TOKENS, 2, dtype=torch.int32), DtypeError),
    "tree_mask: a row short": ("tree_mask", lambda _: torch.ones(TOKENS - 1, 2).bool(), ShapeError),
    "tree_mask: a column short": ("tree_mask", lambda _: torch.ones(TOKENS, 1).bool(), ShapeError),
    "tree_mask: one dimension": ("tree_mask", lambda _: torch.ones(TOKENS).bool(), ShapeError),
    "tree_mask: transposed": ("tree_mask", lambda _: torch.ones(2, TOKENS).bool().t(), ShapeError),
    "softcap: negative": ("softcap", lambda _: -1.0, ArgumentError),
    "softcap: infinite": ("softcap", lambda _: math.inf, ArgumentError),
    "softcap: nan": ("softcap", lambda _: math.nan, ArgumentError),
}
QUANTIZED = {
    "k_scale: missing": ("k_scale", lambda _: None, ArgumentError),
    "v_scale: missing": ("v_scale", lambda _: None, ArgumentError),
    "k_scale: half": ("k_scale", lambda scale: scale.half(), DtypeError),
    "v_scale: one per page": ("v_scale", lambda scale: scale[..., 0], ShapeError),
    "v_scale: one per head, k_scale per token": ("v_scale", lambda scale: scale[:, 0, 0], ShapeError),
    "k_scale: one per query head": ("k_scale", lambda scale: torch.ones(HEADS), ShapeError),
    "v_scale: other strides": ("v_scale", lambda scale: scale.mT.contiguous().mT, ShapeError),
}
STEP = {
    "page_table: a list": ("page_table", lambda t: t.tolist(), ArgumentError),
    "page_table: None": ("page_table", lambda t: None, ArgumentError),
    "page_table: one dimension": ("page_table", lambda t: t[0], ShapeError),
    "page_table: int64": ("page_table", lambda t: t.long(), DtypeError),
    "page_table: a column short": ("page_table", lambda t: t[:, :2], ShapeError),
    "page_table: no column": ("page_table", lambda t: t[:, :0], ShapeError),
    "seq_lens: None": ("seq_lens", lambda n: None, ArgumentError),
    "seq_lens: a list": ("seq_lens", lambda n: n.tolist(), ArgumentError),
    "seq_lens: two dimensions": ("seq_lens", lambda n: n[None], ShapeError),
    "seq_lens: float": ("seq_lens", lambda n: n.float(), DtypeError),
    "seq_lens: int16": ("seq_lens", lambda n: n.short(), DtypeError),
    "seq_lens: one short": ("seq_lens", lambda n: n[:2], ShapeError),
    "seq_lens: negative": ("seq_lens", lambda n: n - 5, ArgumentError),
    "cu_seqlens_q: a list": ("cu_seqlens_q", lambda s: s.tolist(), ArgumentError),
    "cu_seqlens_q: float": ("cu_seqlens_q", lambda s: s.float(), DtypeError),
    "cu_seqlens_q: lengths instead": ("cu_seqlens_q", lambda s: s.diff(), ShapeError),
    "cu_seqlens_q: without the 0": ("cu_seqlens_q", lambda s: s + 1, ArgumentError),
    "cu_seqlens_q: decreasing": ("cu_seqlens_q", lambda s: torch.tensor([0, 3, 1, 4]), ArgumentError),
    "cu_seqlens_q: a scalar": ("cu_seqlens_q", lambda s: s[0], ShapeError),
    "window_left: -2": ("window_left", lambda _: -2, ArgumentError),
}
STORE = {
    "k: a list": ("k", lambda k: k.tolist(), ArgumentError),
    "k: None": ("k", lambda k: None, ArgumentError),
    "k: two dimensions": ("k", lambda k: k.flatten(1), ShapeError),
    "k: last dim not contiguous": ("k", spread, ShapeError),
    "k: a token short": ("k", lambda k: k[:2], ShapeError),
    "k: other heads": ("k", lambda k: k[:, :1], ShapeError),
    "k: other head_dim": ("k", lambda k: k[..., :8], ShapeError),
    "k: float64": ("k", lambda k: k.double(), DtypeError),
    "k: not the pages' dtype": ("k", lambda k: k.half(), DtypeError),
    "k: meta": ("k", lambda k: k.to("meta"), DeviceError),
    "v: not k's dtype": ("v", lambda v: v.bfloat16(), DtypeError),
    "v: a token short": ("v", lambda v: v[:2], ShapeError),
    "v: last dim not contiguous": ("v", spread, ShapeError),
    "k_pages: None": ("k_pages", lambda pages: None, ArgumentError),
    "k_pages: all layers": ("k_pages", lambda pages: pages[None], ShapeError),
    "k_pages: no page": ("k_pages", lambda pages: pages[:, :0], ShapeError),
    "v_pages: None": ("v_pages", lambda pages: None, ArgumentError),
    "v_pages: last dim not contiguous": ("v_pages", spread, ShapeError),
    "v_pages: fewer pages": ("v_pages", lambda pages: pages[:, 1:], ShapeError),
    "v_pages: another page_size": ("v_pages", lambda pages: pages[:, :, :2], ShapeError),
    "slot_mapping: None": ("slot_mapping", lambda slots: None, ArgumentError),
    "slot_mapping: a list": ("slot_mapping", lambda slots: slots.tolist(), ArgumentError),
    "slot_mapping: two dimensions": ("slot_mapping", lambda slots: slots[None], ShapeError),
    "slot_mapping: int32": ("slot_mapping", lambda slots: slots.int(), DtypeError),
    "slot_mapping: meta": ("slot_mapping", lambda slots: slots.to("meta"), DeviceError),
    "k_scale: superfluous": ("k_scale", lambda _: torch.ones(KV_HEADS, PAGES, PAGE), ArgumentError),
}


def table(cases: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("changed", "to", "wanted"), cases.values(), ids=cases.keys())


def spoiled(arguments: dict[str, Any], changed: str, to: Any) -> dict[str, Any]:
    return {**arguments, changed: to(arguments.get(changed))}


def test_the_unchanged_arguments_of_these_tables_are_taken():
    """Or the tables below would show nothing."""
    for kv_dtype in (None, INT8):
        layer = layer_arguments(kv_dtype)
        quire.paged_attention(**layer, **step_arguments(), backend="reference")
        assert (layer["out"] != 7.0).all()
        store = store_arguments(kv_dtype)
        quire.write_kv(**store, backend="reference")
        assert (store["k_pages"][:, 4, 3] != 7.0).any()
    extras = {
        "alibi_slopes": torch.ones(HEADS),
        "sinks": torch.ones(HEADS),
        "softcap": 0.0,
        "window_left": -1,
    }
    mask = torch.ones(TOKENS, 2, dtype=torch.bool)
    quire.paged_attention(
        **layer_arguments(), **step_arguments(), **extras, tree_mask=mask, backend="reference"
    )


def attend(layer: dict[str, Any], step: dict[str, Any]) -> None:
    quire.paged_attention(**layer, **step, backend="reference")


def plan_and_run(layer: dict[str, Any], step: dict[str, Any]) -> None:
    kv_dtype = "int8" if getattr(layer["v_pages"], "dtype", None) == INT8 else None
    spec = quire.AttentionSpec(HEADS, KV_HEADS, DIM, PAGE, torch.float32, kv_dtype)
    quire.plan(**step, spec=spec, backend="reference").run(**layer)


@pytest.mark.parametrize("door", [attend, plan_and_run])
@table(LAYER)
def test_a_layers_bad_argument_is_refused_in_a_sentence(door, changed, to, wanted):
    layer = layer_arguments()
    out = layer["out"]
    with pytest.raises(ArgumentError) as error:
        door(spoiled(layer, changed, to), step_arguments())
    assert_one_sentence(error, wanted, changed)
    assert (out == 7.0).all()


@pytest.mark.parametrize("door", [attend, plan_and_run])
@table(QUANTIZED)
def test_a_layers_bad_scale_is_refused_in_a_sentence(door, changed, to, wanted):
    layer = layer_arguments(INT8)
    out = layer["out"]
    with pytest.raises(ArgumentError) as error:
        door(spoiled(layer, changed, to), step_arguments())
    assert_one_sentence(error, wanted, changed)
    assert (out == 7.0).all()


@pytest.mark.parametrize("door", [attend, plan_and_run])
@table(STEP)
def test_a_steps_bad_argument_is_refused_in_a_sentence(door, changed, to, wanted):
    layer = layer_arguments()
    with pytest.raises(ArgumentError) as error:
        door(layer, spoiled(step_arguments(), changed, to))
    assert_one_sentence(error, wanted, changed)
    assert (layer["out"] == 7.0).all()


@table(STORE)
def test_a_stores_bad_argument_is_refused_in_a_sentence_and_nothing_is_written(changed, to, wanted):
    store = store_arguments()
    with pytest.raises(ArgumentError) as error:
        quire.write_kv(**spoiled(store, changed, to), backend="reference")
    assert_one_sentence(error, wanted, changed)
    assert (store["k_pages"] == 7).all()
    assert (store["v_pages"] == 7).all()


def test_computed_scales_must_not_share_memory():
    """One float for all rows kept the scale of the row that came last."""
    one = torch.ones(1).expand(KV_HEADS, PAGES, PAGE)
    store = {**store_arguments(INT8), "k_scale": one, "v_scale": one}
    with pytest.raises(
        ShapeError, match=r"k_scale must have memory .*Fix: pass it as \[num_kv_heads\] or \[\]"
    ):
        quire.write_kv(**store, backend="reference")
    assert (store["k_pages"] == 7).all()


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_store_refuses_rows_that_require_a_gradient_though_it_took_their_layout(name):
    store = store_arguments()
    quire.write_kv(**store, backend="reference")
    store = {**store_arguments(), name: store[name].clone().requires_grad_()}
    with pytest.raises(quire.UnsupportedError, match=f"^{name} must not require a gradient"):
        quire.write_kv(**store, backend="reference")
    assert (store["k_pages"] == 7).all()
    with torch.no_grad():
        quire.write_kv(**store, backend="reference")
    assert (store["k_pages"][:, 4, 3] != 7).any()


def test_a_bool_is_no_scale_where_one_that_is_equal_was_taken():
    layer, step = layer_arguments(), step_arguments()
    spec = quire.AttentionSpec(HEADS, KV_HEADS, DIM, PAGE, torch.float32)
    plan = quire.plan(**step, spec=spec, backend="reference")
    plan.run(**layer, softmax_scale=1.0)
    with pytest.raises(ArgumentError, match="softmax_scale must be a number; got True"):
        plan.run(**layer, softmax_scale=True)
    with pytest.raises(ArgumentError, match="softcap must be a number; got False"):
        plan.run(**layer, softmax_scale=1.0, softcap=False)


def test_a_store_names_a_backend_that_is_no_name_under_a_dispatch_mode(monkeypatch):
    monkeypatch.setattr("quire.ops.store.is_watched", lambda tensor: True)
    with pytest.raises(ArgumentError, match=r"backend must be a name; got None\. Fix: "):
        quire.write_kv(**store_arguments(), backend=None)


@table(QUANTIZED)
def test_a_stores_bad_scale_is_refused_in_a_sentence_and_nothing_is_written(changed, to, wanted):
    store = store_arguments(INT8)
    with pytest.raises(ArgumentError) as error:
        quire.write_kv(**spoiled(store, changed, to), backend="reference")
    assert_one_sentence(error, wanted, changed)
    for name in ("k_pages", "v_pages", "k_scale", "v_scale"):
        assert (store[name] == 7).all()


def test_the_narrow_table_is_told_by_its_row_and_the_columns_it_lacks():
    step = step_arguments()
    step["page_table"] = step["page_table"][:, :2]
    with pytest.raises(ShapeError, match=r"3 columns for seq_lens\[2\]=12 at page_size 4; got 2\."):
        attend(layer_arguments(), step)


def test_errors_show_dtype_and_shape_as_they_came():
    step = step_arguments()
    step["page_table"] = step["page_table"].long()
    with pytest.raises(DtypeError) as error:
        attend(layer_arguments(), step)
    assert str(error.value) == (
        "page_table must be int32 [batch, max_pages]; got int64 [3, 3]. Fix: page_table.to(torch.int32)"
    )


def test_a_last_dimension_of_one_is_contiguous_whatever_its_stride():
    q = torch.randn(1, 2, 3)[..., :1].transpose(0, 2).contiguous().transpose(0, 2)
    pages = torch.randn(2, 1, 1, 5)[..., 2:3]
    table = torch.zeros(1, 1, dtype=torch.int32)
    out = quire.paged_attention(q, pages, pages, table, torch.ones(1, dtype=torch.int32), backend="reference")
    torch.testing.assert_close(out, pages[:, 0, :, 0].T[..., None])


needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")


@pytest.mark.parametrize(
    "device",
    [
        "nonsense",
        3.5,
        "cuda:x",
        pytest.param("cuda", marks=needs_no_cuda),
        pytest.param("cuda:0", marks=needs_no_cuda),
        pytest.param(torch.device("cuda"), marks=needs_no_cuda),
        pytest.param(torch.device("cuda", 0), marks=needs_no_cuda),
    ],
    ids=repr,
)
def test_a_device_that_is_not_there_is_refused_in_a_sentence(device):
    spec = quire.AttentionSpec(HEADS, KV_HEADS, DIM, PAGE, torch.float32)
    for _ in range(2):
        with pytest.raises(DeviceError) as error:
            quire.plan(**step_arguments(), spec=spec, device=device)
        assert_one_sentence(error, DeviceError, "device")
        with pytest.raises(DeviceError, match="device must be"):
            quire.Planner(spec, max_batch=3, max_seq_len=12, device=device)
        assert f"got {device!r} (" in str(error.value)


@pytest.mark.parametrize(
    "device", [None, "cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)], ids=repr
)
def test_every_name_of_the_host_is_the_one_its_tensors_have(device):
    spec = quire.AttentionSpec(HEADS, KV_HEADS, DIM, PAGE, torch.float32)
    plan = quire.plan(**step_arguments(), spec=spec, device=device, backend="reference")
    assert plan.device == torch.zeros(1).device
    plan.run(**layer_arguments())
    elsewhere = quire.plan(**step_arguments(), spec=spec, device="meta", backend="reference")
    assert elsewhere.device == torch.device("meta")


def test_every_argument_error_is_a_value_error_and_quires_own():
    for kind in (ArgumentError, ShapeError, DtypeError, DeviceError):
        assert issubclass(kind, ValueError)
        assert issubclass(kind, quire.QuireError)
