"""Launching a compiled kernel with little work on the host.

``kernel[grid](...)`` looks at every argument of every call, 20 µs for forty of them. What compiled code depends on is
known here: dtypes and strides of the tensors, which of them are there, and whether they are aligned. A caller keeps
a ``Form`` by those and hands raw addresses to it: about 4 µs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton

from quire.kernels.triton.tune import Tile

INTERPRETED = triton.knobs.runtime.interpret
ALIGNMENT = 16  # bytes: what the compiler must know of an address to load 128 bits at once
SMALL_STORAGE = 2**31  # bytes: AMD's compiler addresses smaller ones with 32 bits


class Options(NamedTuple):
    """How a kernel is compiled."""

    num_warps: int
    num_stages: int
    launch_pdl: bool | None = None  # programmatic dependent launch

    @classmethod
    def of(cls, tile: Tile, overlaps: bool) -> Options:
        return cls(tile.num_warps, tile.num_stages, overlaps or None)


class Form(NamedTuple):
    """A kernel compiled for tensors of one form: their dtypes, strides and alignment."""

    kernel: Any
    compiled: Any  # None in the interpreter
    tail: tuple[Any, ...]  # arguments after the tensors and the numbers of a step: strides, then constants

    @classmethod
    def compile(
        cls,
        kernel: Any,
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[float],
        tail: tuple[Any, ...],
        options: Options,
    ) -> Form:
        """Compile ``kernel(*tensors, *numbers, *tail)``: seconds the first time, then from disk."""
        if INTERPRETED:
            return cls(kernel, None, tail)
        arguments = (*map(as_bytes, tensors), *numbers, *tail)
        # AMD's compiler knows no launch_pdl, not even None.
        asked = {name: value for name, value in options._asdict().items() if value is not None}
        where = next(tensor.device for tensor in tensors if tensor is not None)
        with torch.cuda.device(where) if where.type == "cuda" else nullcontext():  # code is loaded per device
            compiled = kernel.warmup(*arguments, grid=(1,), **asked)
            compiled._init_handles()
        return cls(kernel, compiled, tail)

    def launch(
        self,
        grid: int,
        device: torch.device,
        addresses: Sequence[int | None],
        numbers: Sequence[float],
        tensors: Callable[[], Sequence[torch.Tensor | None]],
    ) -> None:
        """Run ``grid`` programs on the device's current stream; ``addresses`` are those of ``tensors``."""
        if self.compiled is None:
            self.kernel[(grid,)](*map(as_bytes, tensors()), *numbers, *self.tail)
            return
        index = torch.cuda.current_device()
        if device.index is not None and device.index != index:
            with torch.cuda.device(device):
                self.launch(grid, device, addresses, numbers, tensors)
            return
        compiled = self.compiled
        compiled.run(
            grid, 1, 1, torch._C._cuda_getCurrentRawStream(index), compiled.function, compiled.packed_metadata,
            None, None, None, *addresses, *numbers, *self.tail,
        )  # fmt: skip


def addresses_of(tensors: Sequence[torch.Tensor | None]) -> tuple[list[int | None], Any]:
    """Where tensors lie, and what compiled code takes for granted of that: alignment, and on AMD small storages."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    ends = 0
    for address in addresses:
        if address is not None:
            ends |= address
    granted: Any = ends % ALIGNMENT == 0 or tuple(
        [address and address % ALIGNMENT == 0 for address in addresses]
    )
    if torch.version.hip is not None:
        small = [t is None or t.untyped_storage().nbytes() < SMALL_STORAGE for t in tensors]
        granted = (granted, *small)
    return addresses, granted


def as_bytes(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """fp8 tensors as bytes, which kernels read on every chip."""
    if tensor is not None and tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return tensor.view(torch.uint8)
    return tensor
