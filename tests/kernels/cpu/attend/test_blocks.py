"""Where a block of decode's tokens lies."""

import numba
import torch

from quire.kernels.cpu.attend import blocks


def test_a_whole_block_is_read_from_four_places_in_turn():
    interleave_rows, rows = blocks.interleave_rows, torch.arange(blocks.BLOCK) * 1000

    @numba.njit
    def order(address):
        interleave_rows(address)

    order(rows.data_ptr())
    assert rows[:9].tolist() == [0, 16000, 32000, 48000, 1000, 17000, 33000, 49000, 2000]
    assert torch.equal(rows, (torch.arange(blocks.BLOCK) * 1000).view(4, -1).T.flatten())
