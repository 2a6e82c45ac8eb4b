"""The words for products of bytes, judged by PyTorch's integers."""

import numba
import pytest
import torch
from lanes import applied, applied_to_four

from quire.kernels.cpu.simd import integers
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import F32, load, store
from quire.kernels.cpu.simd.vectors import tile

pytestmark = pytest.mark.skipif(LANES != 16, reason="these words are for vectors of 512 bits")
where_it_is_used = pytest.mark.skipif(
    not integers.has_byte_products(), reason="this CPU multiplies no bytes, or none that pay"
)
LINE = 4 * LANES


def some_bytes(count, dtype):
    generator = torch.Generator().manual_seed(count)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    values = torch.randint(low, high + 1, (count,), generator=generator).to(dtype)
    values[:4], values[4:8] = low, high
    return values


def as_lanes(values):
    """Integers of any size as the 32 bits of lanes, none of which is ever computed with as a float."""
    return values.view(torch.float32)


def whole(count):
    return torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(1)).to(
        torch.int32
    )


@where_it_is_used
def test_a_product_adds_four_products_of_bytes_exactly():
    u, s, c = some_bytes(4096, torch.uint8), some_bytes(4096, torch.int8), whole(1024)
    got = applied(integers.multiply_bytes, as_lanes(u), as_lanes(s), as_lanes(c)).view(torch.int32)
    wanted = c.long() + (u.long() * s.long()).view(-1, 4).sum(1)
    assert torch.equal(got, wanted.to(torch.int32))  # modulo 2^32


def test_flipped_signs_are_128_more():
    s = some_bytes(4096, torch.int8)
    got = applied(integers.flip_signs, as_lanes(s)).view(torch.uint8)
    assert torch.equal(got.long(), s.long() + 128)


def test_integers_are_shifted_added_subtracted_and_made_floats():
    a, b = whole(1024), whole(2048)[1024:]
    assert torch.equal(applied(integers.shift_up, as_lanes(a)).view(torch.int32), a << 8)
    assert torch.equal(applied(integers.add_integers, as_lanes(a), as_lanes(b)).view(torch.int32), a + b)
    assert torch.equal(applied(integers.subtract_integers, as_lanes(a), as_lanes(b)).view(torch.int32), a - b)
    assert torch.equal(applied(integers.to_floats, as_lanes(a)), a.float())


def test_the_power_below_is_the_largest_that_is_no_larger():
    values = torch.tensor(
        [1.0, 1.5, 1.9999999, 2.0, 3.0, 1e-30, 1e30, 0.75, 0.0, 255.0, 2.0**-126, 6e4, 5, 7, 9, 17]
    )
    got = applied(integers.power_below, values)
    wanted = torch.where(values > 0, 2.0 ** torch.frexp(values.double()).exponent.sub(1).double(), 0.0)
    assert torch.equal(got.double(), wanted)


def test_rows_of_integers_are_summed_lane_by_lane():
    rows = whole(LANES * LANES)
    sum_integer_rows, out = integers.sum_integer_rows, torch.zeros(LANES)

    @numba.njit
    def sums(a, b):
        square = tile(LANES)
        for i in range(LANES):
            square[i] = load(F32, a + i * LANES * 4)
        store(F32, b, sum_integer_rows(square))

    sums(rows.data_ptr(), out.data_ptr())
    assert torch.equal(out.view(torch.int32), rows.view(LANES, LANES).sum(1, dtype=torch.int32))


def test_the_two_lowest_bytes_of_lanes_are_stored_apart():
    store_high, store_low = integers.store_high, integers.store_low
    values, out = whole(LANES), torch.full((40,), 7, dtype=torch.int8)

    @numba.njit
    def both(a, b):
        store_high(b, load(F32, a))
        store_low(b + 20, load(F32, a))

    both(values.data_ptr(), out.data_ptr())
    assert torch.equal(out[:16], (values >> 8).to(torch.int8))
    assert torch.equal(out[20:36], values.to(torch.int8))
    assert (out[16:20] == 7).all()
    assert (out[36:] == 7).all()


def test_four_rows_are_interleaved_and_put_in_order_again():
    """Lane l of vector j holds column 16 · (l // 4) + 4 · j + l % 4 of all four rows; quarters undo it."""
    rows = torch.arange(4 * LINE, dtype=torch.uint8).view(4, LINE)
    a, b, c, d = map(as_lanes, rows)
    mixed = []
    for first in (integers.zip_rows_low, integers.zip_rows_high):
        ab, cd = applied(first, a, b), applied(first, c, d)
        mixed += [applied(second, ab, cd) for second in (integers.zip_words_low, integers.zip_words_high)]
    columns = torch.stack([vector.view(torch.uint8).view(LANES, 4) for vector in mixed])
    lane = torch.arange(LANES)
    for j in range(4):
        assert torch.equal(columns[j], rows.T[16 * (lane // 4) + 4 * j + lane % 4])

    ordered = applied_to_four(integers.gather_quarters, columns[:, :, 0].float().contiguous())
    assert torch.equal(ordered.flatten(), rows[0].float())


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_weights_lie_four_tokens_to_a_head_high_bytes_first(heads):
    store_weights = integers.store_weights
    values = torch.randint(
        0, 2**16, (LANES,), generator=torch.Generator().manual_seed(heads), dtype=torch.int32
    )
    out = torch.full((40,), 7, dtype=torch.uint8)

    @numba.njit
    def stored(a, b):
        store_weights(b, load(F32, a), heads)

    stored(values.data_ptr(), out.data_ptr())
    by_token = values.view(-1, 4, heads).transpose(1, 2).flatten()  # groups of four tokens, heads, tokens
    assert torch.equal(out[:16], (by_token >> 8).to(torch.uint8))
    assert torch.equal(out[16:32], (by_token & 255).to(torch.uint8))
    assert (out[32:] == 7).all()
