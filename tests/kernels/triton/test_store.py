"""write_kv in the interpreter: every token in its slot, quantised to the reference's bits, and nothing beside it."""

import math

import pytest
import torch
from pairs import every_pair, one_in
from support import LAYOUTS, empty_pages

import quire
from quire.kernels import reference
from quire.kernels.triton.store import bind_write
from quire.spec import LARGEST, QUANTIZED_DTYPES

pytestmark = pytest.mark.interpreted

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
UNTOUCHED = 3.0
CASES = every_pair(
    {
        "head_dim": [16, 20, 64, 80, 256],
        "layout": LAYOUTS,
        "kv_dtype": [None, *QUANTIZED_DTYPES],
        "dtype": [F32, F16, BF16],
        "heads": [1, 3, 40],
        "page_size": [1, 13, 16],
    }
)


def bits(tensor):
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def name(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def pages_and_scales(case, num_pages):
    stored = case["dtype"] if case["kv_dtype"] is None else QUANTIZED_DTYPES[case["kv_dtype"]]
    sizes = (case["heads"], num_pages, case["page_size"], case["head_dim"])
    layouts = ("hnd", "gaps") if case["layout"] == "apart" else (case["layout"],) * 2
    pages = [empty_pages(sizes, stored, layout).fill_(UNTOUCHED) for layout in layouts]
    scales = [None if case["kv_dtype"] is None else torch.full(sizes[:3], math.nan) for _ in range(2)]
    return pages, scales


def new_tokens(case, count):
    """Rows of all sizes, one of zeros, one with a NaN; between the rows lies what must not be read."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-6, 3, count)[:, None, None]
    rows = []
    for _ in range(2):
        wide = torch.full((count, case["heads"] + 2, case["head_dim"] + 3), math.nan, dtype=case["dtype"])
        x = wide[:, 1:-1, 1 : case["head_dim"] + 1]
        x.copy_(torch.randn(x.shape, generator=generator) * size)
        x[2] = 0.0
        rows.append(x)
    rows[1][4, 0, 7] = math.nan
    return rows


@pytest.mark.parametrize("case", one_in(2, CASES), ids=name)
def test_each_slot_holds_what_the_reference_puts_there(case):
    k, v = new_tokens(case, 9)
    num_pages = -(-20 // case["page_size"])
    slots = torch.randperm(num_pages * case["page_size"], generator=torch.Generator().manual_seed(1))[:9]
    slots[5] = -1
    (k_pages, v_pages), scales = pages_and_scales(case, num_pages)
    wanted_pages, wanted_scales = pages_and_scales(case, num_pages)
    reference.write_kv(k, v, *wanted_pages, slots, *wanted_scales)
    quire.write_kv(k, v, k_pages, v_pages, slots, k_scale=scales[0], v_scale=scales[1], backend="triton")
    for got, wanted in zip((k_pages, v_pages), wanted_pages, strict=True):
        assert torch.equal(bits(got), bits(wanted))
    for got, wanted in zip(scales, wanted_scales, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_no_tokens_write_nothing():
    case = CASES[0] | {"dtype": F32, "kv_dtype": None}
    (k_pages, v_pages), _ = pages_and_scales(case, 2)
    rows = torch.empty(0, case["heads"], case["head_dim"])
    quire.write_kv(rows, rows, k_pages, v_pages, torch.empty(0, dtype=torch.int64), backend="triton")
    assert (k_pages == UNTOUCHED).all()


INT64 = torch.iinfo(torch.int64)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("page_size", [13, 16])
def test_a_slot_outside_the_pool_writes_nowhere(page_size, kv_dtype):
    """The pool lies in the middle of larger tensors, so that its neighbours in memory can be looked at."""
    case = CASES[0] | {
        "dtype": F32,
        "kv_dtype": kv_dtype,
        "layout": "nhd",
        "page_size": page_size,
        "heads": 3,
    }
    num_pages = 2
    end = num_pages * page_size
    slots = torch.tensor(
        [-1, 4, end, -page_size, end + page_size - 1, INT64.min, INT64.max, 2**31, -2, end - 1]
    )
    k, v = (torch.ones(len(slots), 3, case["head_dim"]) for _ in range(2))
    around, scales_around = pages_and_scales(case, num_pages + 2)
    pages, scales = (
        [None if whole is None else whole[:, 1 : num_pages + 1] for whole in wholes]
        for wholes in (around, scales_around)
    )
    tensors = k, v, *pages, slots, *scales
    bind_write(*tensors, False)(*tensors)  # the kernel itself: the operator refuses such slots on the host
    for whole in around:
        written = (whole != UNTOUCHED).all((0, 3)).flatten().nonzero().flatten()
        assert written.tolist() == [page_size + 4, page_size + end - 1]
        assert (whole == UNTOUCHED).sum() == whole.numel() - 2 * 3 * case["head_dim"]
    for whole in scales_around:
        assert whole is None or whole.isfinite().sum() == 2 * 3


GIVEN = {
    "per tensor": lambda heads, factor: torch.tensor(0.03 * factor).expand(heads, 4, 16),
    "per head": lambda heads, factor: (torch.logspace(-3, 0, heads) * factor)[:, None, None].expand(
        heads, 4, 16
    ),
    "per token": lambda heads, factor: (torch.logspace(-3, 0, heads * 64) * factor).view(heads, 4, 16),
}


@pytest.mark.parametrize("form", GIVEN)
@pytest.mark.parametrize("kv_dtype", QUANTIZED_DTYPES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_given_scales_are_divided_by_and_left_alone(dtype, kv_dtype, form):
    stored, heads = QUANTIZED_DTYPES[kv_dtype], 3
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 7, heads, 20, generator=generator) * torch.logspace(-4, 6, 7)[:, None, None]
    rows[:, 2, 1, 3], rows[:, 3, 0, 0], rows[:, 4, 0, 1] = math.nan, math.inf, -math.inf
    k, v = rows.to(dtype)
    k_scale, v_scale = GIVEN[form](heads, 1.0), GIVEN[form](heads, 0.3)
    scales = [scale.clone() for scale in (k_scale, v_scale)]
    pages = [torch.full((heads, 4, 16, 20), UNTOUCHED).to(stored) for _ in range(2)]
    slots = torch.tensor([63, 0, 17, -1, 40, 5, 64])
    tensors = k, v, *pages, slots, k_scale, v_scale
    bind_write(*tensors, True)(*tensors)
    inside = (slots >= 0) & (slots < 64)
    for x, got, scale, before in zip((k, v), pages, (k_scale, v_scale), scales, strict=True):
        at = slots[inside] // 16, slots[inside] % 16
        ratio = x[inside].float() / scale[:, at[0], at[1]].T[:, :, None]
        wanted = ratio.clamp(-LARGEST[stored], LARGEST[stored])
        wanted = (wanted.round().nan_to_num(0.0) if kv_dtype == "int8" else wanted).to(stored).float()
        found = got[:, at[0], at[1]].transpose(0, 1).float()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)  # a NaN's sign says nothing
        assert torch.equal(found.signbit() & ~found.isnan(), wanted.signbit() & ~wanted.isnan())
        assert torch.equal(scale, before)
        got[:, at[0], at[1]] = torch.tensor(UNTOUCHED).to(stored)
        assert (got.float() == torch.tensor(UNTOUCHED).to(stored).float()).all()


@pytest.mark.parametrize("kv_dtype", QUANTIZED_DTYPES)
def test_a_given_scale_of_zero_stores_zeros(kv_dtype):
    rows = torch.tensor([1.0, -2.0, math.inf, 0.0] * 4).expand(1, 1, 16)
    pages = [torch.full((1, 1, 4, 16), UNTOUCHED).to(QUANTIZED_DTYPES[kv_dtype]) for _ in range(2)]
    tensors = rows, rows, *pages, torch.tensor([1]), *(torch.zeros(1).expand(1, 1, 4) for _ in range(2))
    bind_write(*tensors, True)(*tensors)
    for got in pages:
        assert (got[:, :, 1].float() == 0).all()
