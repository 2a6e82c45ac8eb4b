"""Where a call's tensors lie, and what compiled code takes for granted of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

ALIGNMENT = 16  # bytes: what the compiler must know of an address to load 128 bits at once
SMALL_STORAGE = 2**31  # bytes: AMD's compiler addresses smaller ones with 32 bits


def addresses_of(tensors: Sequence[torch.Tensor | None]) -> tuple[Sequence[int | None], Any]:
    """The tensors' addresses, and all that code compiled for them depends on beside dtypes and strides.

    That is True where every tensor is aligned to ALIGNMENT, as most are, and else the alignment of each: it decides
    the width of loads, and whether one-byte elements are read in words of four. On AMD it is also which storages are
    small.
    """
    addresses: list[int | None] = []
    ends = 0
    for tensor in tensors:  # one loop takes two thirds of a list's comprehension and another
        if tensor is None:
            addresses.append(None)
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            ends |= address
    granted: Any = ends % ALIGNMENT == 0 or tuple(
        [address if address is None else math.gcd(address, ALIGNMENT) for address in addresses]
    )
    if torch.version.hip is not None:
        granted = (granted, *map(is_small, tensors))
    return addresses, granted


def is_small(tensor: torch.Tensor | None) -> bool:
    """Whether AMD's compiler addresses a tensor with 32 bits."""
    return tensor is None or tensor.untyped_storage().nbytes() < SMALL_STORAGE


def as_bytes(argument: Any) -> Any:
    """fp8 tensors as bytes, which kernels read on every chip; anything else as it is."""
    if isinstance(argument, torch.Tensor) and argument.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return argument.view(torch.uint8)
    return argument
