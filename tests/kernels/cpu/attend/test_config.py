"""The numbers that kernels are specialised for."""

import pytest
import torch

from quire.kernels.compile import ConfigType
from quire.kernels.cpu.attend.config import DTYPE_CODES, Config
from quire.kernels.cpu.simd import memory
from quire.kernels.cpu.simd.llvm import LANES


@pytest.mark.parametrize("head_dim", [1, 8, 15, 16, 17, 40, 64, 72, 80, 96, 112, 128, 192, 256, 576])
def test_rows_are_whole_vectors_and_a_tail(head_dim):
    config = Config(0, 0, head_dim)
    assert config.vectors * LANES + config.tail == head_dim
    assert 0 <= config.tail < LANES
    assert config.row_bytes % (LANES * 4) == 0
    assert 0 <= config.row_bytes // 4 - head_dim < LANES


@pytest.mark.parametrize("heads", range(1, LANES + 1))
@pytest.mark.parametrize("head_dim", [8, 16, 80, 128, 256])
def test_a_decode_tile_fills_vectors_of_scores_and_fits_registers(heads, head_dim):
    config = Config(0, 0, head_dim, heads)
    assert heads <= config.padded_heads < 2 * heads
    assert config.tokens * config.padded_heads == LANES
    assert config.strip >= 1
    assert config.vectors % config.strip == 0
    assert config.strip_tile <= LANES


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.int8, 127), (torch.float8_e4m3fn, 448), (torch.float8_e5m2, 57344)]
)
def test_the_largest_value_is_that_of_the_pages_dtype(dtype, largest):
    config = Config(memory.F32, DTYPE_CODES[dtype], 16)
    assert config.kv_largest == largest
    assert torch.tensor(float(largest)).to(dtype).float() == largest


def test_each_config_is_a_type_of_its_own():
    assert ConfigType(Config(0, 0, 16)) == ConfigType(Config(0, 0, 16))
    assert ConfigType(Config(0, 0, 16)) != ConfigType(Config(0, 0, 32))
