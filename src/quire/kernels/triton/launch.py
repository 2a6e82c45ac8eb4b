"""Launching a compiled kernel with little work on the host.

``kernel[grid](...)`` looks at every argument of every call, 20 µs for forty of them. What a signature depends on is
known here: dtypes and strides of the tensors, whether they are there and aligned. So a compiled kernel is kept by
that key and handed raw addresses: 3 to 4 µs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from quire.kernels.triton.tune import Tile

ALIGNMENT = 16  # bytes: what the compiler must know of an address to load 128 bits at once

INTERPRETED = triton.knobs.runtime.interpret


class Options(NamedTuple):
    """How a kernel is compiled."""

    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @classmethod
    def of(cls, tile: Tile) -> Options:
        return cls(tile.num_warps, tile.num_stages, tile.max_registers)


_compiled: dict[Any, Any] = {}


def launch(
    kernel: Any,
    grid: int,
    device: torch.device,
    tensors: tuple[torch.Tensor | None, ...],
    numbers: tuple[float, ...],
    per_step: int,
    constants: tuple[Any, ...],
    options: Options,
) -> None:
    """Run ``kernel(*tensors, *numbers, *constants)`` on ``grid`` programs.

    The first ``per_step`` numbers are those the kernel does not specialise on.
    """
    if INTERPRETED:
        kernel[(grid,)](*map(as_bytes, tensors), *numbers, *constants)
        return
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    alignment, dtypes = 0, []
    for tensor, address in zip(tensors, addresses, strict=True):
        alignment |= address or 0
        dtypes.append(None if tensor is None else tensor.dtype)
    key = (kernel, device, constants, options, numbers[per_step:], alignment % ALIGNMENT, *dtypes)
    compiled = _compiled.get(key)
    here = torch.cuda.current_device()
    index = here if device.index is None else device.index
    if index != here:
        with torch.cuda.device(index):
            return launch(kernel, grid, device, tensors, numbers, per_step, constants, options)
    if compiled is None:
        compiled = kernel.warmup(
            *map(as_bytes, tensors), *numbers, *constants, grid=(grid,), **options._asdict()
        )
        compiled._init_handles()
        _compiled[key] = compiled
    compiled.run(
        grid, 1, 1, torch._C._cuda_getCurrentRawStream(index), compiled.function, compiled.packed_metadata,
        None, None, None, *addresses, *numbers, *constants,
    )  # fmt: skip


def as_bytes(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """fp8 tensors as bytes, which kernels read on every chip."""
    if tensor is not None and tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return tensor.view(torch.uint8)
    return tensor
