"""What one attention layer's shape says, and what it refuses to be."""

import sys

import pytest
import torch

from quire import AttentionSpec
from quire.errors import ArgumentError, DtypeError
from quire.spec import Visibility


def spec(**changes):
    return AttentionSpec(**{"num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128, **changes})


def test_a_spec_tells_group_and_storage():
    assert spec().group_size == 4
    assert spec().storage_dtype == torch.bfloat16
    assert not spec().quantized


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("int8", torch.int8), ("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_quantised_pages_are_stored_in_their_own_dtype(name, dtype):
    assert spec(kv_dtype=name).storage_dtype == dtype
    assert spec(kv_dtype=name).quantized


def test_bytes_of_a_page_count_k_and_v_of_all_heads():
    assert spec(page_size=16).bytes_per_page == 2 * 8 * 16 * 128 * 2
    assert spec(page_size=16, dtype=torch.float32).bytes_per_page == 2 * 8 * 16 * 128 * 4
    assert spec(page_size=16, kv_dtype="int8").bytes_per_page == 2 * 8 * (16 * 128 + 16 * 4)


@pytest.mark.parametrize(("head_dim", "page_size"), [(1, 1), (7, 3), (40, 1), (64, 16), (80, 5)])
@pytest.mark.parametrize(
    "dtypes", [{"dtype": torch.float32}, {"dtype": torch.float16}, {"kv_dtype": "int8"}], ids=str
)
def test_pages_are_whole_cache_lines_and_no_longer_than_they_must_be(head_dim, page_size, dtypes):
    it = spec(head_dim=head_dim, page_size=page_size, **dtypes)
    stride_bytes = it.page_stride * it.storage_dtype.itemsize
    used = page_size * head_dim * it.storage_dtype.itemsize
    assert stride_bytes % 64 == 0
    assert 0 <= stride_bytes - used < 64


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_values_may_be_narrower_than_keys_and_take_fewer_bytes(kv_dtype):
    it = spec(head_dim=576, num_kv_heads=1, value_dim=512, page_size=4, kv_dtype=kv_dtype)
    element, scale = (1, 4) if kv_dtype else (2, 0)
    assert (it.out_dim, spec().out_dim) == (512, 128)
    assert it.bytes_per_token == (576 + 512) * element + 2 * scale
    assert it.bytes_per_page == 4 * it.bytes_per_token
    assert it.value_page_stride == 4 * 512
    assert spec(value_dim=128) == spec(), "as wide as keys is no other layout"
    with pytest.raises(ArgumentError, match=r"^value_dim must be at most head_dim=128; got 129\. Fix: "):
        spec(value_dim=129)
    with pytest.raises(ArgumentError, match=r"^value_dim must be an int of at least 1; got 0\. Fix: "):
        spec(value_dim=0)


def test_a_spec_is_a_value():
    assert spec() == spec()
    assert hash(spec()) == hash(spec())
    assert spec() != spec(page_size=32)
    with pytest.raises(AttributeError):
        spec().head_dim = 64


@pytest.mark.parametrize("name", ["num_qo_heads", "num_kv_heads", "head_dim", "page_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "8", True, None])
def test_sizes_are_ints_of_at_least_one(name, value):
    with pytest.raises(ArgumentError, match=rf"^{name} must be an int of at least 1; got {value!r}\. Fix: "):
        spec(**{name: value})


def test_query_heads_divide_among_kv_heads():
    with pytest.raises(
        ArgumentError, match=r"^num_qo_heads must be a multiple of num_kv_heads; got 12 and 8\. Fix: "
    ):
        spec(num_qo_heads=12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, "bfloat16", None], ids=str)
def test_dtypes_that_no_kernel_computes_in_are_refused(dtype):
    with pytest.raises(
        DtypeError, match=r"^dtype must be torch.float32, float16 or bfloat16; got .*\. Fix: "
    ):
        spec(dtype=dtype)


@pytest.mark.parametrize("kv_dtype", ["fp8", "int4", torch.int8, 8])
def test_page_formats_that_do_not_exist_are_refused(kv_dtype):
    with pytest.raises(
        DtypeError, match=r"^kv_dtype must be None or one of int8, fp8_e4m3, fp8_e5m2; got .*\. Fix: "
    ):
        spec(kv_dtype=kv_dtype)


SIGHTS = [Visibility(window) for window in (-1, 0, 1, 5, 6, 7, 8)] + [Visibility(chunk_size=8)]


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_what_falls_out_of_sight_is_what_no_later_query_sees(sight):
    def seen(position):
        first = 0
        if sight.chunk_size:
            first = position // sight.chunk_size * sight.chunk_size
        elif sight.window_left >= 0:
            first = position - sight.window_left
        return {key for key in range(position + 1) if key >= first}

    assert sight.sees_all == (len(seen(100)) == 101)
    for position in range(40):
        assert sight.first_key(position) == min(seen(position))
    for key in range(1, 20):
        unseen = [p for p in range(key, 100) if not any(k < key for q in range(p, 100) for k in seen(q))]
        assert sight.unseen_from(key) == (min(unseen) if unseen else sys.maxsize)


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_the_most_pages_in_sight_are_reached_and_never_passed(sight):
    size = 4
    for num_tokens in (1, 2, 3, 8, 9):
        pages = [
            (position + num_tokens - 1) // size - sight.first_key(position) // size + 1
            for position in range(64)
        ]
        most = sight.most_pages(num_tokens, size)
        assert most == (sys.maxsize if sight.sees_all else max(pages))
