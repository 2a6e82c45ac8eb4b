"""write_kv: every token's keys and values in its slot, exactly or within half a step, and nothing anywhere else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAYOUTS

import quire
from quire.spec import QUANTIZED_DTYPES

HEADS, DIM, PAGE, PAGES = 2, 16, 4, 6
NUM_SLOTS = PAGE * PAGES
UNTOUCHED = 7.0

# One worker compiles the store kernels of these dtypes, not both.
pytestmark = pytest.mark.xdist_group("store-float32-d16")
both_backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


def new_tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = torch.randn(2, count, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    return k, v


def untouched_pages(layout: str = "pool", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if layout == "nhd":
        return torch.full((PAGES, PAGE, HEADS, DIM), UNTOUCHED).to(dtype).permute(2, 0, 1, 3)
    if layout == "hnd":
        return torch.full((PAGES, HEADS, PAGE, DIM), UNTOUCHED).to(dtype).transpose(0, 1)
    if layout == "gaps":
        wide = torch.full((HEADS, PAGES + 1, PAGE + 2, DIM + 5), UNTOUCHED).to(dtype)
        return wide[:, :PAGES, 1:-1, 3 : DIM + 3]
    return torch.full((HEADS, PAGES, PAGE, DIM), UNTOUCHED).to(dtype)


def written(rows: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """What the pages hold afterwards, slot by slot."""
    pages = torch.full((HEADS, PAGES, PAGE, DIM), UNTOUCHED, dtype=rows.dtype)
    for token, slot in enumerate(slots):
        if slot >= 0:
            pages[:, slot // PAGE, slot % PAGE] = rows[token]
    return pages


def everything_behind(pages: torch.Tensor) -> torch.Tensor:
    """The memory a view looks into, gaps included."""
    return torch.empty(0, dtype=pages.dtype).set_(pages.untyped_storage())


# --- plain pages -------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_lies_in_its_slot_and_every_other_is_as_before(backend, layout):
    slots = [0, 23, 5, 6, 7, 12]
    k, v = new_tokens(len(slots))
    k_pages, v_pages = untouched_pages(layout), untouched_pages(layout)

    assert quire.write_kv(k, v, k_pages, v_pages, torch.tensor(slots), backend=backend) is None

    assert torch.equal(k_pages, written(k, slots))
    assert torch.equal(v_pages, written(v, slots))
    k_pages.fill_(UNTOUCHED)
    v_pages.fill_(UNTOUCHED)
    assert (everything_behind(k_pages) == UNTOUCHED).all(), "the gaps between the rows are no one's to write"
    assert (everything_behind(v_pages) == UNTOUCHED).all()


@settings(max_examples=40)
@given(
    slots=st.lists(st.integers(0, NUM_SLOTS - 1), unique=True, max_size=NUM_SLOTS),
    skipped=st.sets(st.integers(0, NUM_SLOTS - 1)),
    backend=st.sampled_from(["cpu", "reference"]),
    seed=st.integers(0, 99),
)
def test_any_set_of_slots_in_any_order_is_written_and_minus_one_nowhere(slots, skipped, backend, seed):
    slots = [-1 if token in skipped else slot for token, slot in enumerate(slots)]
    k, v = new_tokens(len(slots), seed)
    k_pages, v_pages = untouched_pages(), untouched_pages()
    quire.write_kv(k, v, k_pages, v_pages, torch.tensor(slots, dtype=torch.int64), backend=backend)
    assert torch.equal(k_pages, written(k, slots))
    assert torch.equal(v_pages, written(v, slots))


@both_backends
def test_rows_may_be_cut_out_of_a_fused_projection(backend):
    slots = [9, -1, 2]
    fused = torch.full((3, 3 * HEADS + 2, DIM + 4), torch.nan)
    k, v = fused[:, 1 : 1 + HEADS, 1 : DIM + 1], fused[:, 4 : 4 + 2 * HEADS : 2, 3 : DIM + 3]
    for view, values in zip((k, v), new_tokens(3), strict=True):
        view.copy_(values)
    k_pages, v_pages = untouched_pages(), untouched_pages()
    quire.write_kv(k, v, k_pages, v_pages, torch.tensor(slots), backend=backend)
    assert torch.equal(k_pages, written(k, slots))
    assert torch.equal(v_pages, written(v, slots))


@both_backends
def test_slots_may_be_a_strided_view(backend):
    k, v = new_tokens(3)
    k_pages, v_pages = untouched_pages(), untouched_pages()
    slots = torch.tensor([4, 0, 11, 0, 3, 0])[::2]
    quire.write_kv(k, v, k_pages, v_pages, slots, backend=backend)
    assert torch.equal(k_pages, written(k, [4, 11, 3]))
    assert torch.equal(v_pages, written(v, [4, 11, 3]))


@both_backends
def test_nan_and_infinities_are_kept_as_they_come(backend):
    k, v = new_tokens(2)
    k[0, 0, :3] = torch.tensor([torch.inf, -torch.inf, -0.0])
    v[1, 1, 0] = torch.nan
    k_pages, v_pages = untouched_pages(), untouched_pages()
    quire.write_kv(k, v, k_pages, v_pages, torch.tensor([1, 2]), backend=backend)
    assert torch.equal(k_pages[0, 0, 1].view(torch.int32), k[0, 0].view(torch.int32))
    assert v_pages[1, 0, 2, 0].isnan()
    assert v_pages.isnan().sum() == 1


@both_backends
def test_what_the_page_table_handed_out_is_where_attention_finds_it(backend):
    """Written through PageTable's slots, read back by the operator: two sequences, interleaved appends."""
    spec = quire.AttentionSpec(4, HEADS, DIM, PAGE, torch.float32)
    pool = quire.KVPool(spec, num_layers=2, num_pages=PAGES)
    table = quire.PageTable(quire.PageAllocator(PAGES), PAGE)
    first, second = "first", "second"
    table.add(first)
    table.add(second)
    pool.k.fill_(torch.nan)
    pool.v.fill_(torch.nan)
    k_pages, v_pages = pool.k[1], pool.v[1]
    rows = {first: [], second: []}
    for seed, (sequence, count) in enumerate([(first, 5), (second, 3), (first, 4), (second, 1)]):
        k, v = new_tokens(count, seed)
        slots = torch.from_numpy(table.append(sequence, count).slot_mapping)
        quire.write_kv(k, v, k_pages, v_pages, slots, backend=backend)
        rows[sequence].append((k, v))

    q = torch.randn(2, 4, DIM)
    step = table.dense([first, second]), table.seq_lens([first, second])
    out = quire.paged_attention(q, k_pages, v_pages, *step, backend=backend)
    for i, sequence in enumerate((first, second)):
        k, v = (
            torch.cat(parts).transpose(0, 1).repeat_interleave(2, 0)
            for parts in zip(*rows[sequence], strict=True)
        )
        weights = torch.softmax(torch.einsum("hd,htd->ht", q[i], k) * DIM**-0.5, -1)
        torch.testing.assert_close(out[i], torch.einsum("ht,htd->hd", weights, v))
    assert pool.k[0].isnan().all(), "the other layer is not written"
    assert pool.v[0].isnan().all()


