"""Pages go to host memory and come back with every bit, and on a GPU nobody reads or writes one too early."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quire.errors import ArgumentError
from quire.pages import HostPool, KVPool, host_page_bytes, host_pool
from quire.spec import AttentionSpec

PAGES, LAYERS = 7, 3
SPECS = [
    AttentionSpec(4, 2, 8, 4, torch.float32),
    AttentionSpec(
        4, 2, 24, 4, torch.bfloat16
    ),  # pages of 192 bytes: there is padding behind each, but on the host
    AttentionSpec(2, 1, 8, 3, torch.float16, "int8"),
    AttentionSpec(2, 2, 16, 2, torch.bfloat16, "fp8_e4m3"),
    AttentionSpec(2, 1, 24, 4, torch.float32, value_dim=8),
]


def filled(*specs: AttentionSpec, num_pages: int = PAGES) -> list[KVPool]:
    """Pools of random bits, NaNs of every kind among them."""
    generator = torch.Generator().manual_seed(0)
    pools = [KVPool(spec, LAYERS + i, num_pages) for i, spec in enumerate(specs)]
    for tensor in (tensor for pool in pools for tensor in pool.tensors()):
        size = tensor.numel() * tensor.element_size()
        bits = torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
        tensor.view(torch.uint8).copy_(bits.view(tensor.view(torch.uint8).shape))
    return pools


def bits(pools: list[KVPool]) -> list[torch.Tensor]:
    return [host_pool.as_bits(tensor).clone() for pool in pools for tensor in pool.tensors()]


@pytest.mark.parametrize("specs", [*[[spec] for spec in SPECS], SPECS], ids=str)
def test_pages_come_back_with_every_bit_to_any_pages_and_no_other_page_is_touched(specs):
    pools = filled(*specs)
    before = bits(pools)
    host = HostPool(pools, 5)
    host.save([6, 0, 3], [1, 2, 4])
    host.save([5], [3])  # between two that are there
    host.load([4, 1, 3], [2, 1, 4])
    for was, now in zip(before, bits(pools), strict=True):
        assert torch.equal(now[:, :, [2, 1, 4]], was[:, :, [3, 6, 5]])
        assert torch.equal(now[:, :, [0, 3, 5, 6]], was[:, :, [0, 3, 5, 6]])


def test_more_pages_than_one_batch_are_copied_in_several(monkeypatch):
    pools = filled(SPECS[0])
    before = bits(pools)
    host = HostPool(pools, 6)
    monkeypatch.setattr(host_pool, "_STAGING_BYTES", 2 * host.bytes_per_page)
    assert list(host._batches(5)) == [(0, 2), (2, 4), (4, 5)]
    host.save([0, 1, 2, 3, 4], [5, 4, 0, 1, 2])
    host.load([5, 4, 0, 1, 2], [4, 3, 2, 1, 0])
    for was, now in zip(before, bits(pools), strict=True):
        assert torch.equal(now[:, :, :5], was[:, :, [4, 3, 2, 1, 0]])


def test_no_pages_are_no_copies():
    host = HostPool(filled(SPECS[0]), 2)
    host.save([], [])
    host.load([], [])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_host_page_takes_what_its_tensors_hold_in_whole_lines_and_no_padding_of_the_pool(spec):
    [pool] = filled(spec)
    contents = [tensor[:, :, 0].numel() * tensor.element_size() for tensor in pool.tensors()]
    assert host_page_bytes([pool]) == sum(-(-size // 64) * 64 for size in contents)
    assert HostPool([pool], 3).bytes_per_page == host_page_bytes([pool])


def test_measuring_changes_no_page():
    pools = filled(*SPECS)
    before = bits(pools)
    assert HostPool(pools, 3).measure() > 0
    assert all(map(torch.equal, before, bits(pools)))


def test_a_checksum_tells_changed_bytes():
    pools = filled(SPECS[2])
    host = HostPool(pools, 2)
    host.save([3, 4], [0, 1])
    first, second = host.checksum(0), host.checksum(1)
    assert first != second
    host._rows[0, 70] ^= 1
    assert host.checksum(0) != first
    assert host.checksum(1) == second


def test_memory_that_the_system_has_not_is_refused_in_one_sentence():
    pools = filled(SPECS[0])
    with pytest.raises(
        ArgumentError, match=r"swap_bytes must be host memory .*; got \d+ bytes.*Fix: a smaller"
    ):
        HostPool(pools, 1 << 50)
    with pytest.raises(ArgumentError, match="pools must hold at least one KVPool; got none"):
        host_page_bytes([])


class Stream:
    """A stream that takes notes."""

    def __init__(self, name: str, notes: list) -> None:
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append(f"{self.name} waits for all of {other.name}")

    def record_event(self):
        self.notes.append("event")
        return self

    def wait_event(self, event):
        self.notes.append(f"{self.name} waits for the event of {event.name}")

    def synchronize(self):
        self.notes.append("the host waits")


class Noting(TorchDispatchMode):
    """Notes whether an operator reads pages or writes pages or host memory, and on which stream."""

    def __init__(self, pools, host, notes, current) -> None:
        super().__init__()
        self.pages = {tensor.untyped_storage().data_ptr() for pool in pools for tensor in pool.tensors()}
        self.host = {host._rows.untyped_storage().data_ptr()}
        self.notes, self.current = notes, current

    def __torch_dispatch__(self, operator, _types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        memory = [each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)]
        if name == "index_select" and memory[0] in self.pages:
            self.notes.append(f"{self.current[-1]} reads pages")
        elif name == "index_copy_" and memory[0] in self.pages:
            self.notes.append(f"{self.current[-1]} writes pages")
        elif name == "copy_" and set(memory) & self.host:
            to = "to" if memory[0] in self.host else "from"
            self.notes.append(f"{self.current[-1]} copies {to} the host")
        return operator(*args, **kwargs or {})


def test_on_a_gpu_pages_are_read_and_written_in_an_order_that_needs_no_waiting_host(monkeypatch):
    pools = filled(SPECS[2])
    before = bits(pools)
    host = HostPool(pools, 4)
    notes, current = [], ["model"]

    @contextlib.contextmanager
    def on_stream(stream):
        current.append(stream.name)
        yield
        current.pop()

    host._stream = Stream("copies", notes)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("model", notes))
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with Noting(pools, host, notes, current):
        host.save([2, 5], [3, 0])
    assert list(dict.fromkeys(notes)) == [
        "copies waits for all of model",  # which has written the pages
        "copies reads pages",
        "event",
        "copies copies to the host",
        "model waits for the event of copies",  # not for the host's copy: the pages may be overwritten before
    ]
    assert notes.count("copies copies to the host") == 2, "one per run of host pages"
    notes.clear()
    with Noting(pools, host, notes, current):
        host.load([3, 0], [1, 6])
    assert list(dict.fromkeys(notes)) == [
        "copies waits for all of model",  # which may still read what was in the pages before
        "copies copies from the host",
        "copies writes pages",
        "model waits for all of copies",
    ]
    for was, now in zip(before, bits(pools), strict=True):
        assert torch.equal(now[:, :, [1, 6]], was[:, :, [2, 5]])


class Runtime:
    """The part of CUDA's runtime that pins memory."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.pinned = status, {}

    def cudaHostRegister(self, address, num_bytes, flags):
        assert flags == 0
        if not self.status:
            self.pinned[address] = num_bytes
        return self.status

    def cudaHostUnregister(self, address):
        del self.pinned[address]
        return 0


def test_memory_is_pinned_as_it_is_and_given_back_with_the_pool(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("copies", []))
    pools = filled(SPECS[0])
    monkeypatch.setattr(pools[0], "device", torch.device("cuda", 0))
    host = HostPool(pools, 3)
    assert runtime.pinned == {host._rows.data_ptr(): 3 * host.bytes_per_page}
    assert repr(host) == f"HostPool(3 pages of {host.bytes_per_page} bytes, pinned)"
    del host
    gc.collect()
    assert runtime.pinned == {}
    runtime.status = 2
    with pytest.raises(ArgumentError, match="cudaHostRegister returned 2"):
        HostPool(pools, 3)
