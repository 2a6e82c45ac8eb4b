"""The store kernel: every element in its slot, rounded as the reference rounds, and nothing beside it touched."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import LAYOUTS, empty_pages, guarded_copy

from quire.errors import ArgumentError
from quire.kernels import cpu, reference
from quire.spec import COMPUTE_DTYPES, LARGEST, QUANTIZED_DTYPES

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
E4M3, E5M2 = QUANTIZED_DTYPES["fp8_e4m3"], QUANTIZED_DTYPES["fp8_e5m2"]
PLAIN = [(F32, 16), (F16, 40), (BF16, 72), (BF16, 1)]
QUANTIZED = [(F32, torch.int8, 40), (BF16, torch.int8, 64), (F16, E4M3, 72), (F32, E5M2, 7), (F32, E4M3, 16)]


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.element_size()])


def write_kv(*tensors):
    cpu.bind_write(*tensors)(*tensors)


def case(dtype, pages_dtype, head_dim, tokens=9, heads=2, num_pages=5, page_size=3, layout="pool", seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-6, 4, tokens)[:, None, None]
    k, v = ((torch.randn(tokens, heads, head_dim, generator=generator) * size).to(dtype) for _ in range(2))
    sizes = (heads, num_pages, page_size, head_dim)
    layouts = ("hnd", "gaps") if layout == "apart" else (layout, layout)
    pages = [empty_pages(sizes, pages_dtype, name).fill_(3) for name in layouts]
    scales = [None, None]
    if pages_dtype not in COMPUTE_DTYPES:
        scales = [
            torch.full(sizes[:3], math.nan),
            torch.full((*sizes[1:3], heads), math.nan).permute(2, 0, 1),
        ]
    slots = torch.randperm(num_pages * page_size, generator=generator)[:tokens]
    return k, v, *pages, slots, *scales


def clone(pages):
    return None if pages is None else pages.clone(memory_format=torch.preserve_format)


def assert_like_the_reference(k, v, k_pages, v_pages, slots, k_scale, v_scale):
    wanted = [clone(t) for t in (k_pages, v_pages, k_scale, v_scale)]
    reference.write_kv(k, v, *wanted[:2], slots, *wanted[2:])
    write_kv(k, v, k_pages, v_pages, slots, k_scale, v_scale)
    for got, want in zip((k_pages, v_pages, k_scale, v_scale), wanted, strict=True):
        assert (got is None and want is None) or torch.equal(bits(got), bits(want))


@pytest.mark.parametrize(("dtype", "head_dim"), PLAIN, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_slot_holds_its_tokens_bits_and_every_other_slot_what_it_held(dtype, head_dim, layout):
    k, v, k_pages, v_pages, slots, *_ = case(dtype, dtype, head_dim, layout=layout)
    slots[2] = -1
    write_kv(k, v, k_pages, v_pages, slots, None, None)
    for rows, pages in ((k, k_pages), (v, v_pages)):
        flat = pages.flatten(1, 2)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(bits(flat[:, slot]), bits(rows[token]))
        untouched = torch.ones(flat.shape[1], dtype=torch.bool)
        untouched[slots[slots >= 0]] = False
        assert (flat[:, untouched] == 3).all()


@pytest.mark.parametrize(("dtype", "pages_dtype", "head_dim"), QUANTIZED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantised_values_and_scales_are_the_references_to_the_bit(dtype, pages_dtype, head_dim, layout):
    assert_like_the_reference(*case(dtype, pages_dtype, head_dim, layout=layout))


@pytest.mark.parametrize(("dtype", "pages_dtype", "head_dim"), QUANTIZED, ids=str)
def test_rows_of_zeros_have_scale_zero_and_hold_zeros(dtype, pages_dtype, head_dim):
    k, v, k_pages, v_pages, slots, k_scale, v_scale = case(dtype, pages_dtype, head_dim, tokens=1)
    write_kv(k * 0, v * 0, k_pages, v_pages, slots, k_scale, v_scale)
    page, slot = divmod(int(slots[0]), 3)
    for pages, scale in ((k_pages, k_scale), (v_pages, v_scale)):
        assert (pages[:, page, slot].float() == 0).all()
        assert (scale[:, page, slot] == 0).all()
        assert scale.isnan().sum() == scale.numel() - 2


@pytest.mark.parametrize(("dtype", "pages_dtype", "head_dim"), QUANTIZED, ids=str)
def test_rows_too_small_for_a_normal_scale_are_zeros_and_the_others_are_not(dtype, pages_dtype, head_dim):
    k, v, k_pages, v_pages, slots, k_scale, v_scale = case(dtype, pages_dtype, head_dim)
    if dtype != F16:  # whose smallest number is far above
        smallest = torch.finfo(F32).smallest_normal * {torch.int8: 127, E4M3: 448, E5M2: 57344}[pages_dtype]
        largest = smallest * torch.tensor([1e-9, 1e-3, 0.5, 0.99, 1.0, 1.01, 2.0, 100.0, 0.0])
        k, v = (
            (rows.float() / rows.float().abs().amax(-1, keepdim=True) * largest[:, None, None]).to(dtype)
            for rows in (k, v)
        )
        write_kv(k, v, k_pages, v_pages, slots, k_scale, v_scale)
        written = k_scale.flatten(1, 2)[:, slots]
        assert (written[:, [0, 1, 2, 8]] == 0).all()
        assert (written[:, [6, 7]] >= torch.finfo(F32).smallest_normal).all()
    assert_like_the_reference(k, v, k_pages, v_pages, slots, k_scale, v_scale)


@pytest.mark.parametrize(("dtype", "pages_dtype", "head_dim"), QUANTIZED, ids=str)
def test_a_row_with_a_nan_is_zeros_whose_scale_is_nan(dtype, pages_dtype, head_dim):
    k, v, *rest = case(dtype, pages_dtype, head_dim)
    k[3, 1, -1] = v[4, 0, 0] = math.nan
    assert_like_the_reference(k, v, *rest)
    assert rest[3].isnan().sum() > 0


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=str)
def test_infinities_negative_zeros_and_tiny_numbers_are_kept(dtype):
    head_dim = {F32: 16, F16: 40, BF16: 72}[dtype]
    special = [math.inf, -math.inf, -0.0, 0.0, torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max]
    row = torch.tensor((special * 12)[:head_dim]).to(dtype).expand(1, 1, head_dim)
    k_pages, v_pages = (torch.zeros(1, 1, 2, head_dim, dtype=dtype) for _ in range(2))
    write_kv(row, -row, k_pages, v_pages, torch.tensor([1]), None, None)
    assert torch.equal(bits(k_pages[0, 0, 1]), bits(row[0, 0]))
    assert torch.equal(bits(v_pages[0, 0, 1]), bits(-row[0, 0]))


@pytest.mark.parametrize(("dtype", "head_dim"), PLAIN, ids=str)
def test_rows_may_be_strided_as_cut_from_a_fused_projection(dtype, head_dim):
    k, v, k_pages, v_pages, slots, *_ = case(dtype, dtype, head_dim)
    fused = torch.cat([k, v], dim=1)
    assert_like_the_reference(fused[:, :2], fused[:, 2:], k_pages, v_pages, slots, None, None)
    every_other = torch.stack([slots, slots], dim=1).flatten()[::2]
    assert every_other.stride() == (2,)
    k_again, v_again = torch.full_like(k_pages, 3), torch.full_like(v_pages, 3)
    write_kv(k, v, k_again, v_again, every_other, None, None)
    assert torch.equal(k_again, k_pages)
    assert torch.equal(v_again, v_pages)


@pytest.mark.parametrize(("dtype", "head_dim"), [(F16, 40), (BF16, 72)], ids=str)
def test_no_byte_beyond_the_tensors_is_touched(dtype, head_dim):
    k, v, k_pages, v_pages, _, *_ = case(dtype, dtype, head_dim, tokens=15)
    last_slot_last = torch.arange(15)
    guarded = [guarded_copy(t) for t in (k, v, k_pages, v_pages)]
    write_kv(*guarded, last_slot_last, None, None)
    assert torch.equal(guarded[2].flatten(1, 2).transpose(0, 1), k)


def test_no_tokens_write_nothing():
    k, v, k_pages, v_pages, slots, *_ = case(F32, F32, 16)
    write_kv(k[:0], v[:0], k_pages, v_pages, slots[:0], None, None)
    assert (k_pages == 3).all()


@given(data=st.data())
def test_any_write_is_the_references_to_the_bit(data):
    draw = data.draw
    dtype, pages_dtype, head_dim = draw(st.sampled_from([(d, d, n) for d, n in PLAIN] + QUANTIZED))
    page_size, num_pages = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    k, v, k_pages, v_pages, slots, *scales = case(
        dtype,
        pages_dtype,
        head_dim,
        tokens=draw(st.integers(0, page_size * num_pages)),
        heads=draw(st.integers(1, 3)),
        num_pages=num_pages,
        page_size=page_size,
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 100)),
    )
    hidden = torch.rand(len(slots)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    assert_like_the_reference(k, v, k_pages, v_pages, slots.masked_fill(hidden, -1), *scales)


# --- slots outside the pool ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-2, -5, 15, 600, 10**6, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("place", [0, 8])
def test_a_slot_outside_the_pool_is_refused_and_nothing_is_written(wrong, place):
    k, v, k_pages, v_pages, slots, *_ = case(F32, F32, 16)  # 15 slots
    slots[4], slots[place] = -1, wrong
    with pytest.raises(
        ArgumentError, match=r"slot_mapping must lie between −1 and 14; got values from .*\d"
    ) as error:
        write_kv(k, v, k_pages, v_pages, slots, None, None)
    assert str(wrong) in str(error.value)
    assert (k_pages == 3).all()
    assert (v_pages == 3).all()


def test_slots_of_one_layout_are_looked_at_in_every_call_and_through_their_stride():
    k, v, k_pages, v_pages, slots, *_ = case(F32, F32, 16)
    pairs = torch.full((9, 2), 10**6)  # what lies between is nobody's slot
    pairs[:, 0] = slots
    write = cpu.bind_write(k, v, k_pages, v_pages, pairs[:, 0], None, None)
    write(k, v, k_pages, v_pages, pairs[:, 0], None, None)
    assert torch.equal(k_pages.flatten(1, 2)[:, slots].transpose(0, 1), k)
    pairs[8, 0] = 15
    with pytest.raises(ArgumentError, match="slot_mapping"):
        write(k, v, k_pages, v_pages, pairs[:, 0], None, None)
    same = torch.tensor(5).expand(9)
    with pytest.raises(ArgumentError, match="slot_mapping"):
        write_kv(k, v, k_pages, v_pages, torch.tensor(15).expand(9), None, None)
    write_kv(k[:1].expand(9, 2, 16), v, k_pages, v_pages, same, None, None)
    assert torch.equal(k_pages.flatten(1, 2)[:, 5], k[0])


# --- given scales ----------------------------------------------------------------------------------------


def given_scales(values, sizes):
    """The forms in which scales come: one number, one a head, one a token; K's and V's strides differ."""
    heads = sizes[0]
    per_head = torch.tensor(values)[:heads]
    yield per_head[:1].view(1, 1, 1).expand(sizes), per_head.view(heads, 1, 1).expand(sizes)
    every = per_head.view(heads, 1, 1).expand(sizes).contiguous()
    yield every, per_head.view(heads, 1, 1).expand(sizes)


def quantized_by(rows, scale, dtype):
    """The formula, in torch."""
    largest = LARGEST[dtype]
    scaled = (rows.float() / scale).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype)


@pytest.mark.parametrize(("dtype", "pages_dtype", "head_dim"), QUANTIZED, ids=str)
def test_given_scales_divide_and_what_is_too_large_is_the_largest_number(dtype, pages_dtype, head_dim):
    sizes = 2, 5, 3
    k, v, k_pages, v_pages, slots, *_ = case(dtype, pages_dtype, head_dim)
    k[0, 0, 0] = math.inf
    v[1, 0, 0] = -math.inf
    slots[7] = -1
    tokens = [token for token in range(9) if token != 7]
    for k_scale, v_scale in given_scales([0.37, 1e-3], sizes):
        before = k_scale.clone(), v_scale.clone()
        tensors = k, v, k_pages, v_pages, slots, k_scale, v_scale
        cpu.bind_write(*tensors, given=True)(*tensors)
        for rows, pages, scale in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
            wanted = quantized_by(rows[tokens], scale[:, 0, 0, None], pages_dtype)
            written = pages.flatten(1, 2)[:, slots[tokens]].transpose(0, 1)
            assert torch.equal(bits(written), bits(wanted))
            assert written.float().abs().max() == LARGEST[pages_dtype]
        assert torch.equal(k_scale, before[0])
        assert torch.equal(v_scale, before[1])


@pytest.mark.parametrize(("dtype", "pages_dtype", "head_dim"), QUANTIZED, ids=str)
def test_a_given_scale_of_zero_or_nan_stores_zeros_and_a_nan_is_stored_as_one_where_there_is_one(
    dtype, pages_dtype, head_dim
):
    sizes = 2, 5, 3
    k, v, k_pages, v_pages, slots, *_ = case(dtype, pages_dtype, head_dim)
    k[:, :, -1] = v[:, :, 0] = math.nan
    one, none = torch.ones(()).expand(sizes), torch.tensor([0.0, math.nan]).view(2, 1, 1).expand(sizes)
    tensors = k, v, k_pages, v_pages, slots, one, none
    cpu.bind_write(*tensors, given=True)(*tensors)
    assert (v_pages.flatten(1, 2)[:, slots].float() == 0).all()
    strange = k_pages.flatten(1, 2)[:, slots, -1].float()
    assert (strange == 0).all() if pages_dtype == torch.int8 else strange.isnan().all()
    if head_dim > 1:
        assert k_pages.flatten(1, 2)[:, slots, :-1].float().isfinite().all()
