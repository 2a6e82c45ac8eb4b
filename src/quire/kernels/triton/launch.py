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

    @classmethod
    def of(cls, tile: Tile) -> Options:
        return cls(tile.num_warps, tile.num_stages)


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
    misaligned = 0
    for address in addresses:
        misaligned |= address or 0
    key = (
        kernel, device, constants, options, numbers[per_step:], misaligned % ALIGNMENT,
        tuple([None if tensor is None else tensor.dtype for tensor in tensors]),
    )  # fmt: skip
    entry = _compiled.get(key)
    with torch.cuda.device(device):
        if entry is None:
            compiled = kernel.warmup(
                *map(as_bytes, tensors), *numbers, *constants, grid=(grid,), **options._asdict()
            )
            compiled._init_handles()
            entry = _compiled[key] = compiled
        stream = torch.cuda.current_stream(device).cuda_stream
        entry.run(
            grid, 1, 1, stream, entry.function, entry.packed_metadata, None, None, None,
            *addresses, *numbers, *constants,
        )  # fmt: skip


def as_bytes(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """fp8 tensors as bytes, which kernels read on every chip."""
    if tensor is not None and tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return tensor.view(torch.uint8)
    return tensor
