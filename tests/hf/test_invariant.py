"""What takes the place of torch's operators: close to them, and the same bits for a row in any company."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from quire.errors import UnsupportedError
from quire.hf.invariant import SameBits, Unproven, replacement

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROWS, WIDTH = 300, 43  # a row is no whole number of vectors
aten = torch.ops.aten


def weight(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def grouped(x):
    """Rows sent to three experts by what stands in them, multiplied, and brought back."""
    experts, order = torch.sort((x[:, 0].float() * 7).long() % 3)
    offsets = torch.bincount(experts, minlength=3).cumsum(0).int()
    out = torch._grouped_mm(x[order], weight(3, x.shape[1], 32).to(x.dtype), offs=offsets)
    return torch.empty_like(out).index_put_((order,), out)


# Of x [rows, width]; each gives a tensor with as many rows. Some are what models make of operators, not one.
REPLACED = {
    "linear": lambda x: F.linear(x, weight(21, x.shape[1]).to(x.dtype), weight(21).to(x.dtype)),
    "matmul": lambda x: x @ weight(x.shape[1], 130).to(x.dtype),
    "addmm": lambda x: torch.addmm(weight(30).to(x.dtype), x, weight(x.shape[1], 30).to(x.dtype)),
    "addmm of a matrix": lambda x: torch.addmm(x[:, :5], x, weight(x.shape[1], 5).to(x.dtype)),
    "bmm": lambda x: torch.bmm(x.expand(2, *x.shape), weight(2, x.shape[1], 20).to(x.dtype))[1],
    "baddbmm": lambda x: torch.baddbmm(x[None, :, :5], x[None], weight(1, x.shape[1], 5).to(x.dtype))[0],
    "einsum": lambda x: torch.einsum("tk,nk->tn", x, weight(130, x.shape[1]).to(x.dtype)),
    "sigmoid": torch.sigmoid,
    "sigmoid in place": lambda x: x.clone().sigmoid_(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "softplus with a slope": lambda x: F.softplus(x, beta=2.0, threshold=1.0),
    "rsqrt": lambda x: x.abs().rsqrt(),
    "power": lambda x: (x.abs() + 0.1).pow(-0.5),
    "sum of neighbours": lambda x: x[:, :40].reshape(len(x), 4, 10).sum(1),
    "sum over a stack": lambda x: torch.stack([x * (i + 0.3) for i in range(7)]).sum(0) / 30,
    "sum, dimension kept": lambda x: x[:, :40].reshape(len(x), 4, 10).sum(1, keepdim=True)[:, 0],
    "sum across columns": lambda x: x.t().contiguous().t().sum(-1, keepdim=True),
    "mean across columns": lambda x: x.t().contiguous().t().mean(-1, keepdim=True),
    "complex product": lambda x: torch.view_as_real(
        torch.complex(x.float(), x.float().flip(1)) * torch.complex(x.float().sin(), x.float().cos())
    ).flatten(1),
    "rms_norm": lambda x: F.rms_norm(x, (x.shape[1],), x.new_ones(x.shape[1]), 1e-5),
}  # fmt: skip
KEPT = {
    "exp": torch.exp,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "log": lambda x: x.abs().log(),
    "log1p": lambda x: x.abs().log1p(),
    "polar": lambda x: torch.view_as_real(torch.polar(x.float().abs(), x.float())).flatten(1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, (x.shape[1],)),
    "mean": lambda x: x.pow(2).mean(-1, keepdim=True),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "cumsum": lambda x: x.cumsum(-1),
    "cube": lambda x: x.pow(3),
    "root": lambda x: x.abs().sqrt(),
    "quotient": lambda x: x / 1.7,
    "rsqrt": lambda x: x.float().abs().rsqrt(),
}


def rows_of(dtype, width=WIDTH):
    return (2 * torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))).to(dtype)


def invariant(function, x):
    with torch.inference_mode(), SameBits():
        return function(x)


def assert_rows_stand_alone(function, x, set_threads):
    set_threads(1)
    whole = invariant(function, x)
    for threads, first, end in ((1, 0, 1), (2, 0, ROWS), (1, 7, 8), (3, 5, 22), (2, 1, 130), (3, 0, ROWS)):
        set_threads(threads)
        assert torch.equal(invariant(function, x[first:end].clone()), whole[first:end])
    return whole


PRODUCTS = ("linear", "matmul", "addmm", "addmm of a matrix", "bmm", "baddbmm", "einsum")
CASES = [
    # A product's kernels are compiled for each dtype, which takes seconds; tests/kernels/cpu has them in all.
    pytest.param(name, dtype, marks=[pytest.mark.exhaustive] if name in PRODUCTS and dtype != F32 else [])
    for name in REPLACED
    for dtype in (F32, BF16, F16)
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_what_is_replaced_gives_a_row_its_own_bits_and_torchs_number(name, dtype, set_threads):
    x = rows_of(dtype)
    whole = assert_rows_stand_alone(REPLACED[name], x, set_threads)
    assert whole.dtype == (F32 if name == "complex product" else dtype)
    tolerance = {F32: 1e-5, F16: 2e-3, BF16: 2e-2}[dtype]
    torch.testing.assert_close(whole, REPLACED[name](x), rtol=tolerance, atol=tolerance)


def test_experts_give_a_row_its_own_bits(set_threads):
    x = rows_of(F32, 48)
    whole = assert_rows_stand_alone(grouped, x, set_threads)
    torch.testing.assert_close(whole, grouped(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_gives_a_row_its_own_bits_on_this_machine(name, dtype, set_threads):
    x = rows_of(dtype)
    whole = assert_rows_stand_alone(KEPT[name], x, set_threads)
    assert torch.equal(whole, assert_rows_stand_alone(KEPT[name], x.t().contiguous().t(), set_threads))


def test_the_sum_of_a_single_wide_row_is_not_split(set_threads):
    x = torch.randn(3, 1 << 16, generator=torch.Generator().manual_seed(0))
    for function in (lambda x: x.sum(-1), lambda x: x.mean(-1, keepdim=True)):
        for threads in (1, 2, 3):
            set_threads(threads)
            assert torch.equal(invariant(function, x[1:2]), invariant(function, x)[1:2])


@pytest.mark.parametrize("value", [-200.0, -1e-30, 0.0, 200.0, math.nan])
@pytest.mark.parametrize("function", [torch.sigmoid, F.silu, F.gelu, F.softplus], ids=lambda f: f.__name__)
def test_far_out_functions_are_torchs(function, value):
    x = torch.tensor([[value, 1.0]])
    torch.testing.assert_close(invariant(function, x), function(x), equal_nan=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.conv1d(x[None], weight(1, 4, 3)),
        lambda x: torch.addcmul(x, x, x),
        lambda x: x.var(-1),
        lambda x: x.pow(1.5),
        lambda x: x.sum(),
        lambda x: x.softmax(0),
        lambda x: x.cumsum(0),
        lambda x: torch.zeros(9).index_put_((torch.zeros(3, dtype=torch.long),), x[0, :3], accumulate=True),
        lambda x: torch.mm(x.double(), x.double().t()),
        lambda x: torch.sub(x, x, alpha=2.5),
    ],
)
def test_what_nobody_has_shown_is_refused_by_name(call):
    with pytest.raises(UnsupportedError, match=r"known to be; got aten\..*Fix: batch_invariant=False"):
        invariant(call, rows_of(F32)[:4])


def test_an_operator_of_someone_else_is_unproven_where_it_computes():
    x = torch.ones(2, 3)
    with pytest.raises(Unproven, match="addcdiv"):
        replacement(aten.addcdiv.default, (x, x, x), {})
    assert replacement(aten.addcdiv.default, (x.int(), 1, 2), {}) is None  # whole numbers are exact
