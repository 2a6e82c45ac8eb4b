"""Linear layers of a few tokens: as exact as torch's, and nothing read or written beside the tensors."""

import math
import sys

import pytest
import torch
from support import guarded_copy

from quire.kernels.cpu import linear as kernels
from quire.kernels.cpu.linear import STREAMED_TOKENS, linear, linear_of_any
from quire.kernels.cpu.many_tokens import GROUP, PANEL

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# tokens, rows, width: whole tiles and vectors, tails of each, one token, more tokens than a tile has
SHAPES = [
    (8, 32, 64),
    (1, 16, 16),
    (1, 37, 50),
    (2, 17, 40),
    (3, 21, 7),
    (5, 16, 1),
    (7, 101, 33),
    (8, 16, 768),
]
MORE_TOKENS = [(9, 33, 48), (13, 18, 20), (16, 64, 32), (24, 23, 65)]


def case(tokens, rows, width, dtype, *, biased):
    generator = torch.Generator().manual_seed(tokens * rows + width)
    x, weight, bias = (
        torch.randn(*sizes, generator=generator).to(dtype)
        for sizes in ((tokens, width), (rows, width), (rows,))
    )
    return x, weight, bias if biased else None


def run(x, weight, bias):
    out = torch.full((x.shape[0], weight.shape[0]), math.nan, dtype=x.dtype)
    linear(x, weight, bias, out)
    return out


def assert_accurate(out, x, weight, bias):
    """The house rule: error ≤ 2 × torch's in the same dtype, plus four roundings of float32."""
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = torch.nn.functional.linear(x, weight, bias)
    atol = 4 * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T).max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + atol
    assert (out.double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "rows", "width"), [*SHAPES, *MORE_TOKENS])
def test_it_is_as_exact_as_torch(tokens, rows, width, dtype, biased):
    x, weight, bias = case(tokens, rows, width, dtype, biased=biased)
    assert_accurate(run(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("width", [21, 64])  # with a tail, and in whole pairs of bfloat16
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_byte_behind_a_tensor_is_touched(dtype, width):
    x, weight, bias = case(3, 19, width, dtype, biased=True)
    out = guarded_copy(torch.zeros(3, 19, dtype=dtype))
    linear(guarded_copy(x), guarded_copy(weight), guarded_copy(bias), out)
    assert torch.equal(out, run(x, weight, bias))


def test_gaps_between_rows_are_neither_read_nor_written():
    x, weight, bias = case(6, 20, 35, torch.float32, biased=True)

    def with_gaps(rows):
        wide = torch.full((rows.shape[0], rows.shape[1] + 13), math.nan)
        wide[:, : rows.shape[1]] = rows
        return wide

    out = with_gaps(torch.zeros(6, 20))
    linear(with_gaps(x)[:, :35], with_gaps(weight)[:, :35], bias, out[:, :20])
    assert torch.equal(out[:, :20], run(x, weight, bias))
    assert out[:, 20:].isnan().all()


def test_a_token_that_is_nan_or_infinite_spoils_no_other():
    x, weight, _ = case(7, 32, 48, torch.float32, biased=False)
    clean = run(x, weight, None)
    x[2, 5], x[4, 7] = math.nan, math.inf
    out = run(x, weight, None)
    others = [0, 1, 3, 5, 6]
    assert torch.equal(out[others], clean[others])
    assert out[2].isnan().all()
    assert not out[4].isfinite().any()


@pytest.mark.parametrize("tokens", [1, 8, 11])
def test_the_bits_do_not_depend_on_the_number_of_threads(tokens, set_threads):
    x, weight, _ = case(tokens, 16 * 5 + 3, 100, torch.float32, biased=False)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(run(x, weight, None))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 70), (torch.bfloat16, 96)], ids=str)
def test_a_token_gives_the_same_bits_whatever_stands_beside_it_in_a_tile(dtype, width):
    x, weight, _ = case(8, 40, width, dtype, biased=False)
    assert torch.equal(run(x[:5], weight, None), run(x, weight, None)[:5])


def test_more_threads_than_tiles_leave_some_idle(set_threads):
    set_threads(3)
    x, weight, _ = case(1, 16, 32, torch.float32, biased=False)
    assert_accurate(run(x, weight, None), x, weight, None)


@pytest.mark.parametrize("most", [8, 24, sys.maxsize])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_that_layers_run_is_known_before(dtype, most, monkeypatch):
    used = set()
    monkeypatch.setattr(kernels, "run", lambda function, *arguments: used.add((function, arguments[0])))
    monkeypatch.setattr(kernels, "most_tokens", lambda dtype: most)
    for width in (64, 50):
        for tokens in (*range(1, min(most, 30) + 1), min(most, 300)):
            x, weight, _ = case(tokens, 32, width, dtype, biased=False)
            linear_of_any(x, weight, None, x.new_empty(tokens, 32))
    jobs = kernels.compile_jobs(dtype, {64, 50})
    functions = {"multiply": kernels.multiply, "multiply_panels": kernels.multiply_panels}
    assert {(functions[job.function], job.arguments[0]) for job in jobs} == used
    assert {job.function for job in jobs} == ({"multiply", "multiply_panels"} if most > 24 else {"multiply"})


