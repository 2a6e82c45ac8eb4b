"""Products and sums of rows in the interpreter: right, and a row's bits are its own."""

import pytest
import torch

from quire.kernels.triton.linear import linear, row_sums

pytestmark = pytest.mark.interpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(tokens, rows, width, dtype, *, by_columns=False):
    generator = torch.Generator().manual_seed(tokens + rows + width)
    x, weight, bias = (
        torch.randn(*sizes, generator=generator).to(dtype)
        for sizes in ((tokens, width), (rows, width), (rows,))
    )
    return x, weight.t().contiguous().t() if by_columns else weight, bias


def run(x, weight, bias):
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype)
    linear(x, weight, bias, out)
    return out


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_right_and_a_rows_bits_its_own(dtype, by_columns):
    x, weight, bias = case(70, 75, 130, dtype, by_columns=by_columns)
    out = run(x, weight, bias)
    exact = x.double() @ weight.double().T + bias.double()
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() + 4e-5
    for first, end in ((0, 1), (69, 70), (3, 36)):
        assert torch.equal(run(x[first:end], weight, bias), out[first:end])


def test_what_lies_between_rows_is_neither_read_nor_written():
    x, weight, _ = case(5, 9, 20, torch.float32)
    gaps = torch.full((5, 33), float("nan"))
    gaps[:, :20] = x
    out = torch.full((5, 12), float("nan"))
    linear(gaps[:, :20], weight, None, out[:, :9])
    assert torch.equal(out[:, :9], run(x, weight, None))
    assert out[:, 9:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_rows_are_right_and_a_rows_bits_its_own(dtype):
    x = torch.randn(3, 4, 1500, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = row_sums(x)
    assert sums.shape == (3, 4)
    exact = x.double().sum(-1)
    assert (sums.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max() + 1e-5
    assert torch.equal(row_sums(x[1:2, 2:3]), sums[1:2, 2:3])
    assert torch.equal(row_sums(x.transpose(0, 1)), sums.T)