# --- quantised pages ---------------------------------------------------------------------------------------

LARGEST = {"int8": 127.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
MANTISSA_BITS = {"fp8_e4m3": 3, "fp8_e5m2": 2}
SMALLEST_STEP = {"fp8_e4m3": 2.0**-9, "fp8_e5m2": 2.0**-16}


def half_a_step(values: torch.Tensor, scale: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """How far rounding to nearest may move each element, and four roundings of fp32 beside it."""
    if kv_dtype == "int8":
        step = scale.expand_as(values)
    else:
        exponent = (values.abs() / scale).clamp(min=1e-30).log2().floor()
        step = scale * torch.maximum(
            2.0 ** (exponent - MANTISSA_BITS[kv_dtype]), torch.tensor(SMALLEST_STEP[kv_dtype])
        )
    return 0.5 * step * (1 + 1e-5) + 4 * torch.finfo(torch.float32).eps * values.abs()


def quantised_pages(kv_dtype: str) -> dict[str, torch.Tensor]:
    k_scale, v_scale = torch.full((2, HEADS, PAGES, PAGE), UNTOUCHED)
    dtype = QUANTIZED_DTYPES[kv_dtype]
    return {
        "k_pages": untouched_pages(dtype=dtype),
        "v_pages": untouched_pages(dtype=dtype),
        "k_scale": k_scale,
        "v_scale": v_scale,
    }


@both_backends
@pytest.mark.parametrize("kv_dtype", QUANTIZED_DTYPES)
def test_values_times_scale_are_within_half_a_step_of_what_came(backend, kv_dtype):
    slots = [3, 17, -1, 8]
    k, v = new_tokens(len(slots))
    k[1] *= 1e4
    v[3, 1] *= 1e-4
    pages = quantised_pages(kv_dtype)
    quire.write_kv(k, v, slot_mapping=torch.tensor(slots), backend=backend, **pages)

    for rows, name in ((k, "k"), (v, "v")):
        values, scales = pages[f"{name}_pages"].float(), pages[f"{name}_scale"]
        left_alone = torch.ones(NUM_SLOTS, dtype=torch.bool)
        for token, slot in enumerate(slots):
            if slot < 0:
                continue
            left_alone[slot] = False
            stored, scale = values[:, slot // PAGE, slot % PAGE], scales[:, slot // PAGE, slot % PAGE, None]
            torch.testing.assert_close(scale, rows[token].abs().amax(-1, keepdim=True) / LARGEST[kv_dtype])
            assert (stored.abs().amax(-1) == LARGEST[kv_dtype]).all(), (
                "the largest element uses the whole range"
            )
            error = (stored * scale - rows[token]).abs()
            assert (error <= half_a_step(rows[token], scale, kv_dtype)).all()
        assert (values.flatten(1, 2)[:, left_alone] == UNTOUCHED).all()
        assert (scales.flatten(1)[:, left_alone] == UNTOUCHED).all()


@both_backends
@pytest.mark.parametrize("kv_dtype", QUANTIZED_DTYPES)
def test_a_row_of_zeros_reads_back_as_zeros_beside_rows_that_are_none(backend, kv_dtype):
    k, v = new_tokens(2)
    k[0, 1] = 0.0
    v[0] = -0.0
    pages = quantised_pages(kv_dtype)
    quire.write_kv(k, v, slot_mapping=torch.tensor([5, 6]), backend=backend, **pages)
    k_read = pages["k_pages"].float()[:, 1, 1] * pages["k_scale"][:, 1, 1, None]
    v_read = pages["v_pages"].float()[:, 1, 1] * pages["v_scale"][:, 1, 1, None]
    assert (k_read[1] == 0).all()
    assert (k_read[0] != 0).any()
    assert (v_read == 0).all()


@both_backends
def test_scales_may_lie_beside_nhd_pages(backend):
    k, v = new_tokens(2)
    pages = quantised_pages("int8")
    wanted = {name: tensor.clone() for name, tensor in pages.items()}
    quire.write_kv(k, v, slot_mapping=torch.tensor([5, 14]), backend="reference", **wanted)
    views = {
        name: tensor.permute(1, 2, 0, *range(3, tensor.dim()))
        .contiguous()
        .permute(2, 0, 1, *range(3, tensor.dim()))
        for name, tensor in pages.items()
    }
    quire.write_kv(k, v, slot_mapping=torch.tensor([5, 14]), backend=backend, **views)
    for name, tensor in views.items():
        torch.testing.assert_close(tensor, wanted[name])


# --- given scales ------------------------------------------------------------------------------------------

FORMS = {"one": lambda x: x[0].clone(), "one in a list": lambda x: x[:1].clone(), "per head": lambda x: x}


@both_backends
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_dtype", QUANTIZED_DTYPES)
def test_given_scales_divide_and_are_not_written(backend, kv_dtype, form):
    slots, largest, dtype = [3, 17, -1, 8], LARGEST[kv_dtype], QUANTIZED_DTYPES[kv_dtype]
    k, v = new_tokens(len(slots))
    k[1, 0, 2], k[1, 1, 3] = 1e30, -math.inf  # they saturate
    k_scale, v_scale = (FORMS[form](torch.tensor(x)) for x in ([2.0 / largest, 0.5], [3.0 / largest, 0.0]))
    k_pages, v_pages = untouched_pages(dtype=dtype), untouched_pages(dtype=dtype)
    before = k_scale.clone(), v_scale.clone()

    quire.write_kv(
        k, v, k_pages, v_pages, torch.tensor(slots), k_scale=k_scale, v_scale=v_scale, backend=backend
    )

    assert torch.equal(k_scale, before[0])
    assert torch.equal(v_scale, before[1])
    for rows, pages, scale in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
        per_head = scale.expand(HEADS)[None, :, None]
        quotients = torch.where(per_head > 0, rows / per_head, 0.0).clamp(-largest, largest)
        stored = (quotients.round() if dtype == torch.int8 else quotients).to(dtype)
        assert torch.equal(pages.float(), written(stored, slots).float())


MIXED = (
    ("one", "per head"),
    ("per head", "one in a list"),
    ("one", "one in a list"),
    ("per head", "strided"),
)


@both_backends
@pytest.mark.parametrize("forms", MIXED)
def test_given_scales_may_have_forms_of_their_own(backend, forms):
    """They were refused, with a fix that was none."""
    forms = [{**FORMS, "strided": lambda x: x.repeat_interleave(2)[::2]}[form] for form in forms]
    scales = [form(torch.tensor(x)) for form, x in zip(forms, ([0.01, 0.04], [0.02, 0.03]), strict=True)]
    k, v = new_tokens(7)
    table, lens = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
    q = torch.randn(1, 2 * HEADS, DIM)
    results = []
    for both in (scales, [scale.expand(HEADS).contiguous() for scale in scales]):
        pages = [untouched_pages(dtype=torch.int8) for _ in "kv"]
        named = dict(zip(("k_scale", "v_scale"), both, strict=True))
        quire.write_kv(k, v, *pages, torch.arange(PAGE, PAGE + 7), backend=backend, **named)
        results.append((*pages, quire.paged_attention(q, *pages, table, lens, backend=backend, **named)))
    for mixed, alike in zip(*results, strict=True):
        assert torch.equal(mixed, alike)


@both_backends
@pytest.mark.parametrize(
    ("kv_dtype", "stored"), [("int8", 0.0), ("fp8_e4m3", math.nan), ("fp8_e5m2", math.nan)]
)
def test_a_nan_under_a_given_scale_is_the_dtypes_nan_or_zero(backend, kv_dtype, stored):
    k, v = new_tokens(1)
    k[0, 1, 5] = math.nan
    pages = [untouched_pages(dtype=QUANTIZED_DTYPES[kv_dtype]) for _ in "kv"]
    one = torch.tensor(1.0)
    quire.write_kv(k, v, *pages, torch.tensor([6]), k_scale=one, v_scale=one, backend=backend)
    got = pages[0].float()[1, 1, 2]
    assert got[5].item() == pytest.approx(stored, nan_ok=True)
    assert got.isnan().sum() == (1 if kv_dtype != "int8" else 0)


@both_backends
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_dtype", QUANTIZED_DTYPES)
def test_attention_reads_pages_under_given_scales(backend, kv_dtype, form):
    """As it reads the same pages under the same scales written out per token and head."""
    spec = quire.AttentionSpec(4, HEADS, DIM, PAGE, torch.float32, kv_dtype)
    pages = [untouched_pages(dtype=QUANTIZED_DTYPES[kv_dtype]) for _ in "kv"]
    scales = {
        name: FORMS[form](torch.tensor(x) / LARGEST[kv_dtype])
        for name, x in (("k_scale", [3.0, 4.0]), ("v_scale", [5.0, 2.5]))
    }
    slots = [8, 9, 10, 11, 20, 21]
    quire.write_kv(*new_tokens(len(slots)), *pages, torch.tensor(slots), backend=backend, **scales)
    written_out = {
        name: scale.expand(HEADS)[:, None, None].repeat(1, PAGES, PAGE) for name, scale in scales.items()
    }
    q, step = torch.randn(2, 4, DIM), (torch.tensor([[2, 5]] * 2, dtype=torch.int32), torch.tensor([6, 3]))
    plan = quire.plan(*step, spec, backend=backend)
    wanted = plan.run(q, *pages, **written_out)
    assert wanted.isfinite().all()
    for _ in range(2):
        torch.testing.assert_close(plan.run(q, *pages, **scales), wanted, rtol=1e-6, atol=1e-6)
    at_once = quire.paged_attention(q, *pages, *step, backend=backend, **scales)
    torch.testing.assert_close(at_once, wanted, rtol=1e-6, atol=1e-6)


# --- refusals; tests/test_checks.py holds the table of bad arguments ---------------------------------------


@both_backends
@pytest.mark.parametrize("spread", [1, 3])
@pytest.mark.parametrize("slot", [NUM_SLOTS, 10**6, 2**62, -2, -(2**63)])
def test_slots_that_are_not_there_are_refused_and_nothing_is_written(backend, slot, spread):
    """A slot of 1,000,000 ended the process, one just behind the pool was in another head's pages."""
    k, v = new_tokens(3)
    k_pages, v_pages = untouched_pages(), untouched_pages()
    for slots in ([0, slot, 1], [0, 1, slot]):
        strided = torch.tensor(slots).repeat_interleave(spread)[::spread]
        with pytest.raises(quire.ArgumentError, match=rf"between −1 and {NUM_SLOTS - 1}; got .*{slot}.*Fix:"):
            quire.write_kv(k, v, k_pages, v_pages, strided, backend=backend)
        assert (k_pages == UNTOUCHED).all()
        assert (v_pages == UNTOUCHED).all()

    fine = [NUM_SLOTS - 1, -1, 0]
    quire.write_kv(k, v, k_pages, v_pages, torch.tensor(fine), backend=backend)
    assert torch.equal(k_pages, written(k, fine))
    none = torch.zeros(0, dtype=torch.int64)
    quire.write_kv(k[:0], v[:0], k_pages, v_pages, none, backend=backend)


def test_a_backend_that_is_not_there_is_refused_and_nothing_is_written():
    k, v = new_tokens(1)
    k_pages, v_pages = untouched_pages(), untouched_pages()
    with pytest.raises(quire.UnsupportedError, match=r'backend "triton".*Fix:'):
        quire.write_kv(k, v, k_pages, v_pages, torch.tensor([0]), backend="triton")
    with pytest.raises(quire.ArgumentError, match=r"got 'cuda'\. Fix:"):
        quire.write_kv(k, v, k_pages, v_pages, torch.tensor([0]), backend="cuda")
    assert (k_pages == UNTOUCHED).all()
    assert (v_pages == UNTOUCHED).all()


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_a_strange_element_is_not_lost_by_quantisation(kv_dtype, strange):
    """Its row comes back strange on both backends, its neighbours as they were."""
    spec = quire.AttentionSpec(4, 2, 40, page_size=4, dtype=torch.float32, kv_dtype=kv_dtype)
    rows = torch.randn(2, 2, 40)
    rows[1, 0, 33] = strange
    restored = {}
    for backend in ("cpu", "reference"):
        pool = quire.KVPool(spec, num_layers=1, num_pages=1)
        scales = {"k_scale": pool.k_scale[0], "v_scale": pool.v_scale[0]}
        quire.write_kv(rows, rows, *pool.layer(0), torch.tensor([0, 1]), **scales, backend=backend)
        restored[backend] = pool.k[0, :, 0, :2].float() * pool.k_scale[0, :, 0, :2, None]
        assert not restored[backend][0, 1].isfinite().all()
    torch.testing.assert_close(restored["cpu"][1], restored["reference"][1], rtol=0, atol=0)
    torch.testing.assert_close(restored["cpu"][0, 0], restored["reference"][0, 0], rtol=0, atol=0)


BAD = {
    "k of another dtype": lambda given: {"k": given["k"].double()},
    "fewer values": lambda given: {"v": given["v"][1:]},
    "k with gaps between elements": lambda given: {"k": given["k"].repeat_interleave(2, -1)[..., ::2]},
    "v_pages of a smaller pool": lambda given: {"v_pages": given["v_pages"][:, 1:]},
    "pages of another head_dim": lambda given: {"k_pages": given["k_pages"][..., 1:]},
    "pages that overlap themselves": lambda given: {
        "v_pages": given["v_pages"][:, :1].expand(-1, PAGES, -1, -1)
    },
    "int32 slots": lambda given: {"slot_mapping": given["slot_mapping"].int()},
    "a slot too many": lambda given: {"slot_mapping": torch.arange(4)},
    "slots on meta": lambda given: {"slot_mapping": given["slot_mapping"].to("meta")},
    "no slots": lambda given: {"slot_mapping": None},
    "scales for pages without": lambda given: {"k_scale": torch.ones(HEADS, PAGES, PAGE)},
    "no backend": lambda given: {"backend": "none"},
}


@pytest.mark.parametrize("bad", BAD)
def test_what_was_accepted_once_does_not_excuse_another(bad):
    k, v = new_tokens(3)
    given = {
        "k": k,
        "v": v,
        "k_pages": untouched_pages(),
        "v_pages": untouched_pages(),
        "slot_mapping": torch.arange(3),
    }
    for _ in range(2):
        quire.write_kv(**given)
    given |= {"k_pages": untouched_pages(), "v_pages": untouched_pages()}
    with pytest.raises(quire.QuireError, match="Fix:"):
        quire.write_kv(**{**given, **BAD[bad](given)})
    assert (given["k_pages"] == UNTOUCHED).all()
    assert (given["v_pages"] == UNTOUCHED).all()


def test_pages_that_overlap_themselves_are_refused():
    rows = torch.randn(1, 2, 16)
    pages = torch.zeros(2, 1, 4, 16).expand(2, 3, 4, 16)
    with pytest.raises(quire.ShapeError, match="k_pages must have memory of its own"):
        quire.write_kv(rows, rows, pages, pages, torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_pages_of_a_foreign_dtype_are_refused(dtype):
    rows, pages = torch.randn(1, 2, 16), torch.zeros(2, 3, 4, 16, dtype=dtype)
    with pytest.raises(quire.DtypeError, match=r"k_pages must be .*; got .*\. Fix: "):
        quire.write_kv(rows, rows, pages, pages, torch.tensor([0]))
    assert not pages.any()
