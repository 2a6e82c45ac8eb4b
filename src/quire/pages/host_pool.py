"""Pages in host memory: where the contents of pages go when their memory is needed, and come back from."""

from __future__ import annotations

import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

from quire.errors import ArgumentError
from quire.pages.huge_pages import back_with_huge_pages
from quire.pages.pool import KVPool, as_bits

_ALIGNMENT = 64  # of each tensor's part of a host page, so that it can be viewed in the tensor's dtype
_STAGING_BYTES = 64 << 20  # of device memory, beside the pool's
_MEASURED_BYTES = 16 << 20
_MEASURED_TIMES = 3


class _Part(NamedTuple):
    """Where the bytes of one tensor of a pool lie in a host page."""

    bits: torch.Tensor
    start: int
    end: int


class HostPool:
    """Copies whole pages, of all layers and with their scales, from pools to host memory and back.

    A host page is one run of memory, so that a copy between device and host moves long runs however the page is spread
    over the tensors of its pools. On a GPU the pages are gathered into a buffer on the device first, and scattered from
    one on their way back.

    **On a GPU** host memory is pinned, and copies run on a stream of their own. The stream that is current at the call
    waits for as little as it must: after `save` until the pages have been gathered, from when on they may be
    overwritten; after `load` until they are back. The host never waits.

    **On a CPU** a copy has been made when the call returns.

    Args:
        pools: the pools of a model; page p of each of them is a part of the page p.
        num_pages: host pages.
    Attributes:
        bytes_per_page: of host memory.
    Raises:
        ArgumentError: no pool, num_pages below one, or more memory than the system can give or pin.
    Cost: num_pages × bytes_per_page bytes of host memory; on a CPU the system provides them as they are first
        touched, for a GPU they are pinned at once.
    """

    def __init__(self, pools: Sequence[KVPool], num_pages: int) -> None:
        self.num_pages = num_pages
        self.bytes_per_page = host_page_bytes(pools)
        self.device = pools[0].device
        self._parts = _parts(pools)
        self._num_device_pages = pools[0].num_pages
        try:
            self._rows = torch.empty((num_pages, self.bytes_per_page), dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            raise _too_much(num_pages * self.bytes_per_page, "the system has less") from error
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            _pin(self._rows)
            weakref.finalize(self, _unpin, self._rows)
        else:
            back_with_huge_pages(self._rows)

    def save(self, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Copy pages of the pools to as many host pages.

        Cost: two passes over the pages on the device, one over the link to the host.
        """
        with self._beside() as stream:
            for first, end in self._batches(len(pages)):
                index = self._index(pages[first:end])
                if stream is None:
                    for row, at, count in _runs(host_pages[first:end]):
                        self._gather(index[at : at + count], self._rows[row : row + count])
                    continue
                staging = self._staging(end - first)
                self._gather(index, staging)
                gathered = stream.record_event()
                for row, at, count in _runs(host_pages[first:end]):
                    self._rows[row : row + count].copy_(staging[at : at + count], non_blocking=True)
        if stream is not None and len(pages):
            torch.cuda.current_stream(self.device).wait_event(gathered)

    def load(self, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        """Copy host pages to as many pages of the pools. Cost: as `save`."""
        with self._beside() as stream:
            for first, end in self._batches(len(pages)):
                index = self._index(pages[first:end])
                if stream is None:
                    for row, at, count in _runs(host_pages[first:end]):
                        self._scatter(self._rows[row : row + count], index[at : at + count])
                    continue
                staging = self._staging(end - first)
                for row, at, count in _runs(host_pages[first:end]):
                    staging[at : at + count].copy_(self._rows[row : row + count], non_blocking=True)
                self._scatter(staging, index)
        if stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def checksum(self, host_page: int) -> int:
        """A number by which changed bytes show, as good as always; waits for copies that are on their way."""
        if self._stream is not None:
            self._stream.synchronize()
        return zlib.crc32(self._rows[host_page].numpy().tobytes())

    def measure(self) -> float:
        """Bytes per second of `load`: of a few pages, to where they came from. No page of the pools is changed.

        Call it before host pages are in use.
        """
        most = max(_MEASURED_BYTES // self.bytes_per_page, 1)
        pages = list(range(min(self.num_pages, self._num_device_pages, most)))
        self.save(pages, pages)
        best = float("inf")
        for _ in range(_MEASURED_TIMES):
            self._synchronize()
            start = time.perf_counter()
            self.load(pages, pages)
            self._synchronize()
            best = min(best, time.perf_counter() - start)
        return len(pages) * self.bytes_per_page / max(best, 1e-9)

    def __repr__(self) -> str:
        pinned = "" if self._stream is None else ", pinned"
        return f"HostPool({self.num_pages} pages of {self.bytes_per_page} bytes{pinned})"

    @contextmanager
    def _beside(self) -> Iterator[torch.cuda.Stream | None]:
        """Work on the stream for copies, which begins when the current stream has done what it was given before."""
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            yield stream

    def _batches(self, num_pages: int) -> Iterator[tuple[int, int]]:
        step = max(_STAGING_BYTES // self.bytes_per_page, 1)
        for first in range(0, num_pages, step):
            yield first, min(first + step, num_pages)

    def _staging(self, num_pages: int) -> torch.Tensor:
        """Memory that belongs to the stream for copies: it goes back to that stream, in its order."""
        return torch.empty((num_pages, self.bytes_per_page), dtype=torch.uint8, device=self.device)

    def _index(self, pages: Sequence[int]) -> torch.Tensor:
        index = torch.tensor(pages, dtype=torch.int64, device="cpu")
        if self._stream is None:
            return index
        return index.pin_memory().to(
            self.device, non_blocking=True
        )  # else the host would wait for the stream

    def _gather(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        for part in self._parts:
            _view(rows, part).copy_(part.bits.index_select(2, index).movedim(2, 0))

    def _scatter(self, rows: torch.Tensor, index: torch.Tensor) -> None:
        for part in self._parts:
            part.bits.index_copy_(2, index, _view(rows, part).movedim(0, 2))

    def _synchronize(self) -> None:
        if self._stream is not None:
            torch.cuda.synchronize(self.device)


def host_page_bytes(pools: Sequence[KVPool]) -> int:
    """Bytes that a page of these pools takes in host memory: without the padding between pages."""
    return _parts(pools)[-1].end


def _parts(pools: Sequence[KVPool]) -> list[_Part]:
    parts: list[_Part] = []
    end = 0
    for tensor in (tensor for pool in pools for tensor in pool.tensors()):
        bits = as_bits(tensor)
        start, size = end, bits[:, :, 0].numel() * bits.element_size()
        end = start + -(-size // _ALIGNMENT) * _ALIGNMENT
        parts.append(_Part(bits, start, end))
    if not parts:
        raise ArgumentError("pools must hold at least one KVPool; got none. Fix: pass the pools of a model")
    return parts


def _view(rows: torch.Tensor, part: _Part) -> torch.Tensor:
    """A tensor's part of host pages: [pages, layers, heads, …], in its own bits."""
    layers, heads, _, *rest = part.bits.shape
    size = part.bits[:, :, 0].numel() * part.bits.element_size()
    flat = rows[:, part.start : part.start + size].view(part.bits.dtype)
    return flat.view(len(rows), layers, heads, *rest)


def _runs(host_pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Host pages that follow one another: the first, where it stands in the list, and how many there are."""
    start = 0
    for at in range(1, len(host_pages) + 1):
        if at == len(host_pages) or host_pages[at] != host_pages[at - 1] + 1:
            yield host_pages[start], start, at - start
            start = at


def _pin(memory: torch.Tensor) -> None:
    """Let the device copy from and to this memory by itself. `torch.empty(pin_memory=True)` rounds up to powers of 2.

    Raises:
        ArgumentError: the system refuses.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if status:
        raise _too_much(memory.nbytes, f"cudaHostRegister returned {status}")


def _unpin(memory: torch.Tensor) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(memory.data_ptr())


def _too_much(num_bytes: int, why: str) -> ArgumentError:
    return ArgumentError(
        f"swap_bytes must be host memory that the system can give; got {num_bytes} bytes, and {why}. "
        "Fix: a smaller swap_bytes"
    )
