"""Pages more than 2³¹ elements from the first, in the interpreter: no offset is computed in 32 bits.

Strides are less than that, so that none is handed over in 64 bits, and rows are such as are read byte by byte: four
bytes at a time, offsets are a quarter. The system provides the memory that is touched, and of these tensors little is;
the records of who touched it (``memory``) cost addresses too.
"""

import numpy as np
import pytest
import torch
from support import Shape, attend, make_batch

import quire
from quire.kernels import reference

pytestmark = pytest.mark.interpreted

PAGE_SIZE, SEQ_LEN = 16, 48
SHAPES = [Shape(dtype, 18, 2, "int8", num_kv_heads=3) for dtype in (torch.bfloat16, torch.float32)]
HEADS, PAGES = 0, 1
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
axes = pytest.mark.parametrize("axis", [HEADS, PAGES], ids=["heads", "pages"])


def far_apart(pages, axis, last):
    """A copy whose entries along ``axis`` lie so far apart that the one at ``last`` begins beyond 2³¹ elements."""
    strides = list(pages.stride())
    strides[axis] = 2**31 // last + PAGE_SIZE
    strides[axis] -= strides[axis] % PAGE_SIZE
    try:
        far = torch.empty_strided(pages.shape, strides, dtype=pages.dtype)
        for _ in range(4):  # the records
            np.zeros(far.untyped_storage().nbytes(), np.int32)
    except (RuntimeError, MemoryError):
        pytest.skip("this machine does not promise 70 GiB of address space, 8 GiB at a time")
    assert strides[axis] < 2**31 < far.select(axis, last).storage_offset()
    return far.copy_(pages)


def far_batch(shape, axis, q_lens=None):
    """A batch with near pages, the same batch with far ones, and the pages of its sequence."""
    batch, far = (make_batch(shape, [SEQ_LEN], q_lens, page_size=PAGE_SIZE) for _ in range(2))
    used = batch.page_table[0, : SEQ_LEN // PAGE_SIZE].long()
    last = shape.num_kv_heads - 1 if axis == HEADS else int(used.max())
    far.k_pages, far.v_pages = (far_apart(pages, axis, last) for pages in (batch.k_pages, batch.v_pages))
    return batch, far, used


@axes
@shapes
@pytest.mark.parametrize("q_lens", [[1], [40]], ids=["decode", "prefill"])
def test_far_pages_are_read(axis, shape, q_lens):
    batch, far, _ = far_batch(shape, axis, q_lens)
    wanted, state = (attend(which, backend="triton") for which in (batch, far))
    assert torch.equal(state.out, wanted.out)
    assert torch.equal(state.lse, wanted.lse)
    assert state.out.isfinite().all()


@axes
def test_far_pages_are_written(axis):
    shape = SHAPES[0]
    _, far, used = far_batch(shape, axis)
    slots = (used[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
    rows = torch.randn(SEQ_LEN, shape.num_kv_heads, shape.head_dim).to(shape.dtype)
    quire.write_kv(rows, -rows, far.k_pages, far.v_pages, slots, **far.scales, backend="triton")
    values, scale = reference.quantize(rows, torch.int8)
    assert torch.equal(far.k_pages[:, used].flatten(1, 2), values.transpose(0, 1))
    assert torch.equal(far.v_pages[:, used].flatten(1, 2), -values.transpose(0, 1))
    assert torch.equal(far.scales["v_scale"][:, used].flatten(1, 2), scale.T)
