"""The tensors of the pool: layout, size, copies, poison."""

import re
from pathlib import Path

import pytest
import torch

from quire.errors import ArgumentError, DeviceError, OutOfPages
from quire.pages import KVPool
from quire.spec import AttentionSpec

STORAGE = [
    {"dtype": torch.float32},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16},
    {"kv_dtype": "int8"},
    {"kv_dtype": "fp8_e4m3"},
    {"kv_dtype": "fp8_e5m2"},
]


def make_spec(num_kv_heads=2, head_dim=8, page_size=4, **dtypes):
    return AttentionSpec(num_kv_heads, num_kv_heads, head_dim, page_size, **dtypes)


def tensors(pool):
    return [t for t in (pool.k, pool.v, pool.k_scale, pool.v_scale) if t is not None]


def page_values(tensor, page):
    return tensor[:, :, page].float()


def number_pages(pool):
    """Give every slot of a page a value that tells page, layer and tensor apart, exact in every dtype."""
    for which, tensor in enumerate(tensors(pool)):
        for layer in range(pool.num_layers):
            for page in range(pool.num_pages):
                tensor[layer, :, page].fill_(page + 4 * (layer + which % 2))


@pytest.fixture(autouse=True)
def ordinary_run(monkeypatch):
    monkeypatch.delenv("QUIRE_DEBUG", raising=False)


@pytest.mark.parametrize("dtypes", STORAGE, ids=str)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (8, 4), (7, 3), (1, 1)])
def test_every_page_starts_on_a_64_byte_line(dtypes, head_dim, page_size):
    spec = make_spec(head_dim=head_dim, page_size=page_size, **dtypes)
    pool = KVPool(spec, num_layers=2, num_pages=3)
    for pages in (pool.k, pool.v):
        assert pages.shape == (2, 2, 3, page_size, head_dim)
        assert pages.dtype == spec.storage_dtype
        assert pages.stride()[2:] == (spec.page_stride, head_dim, 1)
        starts = [
            pages[layer, head, page].data_ptr() for layer in (0, 1) for head in (0, 1) for page in (0, 1, 2)
        ]
        assert [start % 64 for start in starts] == [0] * 12
        assert len(set(starts)) == 12


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no huge pages to ask for",
)
def test_linux_is_asked_to_back_a_pool_with_huge_pages():
    pool = KVPool(make_spec(head_dim=64, kv_dtype="int8"), num_layers=1, num_pages=2**18)
    asked = memory_areas_advised_to_be_huge()
    for tensor in tensors(pool):
        middle = tensor.data_ptr() + tensor.untyped_storage().nbytes() // 2
        assert any(begin <= middle < end for begin, end in asked)


def memory_areas_advised_to_be_huge():
    """(begin, end) of this process's memory areas that carry madvise's mark, from /proc/self/smaps."""
    areas = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            area = tuple(int(bound, 16) for bound in bounds.groups())
        elif line.startswith("VmFlags:") and "hg" in line.split():
            areas.append(area)
    return areas


@pytest.mark.parametrize("dtypes", STORAGE, ids=str)
def test_scales_are_there_exactly_where_pages_are_quantised(dtypes):
    spec = make_spec(**dtypes)
    pool = KVPool(spec, num_layers=3, num_pages=5)
    for scale in (pool.k_scale, pool.v_scale):
        if spec.quantized:
            assert scale.shape == (3, 2, 5, 4)
            assert scale.dtype == torch.float32
        else:
            assert scale is None


@pytest.mark.parametrize("dtypes", STORAGE, ids=str)
@pytest.mark.parametrize("head_dim", [8, 7])
def test_nbytes_is_the_size_of_the_memory_behind_the_tensors(dtypes, head_dim):
    pool = KVPool(make_spec(head_dim=head_dim, page_size=3, **dtypes), num_layers=3, num_pages=5)
    assert pool.nbytes == sum(t.untyped_storage().nbytes() for t in tensors(pool))


@pytest.mark.parametrize("dtypes", STORAGE, ids=str)
@pytest.mark.parametrize("spare", [0, 1, -1])
def test_fit_takes_every_page_that_fits_and_not_one_more(dtypes, spare):
    spec = make_spec(head_dim=7, **dtypes)
    one_page = KVPool(spec, num_layers=3, num_pages=1).nbytes
    pool = KVPool.fit(spec, num_layers=3, memory_bytes=6 * one_page + spare)
    assert pool.num_pages == (5 if spare < 0 else 6)
    used = sum(t.untyped_storage().nbytes() for t in tensors(pool))
    assert used <= 6 * one_page + spare < used + one_page


