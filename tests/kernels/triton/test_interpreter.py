"""The interpreter notices each kind of mistake it is there for, and takes nothing else for one."""

import pytest
import torch
import triton
import triton.language as tl
from arithmetic import KernelFault

pytestmark = pytest.mark.interpreted

N = tl.constexpr(64)


# --- mistakes: each kernel makes one -----------------------------------------------------------------------


@triton.jit
def copies_one_too_many(x, out):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at + 1))


@triton.jit
def copies_from_one_before(x, out):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at - 1))


@triton.jit
def stores_one_too_far(x, out):
    at = tl.arange(0, N)
    tl.store(out + at + 1, tl.load(x + at))


@triton.jit
def wanders_into_the_neighbour(x, out):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + N + at))  # x and out are halves of one allocation


@triton.jit
def reads_between_strided_rows(x, out):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at + 0 * tl.program_id(0)))


@triton.jit
def every_program_stores_everywhere(x, out):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def reads_what_the_program_before_wrote(x, out):
    at = tl.program_id(0) * 32 + tl.arange(0, 32)
    if tl.program_id(0) == 1:
        tl.load(out + at - 32)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def overwrites_what_the_program_before_read(x, out):
    at = tl.program_id(0) * 32 + tl.arange(0, 32)
    if tl.program_id(0) == 0:
        tl.load(out + 63 - at)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def reads_its_own_store_without_a_barrier(x, out):
    if tl.program_id(0) == 0:
        at = tl.arange(0, N)
        tl.store(out + at, tl.load(x + at))
        tl.load(out + N - 1 - at)


