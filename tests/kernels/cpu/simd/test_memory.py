"""Loads and stores of every dtype, judged by PyTorch's own conversions, at the edge of readable memory."""

import math

import numba
import pytest
import torch
from support import guarded_copy

from quire.kernels.cpu.simd import memory
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import F32

DTYPES = {
    torch.float32: memory.F32,
    torch.float16: memory.F16,
    torch.bfloat16: memory.BF16,
    torch.int8: memory.INT8,
    torch.float8_e4m3fn: memory.E4M3,
    torch.float8_e5m2: memory.E5M2,
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def converted(source, dtype, head=None):
    """A flat tensor through one load and one store, a vector at a time; ``head`` elements of one vector only."""
    load, store, load_head, store_head = memory.load, memory.store, memory.load_head, memory.store_head
    code, to = DTYPES[source.dtype], DTYPES[dtype]
    target = guarded_copy(torch.zeros(len(source), dtype=dtype))

    @numba.njit
    def whole(a, b, n, from_bytes, to_bytes):
        for i in range(0, n, LANES):
            store(to, b + i * to_bytes, load(code, a + i * from_bytes))

    @numba.njit
    def part(a, b, n):
        store_head(to, b, load_head(code, a, n), n)

    a, b = source.data_ptr(), target.data_ptr()
    if head is None:
        whole(a, b, len(source), source.element_size(), target.element_size())
    else:
        part(a, b, head)
    return target


def bits_equal(got, wanted):
    nan = wanted.isnan()
    bytes_of = {4: torch.int32, 2: torch.int16}[wanted.element_size()]
    assert torch.equal(got.isnan(), nan)
    return torch.equal(got[~nan].view(bytes_of), wanted[~nan].view(bytes_of))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_is_read_as_pytorch_reads_it_and_written_back(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    assert bits_equal(converted(every, torch.float32), every.float())
    assert bits_equal(converted(every, dtype), every)


def test_bfloat16_is_taken_apart_into_even_and_odd_elements_bit_for_bit():
    load_even, load_odd, store = memory.load_even, memory.load_odd, memory.store
    every = guarded_copy(torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16))
    even, odd = torch.zeros(2**15), torch.zeros(2**15)

    @numba.njit
    def apart(source, even, odd, n):
        for i in range(0, n, LANES):
            store(F32, even + i * 4, load_even(source + i * 4))
            store(F32, odd + i * 4, load_odd(source + i * 4))

    apart(every.data_ptr(), even.data_ptr(), odd.data_ptr(), 2**15)
    assert torch.equal(even.view(torch.int32), every[::2].float().view(torch.int32))
    assert torch.equal(odd.view(torch.int32), every[1::2].float().view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_fp8_number_is_read_as_pytorch_reads_it(dtype):
    every = torch.arange(256).to(torch.uint8).view(dtype)
    every = every[~every.float().isnan()]  # write_kv makes none
    every = torch.cat([every, every[: -len(every) % LANES]])
    assert bits_equal(converted(every, torch.float32), every.float())


def test_every_int8_is_read_as_a_number():
    every = torch.arange(-128, 128).to(torch.int8)
    assert bits_equal(converted(every, torch.float32), every.float())


def rounding_cases(limit):
    """Numbers of every size up to a limit, and the ties between neighbours of 2, 3, 7 and 10 bits."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-45, math.log10(limit), 1 << 14).float()
    noise = size * torch.rand(len(size), generator=generator)
    ties = [
        (1 + (torch.arange(2 ** (bits + 1)) / 2 ** (bits + 1)))[:, None] * 2.0 ** torch.arange(-30, 9)
        for bits in (2, 3, 7, 10)
    ]
    positive = torch.cat([size, noise, *(t.flatten().float() for t in ties)])
    positive = positive[positive <= limit]
    both = torch.cat([positive, -positive, torch.zeros(1), -torch.zeros(1)])
    return torch.cat([both, both[: -len(both) % LANES]]).contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stores_round_to_nearest_even_and_overflow_to_infinity(dtype):
    cases = rounding_cases(3e38)
    special = torch.tensor([math.inf, -math.inf, math.nan, 65519.0, 65520.0, 3.4e38, -65520.0, 1e-45] * 2)
    cases = torch.cat([cases, special])
    assert bits_equal(converted(cases, dtype), cases.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)], ids=str
)
def test_fp8_stores_round_to_nearest_even_down_to_the_smallest_step(dtype, limit):
    cases = rounding_cases(limit)
    assert torch.equal(converted(cases, dtype).view(torch.uint8), cases.to(dtype).view(torch.uint8))


def test_int8_stores_round_to_nearest_even():
    cases = torch.arange(-508, 509)[: 1016 // LANES * LANES] / 4
    cases = cases.contiguous()
    assert torch.equal(converted(cases, torch.int8), cases.round().to(torch.int8))


@every_dtype
def test_a_head_reads_and_writes_its_elements_and_nothing_behind_them(dtype):
    for count in (1, 3, LANES // 2, LANES - 1):
        source = guarded_copy(torch.arange(1.0, count + 1).to(dtype))
        assert torch.equal(converted(source, dtype, head=count).float(), source.float())


@every_dtype
def test_lanes_behind_a_head_are_zero(dtype):
    load_head, store, code = memory.load_head, memory.store, DTYPES[dtype]
    source = torch.full((LANES,), 3.0).to(dtype)
    lanes = torch.full((LANES,), math.nan)

    @numba.njit
    def spill(a, b, n):
        store(F32, b, load_head(code, a, n))

    spill(source.data_ptr(), lanes.data_ptr(), 5)
    assert lanes.tolist() == [3.0] * 5 + [0.0] * (LANES - 5)


def test_single_elements_keep_their_sign_and_width():
    load_i32, load_i64, load_u8, load_f32 = memory.load_i32, memory.load_i64, memory.load_u8, memory.load_f32
    store_i64, store_f32 = memory.store_i64, memory.store_f32

    @numba.njit
    def read(i32, i64, u8, f32, o64, o32):
        store_i64(o64, load_i64(i64))
        store_f32(o32, load_f32(f32))
        return load_i32(i32), load_u8(u8)

    i32, u8 = torch.tensor([-7], dtype=torch.int32), torch.tensor([200], dtype=torch.uint8)
    i64, f32 = torch.tensor([-(2**62)]), torch.tensor([-0.1])
    o64, o32 = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    assert read(*(t.data_ptr() for t in (i32, i64, u8, f32, o64, o32))) == (-7, 200)
    assert torch.equal(o64, i64)
    assert torch.equal(o32, f32)


@pytest.mark.parametrize("step", [64, -(2**40), 0])
def test_steps_are_numbers_evenly_apart(step):
    store_steps, out = memory.store_steps, torch.full((LANES + 2,), 7)

    @numba.njit
    def all_lanes(address, first, step):
        store_steps(address, first, step)

    all_lanes(out.data_ptr() + 8, 2**45, step)
    assert torch.equal(out[1:-1], 2**45 + step * torch.arange(LANES))
    assert out[[0, -1]].tolist() == [7, 7]


def test_prefetching_a_wrong_address_does_no_harm():
    prefetch = memory.prefetch

    @numba.njit
    def ask(address):
        prefetch(address)
        return True

    assert ask(8)