@pytest.mark.parametrize("missing", [1, 10**9])
def test_fit_refuses_less_memory_than_one_page(missing):
    spec = make_spec()
    one_page = 3 * spec.bytes_per_page
    with pytest.raises(
        ArgumentError,
        match=f"at least one page of 3 layers, {one_page} bytes; got .* Fix: memory_bytes={one_page}",
    ):
        KVPool.fit(spec, num_layers=3, memory_bytes=one_page - missing)


@pytest.mark.parametrize("wrong", ["1GB", None, True, float("inf"), float("nan")])
def test_memory_that_is_no_number_of_bytes_is_refused(wrong):
    with pytest.raises(
        ArgumentError, match=r"memory_bytes must be a number of bytes; got .* Fix: memory_bytes=2\*\*30"
    ):
        KVPool.fit(make_spec(), num_layers=1, memory_bytes=wrong)


def test_fit_takes_a_float_such_as_1e6():
    spec = make_spec()
    assert KVPool.fit(spec, num_layers=1, memory_bytes=1e6).num_pages == 10**6 // spec.bytes_per_page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), "nonsense"])
def test_a_device_that_is_not_there_is_one_sentence(device):
    with pytest.raises(
        DeviceError, match=r"device must be one that this torch and machine have; got .* Fix: "
    ):
        KVPool(make_spec(), num_layers=1, num_pages=1, device=device)


def test_a_pool_says_its_sizes():
    pool = KVPool(make_spec(kv_dtype="int8"), num_layers=3, num_pages=1000)
    assert repr(pool) == "KVPool(3 layers of 1000 pages of 4 tokens, 2 heads of 8 in int8, 1.0 MB on cpu)"


def test_a_layer_is_a_view_of_the_pool():
    pool = KVPool(make_spec(dtype=torch.float32), num_layers=2, num_pages=3)
    number_pages(pool)
    k_pages, v_pages = pool.layer(1)
    assert k_pages.shape == v_pages.shape == (2, 3, 4, 8)
    k_pages[1, 2, 3, 4] = 77
    v_pages[0, 1, 2, 3] = 88
    assert pool.k[1, 1, 2, 3, 4] == 77
    assert pool.v[1, 0, 1, 2, 3] == 88
    assert (pool.k == 77).sum() == (pool.v == 88).sum() == 1
    for index in (-1, 2):
        with pytest.raises(ArgumentError, match=f"layer index must be from 0 to 1; got {index}"):
            pool.layer(index)


@pytest.mark.parametrize("dtypes", STORAGE, ids=str)
def test_copy_pages_copies_every_layer_head_and_scale_and_nothing_else(dtypes):
    pool = KVPool(make_spec(head_dim=7, **dtypes), num_layers=2, num_pages=4)
    number_pages(pool)
    before = [[page_values(t, page) for page in range(4)] for t in tensors(pool)]
    pool.copy_pages([(0, 3), (1, 2)])
    for tensor, pages in zip(tensors(pool), before, strict=True):
        for page, source in enumerate([0, 1, 1, 0]):
            assert torch.equal(page_values(tensor, page), pages[source])


@pytest.mark.parametrize(
    ("copies", "pages_after"),
    [
        ([], [0, 1, 2, 3]),
        ([(0, 1), (1, 2), (2, 3)], [0, 0, 0, 0]),  # a destination is a later source
        ([(0, 1), (2, 1)], [0, 2, 2, 3]),  # a destination twice
        ([(0, 1), (3, 0)], [3, 0, 2, 3]),  # a source is a later destination
        ([(0, 0)], [0, 1, 2, 3]),
        (iter([(0, 3)]), [0, 1, 2, 0]),
    ],
)
def test_copies_act_as_if_made_one_after_the_other(copies, pages_after):
    pool = KVPool(make_spec(dtype=torch.float32), num_layers=1, num_pages=4)
    number_pages(pool)
    pool.copy_pages(copies)
    assert pool.k[0, 0, :, 0, 0].tolist() == pages_after
    assert pool.v[0, 1, :, 3, 7].tolist() == [page + 4 for page in pages_after]


