"""Merging softmax states: exact over a union of keys, and without a trace of states that saw nothing."""

import math

import pytest
import torch
from accuracy import assert_accurate, exact, plain
from hypothesis import given
from hypothesis import strategies as st
from support import Shape, attend, make_batch

import quire
from quire import SoftmaxState, merge

SHAPE = Shape(torch.float32, 16, 3)


def state(tokens=4, heads=3, head_dim=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(tokens, heads, head_dim, generator=generator).to(dtype)
    return SoftmaxState(out, torch.randn(tokens, heads, generator=generator) * 5)


def empty(like):
    return SoftmaxState(torch.zeros_like(like.out), torch.full_like(like.lse, -math.inf))


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(a, b):
    return torch.equal(bits(a.out), bits(b.out)) and torch.equal(bits(a.lse), bits(b.lse))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("pages_in_front", [1, 3, 6])
@pytest.mark.xdist_group("decode-float32-same-d16-g3")
def test_two_halves_of_the_pages_merge_to_the_whole(backend, pages_in_front):
    batch = make_batch(SHAPE, [100, 112, 97], [1, 1, 1], page_size=16)
    split = pages_in_front * 16
    front = attend(_with(batch, batch.page_table, [split] * 3), backend=backend, causal=False)
    rest = (batch.seq_lens - split).tolist()
    back = attend(_with(batch, batch.page_table[:, pages_in_front:], rest), backend=backend, causal=False)
    merged = merge(front, back)
    assert_accurate(merged, exact(batch), plain(batch), batch.largest_value)


def _with(batch, page_table, seq_lens):
    """The same queries and pages under another table."""
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return type(batch)(batch.shape, 16, *batch.pages, page_table, lens, batch.cu_seqlens_q, batch.scales)


@pytest.mark.xdist_group("decode-float32-same-d16-g3")
def test_a_prefix_shared_by_many_queries_is_attended_once_and_merged():
    # Cascade attention: the common prefix as one prompt-like call, each sequence's own tail as decode.
    batch = make_batch(SHAPE, [80, 80], [1, 1], page_size=16)
    batch.page_table[1, :3] = batch.page_table[0, :3]
    prefix = _with(batch, batch.page_table[:1], [48])
    prefix.cu_seqlens_q = torch.tensor([0, 2], dtype=torch.int32)
    tails = _with(batch, batch.page_table[:, 3:], [32, 32])
    merged = merge(attend(prefix, causal=False), attend(tails, causal=False))
    torch.testing.assert_close(merged.out.double(), exact(batch).out, atol=1e-6, rtol=0)


def test_the_formula_on_numbers_anyone_can_check():
    a = SoftmaxState(torch.tensor([[[10.0]]]), torch.tensor([[math.log(1.0)]]))
    b = SoftmaxState(torch.tensor([[[20.0]]]), torch.tensor([[math.log(3.0)]]))
    merged = merge(a, b)
    assert merged.out.item() == pytest.approx(17.5)
    assert merged.lse.item() == pytest.approx(math.log(4.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merging_with_nothing_changes_no_bit_not_even_a_negative_zero(dtype):
    some = state(dtype=dtype)
    some.out[0, 0] = -0.0
    some.out[1, 1, 2] = torch.finfo(dtype).smallest_normal / 2
    some.lse[1, 0] = -0.0
    assert same_bits(merge(some, empty(some)), some)
    assert same_bits(merge(empty(some), some), some)
    assert same_bits(merge(empty(some), empty(some)), empty(some))


def test_rows_are_empty_one_by_one():
    a, b = state(seed=1), state(seed=2)
    a.lse[0, 0] = b.lse[1, 1] = a.lse[2, 2] = b.lse[2, 2] = -math.inf
    a.out[0, 0] = b.out[1, 1] = a.out[2, 2] = b.out[2, 2] = 0.0
    merged = merge(a, b)
    assert torch.equal(merged.out[0, 0], b.out[0, 0])
    assert torch.equal(merged.out[1, 1], a.out[1, 1])
    assert (merged.out[2, 2] == 0).all()
    assert merged.lse[2, 2] == -math.inf
    assert merged.out.isfinite().all()
    assert not torch.equal(merged.out[3], a.out[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_of_a_sink_alone_takes_its_share_and_gives_no_value(dtype):
    some, alone = state(dtype=dtype), state(dtype=dtype, seed=1)
    alone.out.zero_()
    merged = merge(some, alone)
    lse = torch.logaddexp(some.lse, alone.lse)
    assert torch.equal(merged.lse, lse)
    assert torch.equal(merged.out, (some.out.float() * torch.exp(some.lse - lse)[..., None]).to(dtype))
    assert same_bits(merge(alone, some), merged)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.xdist_group("decode-float32-same-d16-g3")
def test_the_sink_of_a_part_without_keys_is_not_lost(backend):
    batch = make_batch(SHAPE, [33], page_size=16)
    sinks = torch.randn(SHAPE.group * SHAPE.num_kv_heads)
    nothing = attend(_with(batch, batch.page_table, [0]), backend=backend, sinks=sinks)
    assert torch.equal(nothing.lse[0], sinks)
    merged = merge(nothing, attend(batch, backend=backend))
    whole = exact(batch, sinks=sinks)
    torch.testing.assert_close(merged.out.double(), whole.out, atol=1e-6, rtol=0)
    torch.testing.assert_close(merged.lse, whole.lse, atol=2e-6, rtol=2e-6)


@given(seeds=st.tuples(*[st.integers(0, 1000)] * 3), scale=st.sampled_from([1.0, 30.0, 1000.0]))
def test_order_and_grouping_do_not_matter(seeds, scale):
    a, b, c = (SoftmaxState(s.out, s.lse * scale) for s in (state(seed=seed) for seed in seeds))
    for other in (merge(b, a), merge(a, b)):
        torch.testing.assert_close(other.out, merge(a, b).out, atol=1e-6, rtol=1e-6)
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    # A difference of lse keeps an error of lse's own last place, which grows with its size.
    tolerance = 2e-6 + 4 * torch.finfo(torch.float32).eps * float(left.lse.abs().max())
    torch.testing.assert_close(left.out, right.out, atol=4 * tolerance, rtol=1e-6)
    torch.testing.assert_close(left.lse, right.lse, atol=tolerance, rtol=1e-6)


def test_states_far_apart_do_not_overflow():
    a, b = state(seed=1), state(seed=2)
    far = merge(SoftmaxState(a.out, a.lse + 5000.0), SoftmaxState(b.out, b.lse - 5000.0))
    assert torch.equal(far.out, a.out)
    assert torch.equal(far.lse, a.lse + 5000.0)


def test_a_merged_state_keeps_the_first_ones_dtypes():
    a, b = state(dtype=torch.bfloat16), state(seed=1)
    assert merge(a, b).out.dtype == torch.bfloat16
    assert merge(a, b).lse.dtype == torch.float32


@pytest.mark.parametrize("other", [state(tokens=3), state(heads=2), state(head_dim=4)])
def test_states_of_other_queries_are_refused(other):
    with pytest.raises(quire.ShapeError, match=r"state_a and state_b must both be .*; got .*\. Fix: "):
        merge(state(), other)


def test_a_pair_is_a_state_if_it_holds_tensors():
    a, b = state(), state()
    with pytest.raises(
        quire.ArgumentError, match=r"^state_a must be two tensors, out and lse; got int, int\. Fix: "
    ):
        merge((1, 2), (3, 4))
    with pytest.raises(quire.ArgumentError, match=r"^state_b must be .*; got Tensor, NoneType\. Fix: "):
        merge(a, (b.out, None))
    for got, wanted in zip(merge(tuple(a), tuple(b)), merge(a, b), strict=True):
        assert torch.equal(got, wanted)


def test_states_whose_own_parts_do_not_fit_are_refused():
    crooked = quire.SoftmaxState(torch.zeros(2, 3, 4), torch.zeros(5))
    with pytest.raises(quire.ShapeError, match="state_a and state_b"):
        quire.merge(crooked, crooked)
