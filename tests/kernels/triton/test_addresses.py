"""What code compiled for some tensors takes for granted of where they lie."""

import pytest
import torch
from support import Shape, attend, make_batch

from quire.kernels.triton.addresses import addresses_of
from quire.kernels.triton.attend import _recipe


def at_byte(offset, like):
    """A copy of a tensor of one-byte elements that starts so many bytes past a multiple of 16."""
    room = torch.empty(like.numel() + 32, dtype=torch.int8)
    start = -room.data_ptr() % 16 + offset
    return room[start : start + like.numel()].view(like.dtype).view(like.shape).copy_(like)


def granted(*tensors):
    return addresses_of(tensors)[1]


def test_aligned_tensors_are_all_alike():
    assert granted(torch.empty(3), None, torch.empty(8)[4:]) is True


def test_each_alignment_below_is_told_apart():
    bytes_ = torch.empty(64, dtype=torch.int8)
    assert [granted(at_byte(offset, bytes_), None) for offset in (1, 2, 4, 8, 12)] == [
        (alignment, None) for alignment in (1, 2, 4, 8, 4)
    ]


def test_a_tensor_without_elements_is_taken_as_aligned_as_the_compiler_takes_it():
    word = at_byte(4, torch.empty(16, dtype=torch.int8))
    assert granted(torch.empty(0), word) == (16, 4)


@pytest.mark.interpreted
@pytest.mark.parametrize("order", [(4, 1), (1, 4), (0, 2), (2, 0)], ids=str)
@pytest.mark.parametrize("q_lens", [[1, 1], [20, 3]], ids=["decode", "prefill"])
def test_pages_at_any_byte_are_read_as_they_lie(q_lens, order):
    """In words of four bytes where all of them are, whichever came first."""
    batch = make_batch(Shape(torch.float16, 32, 2, "int8"), [70, 9], q_lens, page_size=16)
    wanted = attend(batch, backend="triton")
    pages = batch.k_pages, batch.v_pages
    _recipe.cache_clear()
    for offset in order:
        batch.k_pages, batch.v_pages = (at_byte(offset, values) for values in pages)
        state = attend(batch, backend="triton")
        assert torch.equal(state.out, wanted.out)
        assert torch.equal(state.lse, wanted.lse)


@pytest.mark.interpreted
def test_values_alone_off_the_words_are_noticed_too():
    batch = make_batch(Shape(torch.float16, 32, 2, "int8"), [70, 9], page_size=16)
    wanted = attend(batch, backend="triton")
    batch.k_pages, batch.v_pages = at_byte(4, batch.k_pages), at_byte(4, batch.v_pages)
    _recipe.cache_clear()
    attend(batch, backend="triton")
    batch.v_pages = at_byte(1, batch.v_pages)
    assert torch.equal(attend(batch, backend="triton").out, wanted.out)