@pytest.mark.parametrize("dtypes", STORAGE, ids=str)
def test_poison_makes_every_slot_of_its_pages_read_as_nan_and_no_other(dtypes):
    spec = make_spec(head_dim=7, **dtypes)
    pool = KVPool(spec, num_layers=2, num_pages=4)
    number_pages(pool)
    pool.poison([1, 3])
    for pages, scale in ((pool.k, pool.k_scale), (pool.v, pool.v_scale)):
        read = pages.float() if scale is None else pages.float() * scale[..., None]
        assert torch.isnan(read[:, :, [1, 3]]).all()
        assert not torch.isnan(read[:, :, [0, 2]]).any()
        if spec.kv_dtype != "int8":
            assert torch.isnan(pages.float()[:, :, [1, 3]]).all()


@pytest.mark.parametrize("dtypes", STORAGE, ids=str)
def test_in_debug_runs_all_memory_starts_as_nan(dtypes, monkeypatch):
    monkeypatch.setenv("QUIRE_DEBUG", "1")
    pool = KVPool(make_spec(**dtypes), num_layers=2, num_pages=3)
    assert pool.debug
    assert all(torch.isnan(t.float()).all() for t in tensors(pool) if t.dtype != torch.int8)


def test_other_runs_do_not_pay_for_poison():
    assert not KVPool(make_spec(), num_layers=1, num_pages=1).debug


@pytest.mark.parametrize("page", [-1, 4])
@pytest.mark.parametrize(
    "call",
    [
        lambda p, page: p.poison([0, page]),
        lambda p, page: p.copy_pages([(0, 1), (0, page)]),
        lambda p, page: p.copy_pages([(0, 1), (page, 2)]),
    ],
)
def test_pages_outside_the_pool_are_refused_and_nothing_is_written(call, page):
    pool = KVPool(make_spec(dtype=torch.float32), num_layers=1, num_pages=4)
    number_pages(pool)
    with pytest.raises(ArgumentError, match=f"page must be an id from 0 to 3; got {page}"):
        call(pool, page)
    assert pool.k[0, 0, :, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 0, "num_pages": 1},
        {"num_layers": 1, "num_pages": 0},
        {"num_layers": 1, "num_pages": 1.5},
    ],
)
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ArgumentError, match=r"num_(layers|pages) must be an int of at least 1; got (0|1\.5)"):
        KVPool(make_spec(), **sizes)


def test_a_pool_above_2_to_the_31_elements_has_64_bit_addresses():
    spec = AttentionSpec(8, 8, 128, 16)
    pool = KVPool.fit(spec, num_layers=32, memory_bytes=80 * 2**30, device="meta")
    assert pool.num_pages == 80 * 2**30 // (32 * 8 * 16 * 128 * 2 * 2)
    assert pool.k.numel() > 2**34
    k_pages, _ = pool.layer(31)
    assert k_pages[7, -1, 15, 127].storage_offset() == pool.k.numel() - 1


def test_pages_beyond_2_to_the_31_elements_can_be_copied_and_poisoned():
    spec = AttentionSpec(1, 1, 1024, 4096, kv_dtype="int8")
    num_pages = 2**31 // spec.page_stride + 2
    try:
        pool = KVPool(
            spec, num_layers=1, num_pages=num_pages
        )  # address space; only touched pages take memory
    except RuntimeError:
        pytest.skip("no address space for two tensors of 2 GiB")
    last = num_pages - 1
    pool.k[0, 0, 0].fill_(1)
    pool.k[0, 0, 1].fill_(2)
    pool.k_scale[0, 0, :2].fill_(0.5)
    pool.copy_pages([(1, last)])
    assert (pool.k[0, 0, last] == 2).all()
    assert (pool.k[0, 0, 0] == 1).all()
    pool.poison([last])
    assert torch.isnan(pool.k_scale[0, 0, last]).all()
    assert (pool.k_scale[0, 0, :2] == 0.5).all()


def test_a_pool_beyond_memory_is_refused_in_one_sentence():
    spec = AttentionSpec(1, 1, 64, page_size=16, dtype=torch.float32)
    with pytest.raises(OutOfPages, match=r"num_pages must fit .*; got .*\. Fix: "):
        KVPool(spec, num_layers=1, num_pages=1 << 45)