@triton.jit
def stores_two_values_in_one_place(x, out):
    if tl.program_id(0) == 0:
        at = tl.arange(0, N)
        tl.store(out + at // 2, tl.load(x + at))


@triton.jit
def overflows_an_offset(x, out):
    page = tl.program_id(0) + 70_000
    tl.store(out + tl.program_id(0), tl.load(x + (page * 40_000 - page * 40_000)))


@triton.jit
def narrows_a_large_offset(x, out):
    offset = (tl.program_id(0).to(tl.int64) + 1) << 33
    tl.store(out + tl.program_id(0), tl.load(x + (offset.to(tl.int32))))


@triton.jit
def asserts_what_is_not_so(x, out):
    tl.device_assert(tl.num_programs(0) == 3, "three programs")


@triton.jit
def promises_a_wrong_multiple(x, out):
    at = tl.multiple_of(tl.program_id(0) * 8, 16)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def promises_a_wrong_run(x, out):
    at = tl.max_contiguous(tl.arange(0, N) // 2 * 2, 4)
    tl.load(x + at)


@triton.jit
def sums_in_bf16(x, out):
    tl.sum(tl.load(x + tl.arange(0, N)).to(tl.bfloat16), 0)


@triton.jit
def makes_an_address_up(x, out):
    tl.load((tl.program_id(0).to(tl.int64) + 4096).to(tl.pointer_type(tl.float32)))


@triton.jit
def reads_words_from_any_byte(x, out):
    words = (x.to(tl.pointer_type(tl.int8)) + 2).to(tl.pointer_type(tl.int32))
    tl.load(words + tl.arange(0, 4))


MISTAKES = [
    (reads_words_from_any_byte, "misaligned load of x .* 4 bytes"),
    (copies_one_too_many, "load out of bounds of x"),
    (copies_from_one_before, "load out of bounds of x"),
    (stores_one_too_far, "store out of bounds of out"),
    (wanders_into_the_neighbour, "load out of bounds of x"),
    (every_program_stores_everywhere, "race on out: store"),
    (reads_what_the_program_before_wrote, "race on out: load"),
    (overwrites_what_the_program_before_read, "race on out: store .* has read"),
    (reads_its_own_store_without_a_barrier, "race on out: load .* its own threads"),
    (stores_two_values_in_one_place, "different values in one place"),
    (overflows_an_offset, "int32 overflow in multiply"),
    (narrows_a_large_offset, "does not fit the int32"),
    (promises_a_wrong_multiple, "multiple_of.* is not true"),
    (promises_a_wrong_run, "max_contiguous.* is not true"),
    (sums_in_bf16, "reduction of bf16"),
    (makes_an_address_up, "of nothing"),
]


@pytest.mark.parametrize(("kernel", "message"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_mistake_is_named(kernel, message):
    both = torch.randn(2, int(N))
    with pytest.raises(KernelFault, match=message):
        kernel[(2,)](both[0], both[1])


def test_a_failed_assertion_is_raised():
    with pytest.raises(AssertionError, match="three programs"):
        asserts_what_is_not_so[(2,)](torch.zeros(1), torch.zeros(1))


def test_memory_between_the_rows_of_a_view_is_not_the_views():
    x, out = torch.randn(int(N) // 8, 9)[:, :8], torch.empty(int(N))
    with pytest.raises(KernelFault, match="load between the elements of x"):
        reads_between_strided_rows[(1,)](x, out)


# --- and no others -----------------------------------------------------------------------------------------


@triton.jit
def reads_its_own_store_after_a_barrier(x, out):
    at = tl.program_id(0) * 32 + tl.arange(0, 32)
    tl.store(out + at, tl.load(x + at))
    tl.debug_barrier()
    value = tl.load(out + tl.program_id(0) * 32 + 31 - tl.arange(0, 32))
    tl.debug_barrier()
    tl.store(out + at, value)


def test_a_barrier_settles_what_a_program_wrote():
    x, out = torch.randn(64), torch.empty(64)
    reads_its_own_store_after_a_barrier[(2,)](x, out)
    assert torch.equal(out, x.view(2, 32).flip(1).flatten())


@triton.jit
def counts(counter, seen):
    tl.store(seen + tl.program_id(0), tl.atomic_add(counter, 1))


def test_programs_may_share_a_counter():
    counter, seen = torch.zeros(1, dtype=torch.int32), torch.full((5,), -1, dtype=torch.int32)
    counts[(5,)](counter, seen)
    assert counter.item() == 5
    assert sorted(seen.tolist()) == [0, 1, 2, 3, 4]


@triton.jit
def sum_of_all_by_the_last(x, parts, counter, out, SETTLED: tl.constexpr, ORDER: tl.constexpr):
    """Each program leaves its number; the last to arrive adds all up."""
    program = tl.program_id(0)
    tl.store(parts + program, tl.load(x + program))
    if SETTLED:
        tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem=ORDER) == tl.num_programs(0) - 1:
        tl.store(counter, 0)
        tl.store(out, tl.sum(tl.load(parts + tl.arange(0, 4)), 0))


def sum_by_the_last(settled, order):
    x, parts, out = torch.arange(4.0), torch.empty(4), torch.zeros(1)
    counter = torch.zeros(1, dtype=torch.int32)
    sum_of_all_by_the_last[(4,)](x, parts, counter, out, SETTLED=settled, ORDER=order)
    return out.item(), counter.item()


def test_the_last_to_arrive_may_read_what_the_others_released():
    assert sum_by_the_last(True, "acq_rel") == (6.0, 0)


def test_threads_that_no_barrier_has_joined_release_nothing():
    with pytest.raises(KernelFault, match="race on parts: load"):
        sum_by_the_last(False, "acq_rel")


@pytest.mark.parametrize("order", ["relaxed", "acquire", "release"])
def test_half_an_atomic_orders_nothing(order):
    with pytest.raises(KernelFault, match="race on"):
        sum_by_the_last(True, order)


@triton.jit
def masked_lanes_may_point_anywhere(x, out, size):
    at = tl.arange(0, N)
    page = tl.load(x + at, mask=at < size, other=2**30).to(tl.int64)
    tl.store(out + page * 4096, 1.0, mask=(at < size) & (page == 0))


def test_an_address_that_no_lane_uses_is_no_mistake():
    x, out = torch.zeros(3, dtype=torch.int32), torch.zeros(1)
    masked_lanes_may_point_anywhere[(1,)](x, out, 3)
    assert out.item() == 1.0


@triton.jit
def promises_what_is_so(x, out):
    at = tl.max_contiguous(tl.multiple_of(tl.program_id(0) * 32 + tl.arange(0, 32), 32), 32)
    tl.store(out + at, tl.load(x + at))


def test_a_true_promise_is_believed():
    x, out = torch.randn(64), torch.empty(64)
    promises_what_is_so[(2,)](x, out)
    assert torch.equal(out, x)
