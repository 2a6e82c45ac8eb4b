"""The interpreter computes what a GPU would: roundings, products, and lanes without a value."""

import math

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.interpreted

BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {BF16: math.inf, E4M3: 448.0, E5M2: 57344.0}


@triton.jit
def convert(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2], ids=str)
def test_a_narrow_float_is_the_nearest_one_and_fp8_ends_at_its_largest(dtype):
    generator = torch.Generator().manual_seed(0)
    scattered = torch.randn(1008, generator=generator) * 2.0 ** torch.randint(
        -20, 20, (1008,), generator=generator
    )
    edges = torch.tensor([0.0, -0.0, 1.0, 1.06, 448.0, 464.0, 465.0, 1e6, -1e9, 2**-9, 2**-10, 2**-17, 1e-30])
    x = torch.cat([scattered, edges, torch.tensor([math.inf, -math.inf, math.nan])])
    out = torch.empty(1024, dtype=dtype)
    convert[(1,)](x, out, SIZE=1024)
    wanted = x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
    torch.testing.assert_close(out.float(), wanted.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.float16, BF16], ids=str)
def test_every_fp8_is_widened_exactly(dtype, target):
    x = torch.arange(256, dtype=torch.uint8).view(dtype)
    out = torch.empty(256, dtype=target)
    convert[(1,)](x, out, SIZE=256)
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0, equal_nan=True)


@triton.jit
def arithmetic(x, y, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + SIZE + at, a * b)
    tl.store(out + 2 * SIZE + at, tl.maximum(a, -b))
    tl.store(out + 3 * SIZE + at, tl.where(a < b, a, b))


@triton.jit
def fused(x, y, z, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


def test_fma_rounds_once():
    """What is left of a product once its rounded self is taken away is its rounding error, not 0."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(128, generator=generator) for _ in range(2))
    out = torch.empty(128)
    fused[(1,)](x, y, -(x * y), out, SIZE=128)
    error = x.double() * y.double() - (x * y).double()
    assert torch.equal(out.double(), error)
    assert error.count_nonzero() > 100


def test_bf16_arithmetic_rounds_each_result_once():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(128, generator=generator).to(BF16) for _ in range(2))
    out = torch.empty(4, 128, dtype=BF16)
    arithmetic[(1,)](x, y, out, SIZE=128)
    wanted = torch.stack([x + y, x * y, torch.maximum(x, -y), torch.minimum(x, y)])
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)


@triton.jit
def matmul(x, y, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = row * SIZE + column
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at), input_precision=PRECISION))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, E5M2], ids=str)
def test_a_dot_multiplies_values_and_sums_in_fp32(dtype):
    x, y = (torch.randn(32, 32).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    matmul[(1,)](x, y, out, SIZE=32, PRECISION="ieee")
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("ieee", 0, 1e-5), ("tf32x3", 0, 3e-5), ("tf32", 1e-3, 0.1)]
)
def test_an_fp32_dot_is_as_exact_as_it_is_asked_to_be(precision, least, most):
    x, y = (torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    out = torch.empty(32, 32)
    matmul[(1,)](x, y, out, SIZE=32, PRECISION=precision)
    assert least <= (out - x.double() @ y.double()).abs().max() <= most


def test_an_int8_dot_is_exact():
    x, y = (torch.randint(-128, 128, (32, 32), dtype=torch.int8) for _ in range(2))
    out = torch.empty(32, 32, dtype=torch.int32)
    matmul[(1,)](x, y, out, SIZE=32, PRECISION="ieee")
    assert torch.equal(out, (x.double() @ y.double()).int())


@triton.jit
def product(
    x, y, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr
):
    row, column, k = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :], tl.arange(0, SIZE)
    lhs, rhs = tl.load(x + row * SIZE + k[None, :]), tl.load(y + k[:, None] + column * SIZE)
    tl.store(out + row * COLUMNS + column, tl.dot(lhs, rhs, input_precision=PRECISION))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.int8], ids=str)
@pytest.mark.parametrize("size", [32, 64, 256])
def test_a_dot_is_summed_in_order_however_many_rows_and_columns_there_are(dtype, size):
    """On any processor, so that a test of the kernels' bits is one of the kernels."""
    generator = torch.Generator().manual_seed(0)
    x, y = ((torch.randn(128, size, generator=generator) * 30).to(dtype) for _ in range(2))
    wanted = torch.zeros(128, 128, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    for k in range(size):
        wanted += x[:, k, None].to(wanted.dtype) * y[None, :, k].to(wanted.dtype)
    for rows in (1, 2, 16, 64, 128):
        for columns in (1, 16, 32, 128):
            out = torch.empty(rows, columns, dtype=wanted.dtype)
            product[(1,)](x, y, out, ROWS=rows, COLUMNS=columns, SIZE=size, PRECISION="ieee")
            assert torch.equal(out, wanted[:rows, :columns])


@triton.jit
def loop(bounds, out):
    total = 0
    for i in tl.range(tl.load(bounds), tl.load(bounds + 1), num_stages=3):
        total += i
    tl.store(out, total)


def test_a_loop_runs_between_bounds_read_from_memory():
    out = torch.zeros(1, dtype=torch.int32)
    loop[(1,)](torch.tensor([3, 7], dtype=torch.int32), out)
    assert out.item() == 3 + 4 + 5 + 6


@triton.jit
def undefined_lanes(x, out, size, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16, E4M3, E5M2], ids=str)
def test_a_masked_lane_without_a_value_shows(dtype):
    out = torch.zeros(16, dtype=dtype)
    undefined_lanes[(1,)](torch.ones(16, dtype=dtype), out, 10, SIZE=16)
    assert (out[:10].float() == 1).all()
    assert out[10:].float().isnan().all()


@triton.jit
def maximum_of_all(x, out, SIZE: tl.constexpr):
    tl.store(out, tl.max(tl.load(x + tl.arange(0, SIZE)), 0))
    tl.store(out + 1, tl.maximum(tl.load(x), tl.load(x + 1)))


def test_a_maximum_passes_nan_over_as_a_gpu_does():
    out = torch.zeros(2)
    maximum_of_all[(1,)](torch.tensor([math.nan, 2.0, 1.0, 0.5]), out, SIZE=4)
    assert out.tolist() == [2.0, 2.0]