SERVER_2019 = {"sse2": True, "avx512f": True, "avx512vnni": True, "avx512bf16": False}


@pytest.mark.parametrize(
    ("features", "float16", "bfloat16"),
    [
        (SERVER_2019, sys.maxsize, sys.maxsize),
        ({"sse2": True, "avx2": True}, sys.maxsize, sys.maxsize),
        (SERVER_2019 | {"avx512bf16": True}, sys.maxsize, 8),
        (SERVER_2019 | {"amx-bf16": True, "avx512fp16": True}, 8, 8),
        ({"neon": True}, 8, 8),  # not measured: as where torch has products
    ],
)
def test_where_torch_widens_each_product_any_number_of_tokens_is_faster_here(
    features, float16, bfloat16, monkeypatch
):
    monkeypatch.setattr(kernels.llvm, "get_host_cpu_features", lambda: features)
    most = kernels.most_tokens.__wrapped__  # without its cache
    assert (most(torch.float16), most(torch.bfloat16)) == (float16, bfloat16)
    assert (most(torch.float32), most(torch.float64)) == (24, 0)


# rows, width: a weight of fewer rows than a vector has lanes, whole vectors and groups, tails of each
WEIGHTS = [(1, 5), (3, 64), (GROUP, 32), (GROUP + 21, 75)]
# first and end of a batch's tokens: one, a tile, the most that are streamed, one more, a panel and a few
BATCHES = [(2, 3), (5, 12), (0, STREAMED_TOKENS), (1, STREAMED_TOKENS + 2), (3, PANEL + 6)]


def run_any(x, weight, bias):
    out = torch.full((x.shape[0], weight.shape[0]), math.nan, dtype=x.dtype)
    linear_of_any(x, weight, bias, out)
    return out


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.exhaustive) for d in DTYPES[1:])]
)
@pytest.mark.parametrize(("rows", "width"), WEIGHTS)
def test_of_any_number_of_tokens_each_has_the_bits_that_it_has_alone(
    rows, width, dtype, by_columns, set_threads
):
    x, weight, bias = case(PANEL + 9, rows, width, dtype, biased=True)
    if by_columns:
        weight = weight.t().contiguous().t()
    out = run_any(x, weight, bias)
    assert_accurate(out, x, weight, bias)
    for threads in (1, 2, 3):
        set_threads(threads)
        for first, end in BATCHES:
            assert torch.equal(run_any(x[first:end], weight, bias), out[first:end])


@pytest.mark.parametrize("width", [21, 64])
def test_many_tokens_touch_no_byte_behind_a_tensor(width):
    for by_columns in (False, True):
        x, weight, bias = case(STREAMED_TOKENS + 3, 19, width, torch.float32, biased=True)
        guarded = guarded_copy(weight.t().contiguous()).t() if by_columns else guarded_copy(weight)
        out = guarded_copy(torch.zeros(len(x), 19))
        linear_of_any(guarded_copy(x), guarded, guarded_copy(bias), out)
        assert torch.equal(out, run_any(x, weight, bias))


def test_tensors_that_no_kernel_reads_are_copied_first():
    x, weight, bias = case(STREAMED_TOKENS + 1, 20, 33, torch.float32, biased=True)
    expected = run_any(x, weight, bias)
    assert torch.equal(run_any(x.t().contiguous().t(), weight, bias), expected)
    assert torch.equal(
        run_any(x, weight.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2], bias), expected
    )
    assert torch.equal(
        run_any(torch._neg_view(-x), torch._neg_view(-weight), torch._neg_view(-bias)), expected
    )
    wide = torch.full((len(x), 50), math.nan)
    linear_of_any(x, weight, bias, wide[:, :20])
    assert torch.equal(wide[:, :20], expected)
    assert wide[:, 20:].isnan().all()


def test_a_token_that_is_nan_or_infinite_spoils_none_of_many():
    x, weight, _ = case(STREAMED_TOKENS + 9, 33, 40, torch.float32, biased=False)
    clean = run_any(x, weight, None)
    x[2, 5], x[-1, 7] = math.nan, math.inf
    out = run_any(x, weight, None)
    assert torch.equal(out[3:-1], clean[3:-1])
    assert out[2].isnan().all()
    assert not out[-1].isfinite().any()


@pytest.mark.parametrize(("tokens", "rows", "width"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_multiply_gives_the_bias(tokens, rows, width):
    out = run_any(torch.ones(tokens, width), torch.ones(rows, width), torch.ones(rows))
    assert torch.equal(out, torch.ones(tokens, rows))
