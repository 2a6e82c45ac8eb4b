"""write_kv in the interpreter: every token in its slot, quantised to the reference's bits, and nothing beside it."""

import math

import pytest
import torch
from pairs import every_pair
from support import LAYOUTS, empty_pages

import quire
from quire.kernels import reference
from quire.spec import QUANTIZED_DTYPES

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


@pytest.mark.parametrize("case", CASES, ids=name)
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
