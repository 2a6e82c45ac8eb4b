"""A step's lengths and page ids, copied from the caller's memory and checked on the way. Compiled by Numba.

Tensors come as addresses, because torch takes 0.7 µs to make an array of one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quire.kernels.compile import compiled, load_i32, load_i64


@intrinsic  # type: ignore[untyped-decorator]
def copy_bytes(typingctx: Any, target: Any, source: Any, nbytes: Any) -> Any:
    """memcpy between addresses."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        places = [builder.inttoptr(address, pointer) for address in args[:2]]
        cgutils.raw_memcpy(builder, *places, args[2], 1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), codegen


@compiled
def copy_ints(address: int, nbytes: int, target: Any) -> None:
    """Fill ``target`` with the integers of 4 or 8 bytes at an address, or with 0, 1, … where the address is 0."""
    for i in range(len(target)):
        if address == 0:
            target[i] = i
        elif nbytes == 8:
            target[i] = load_i64(address + i * 8)
        else:
            target[i] = load_i32(address + i * 4)


@compiled
def is_step(seq_lens: Any, starts: Any, capacity: int, most_tokens: int) -> bool:
    """Whether lengths lie in 0 … capacity, and starts begin with 0, never decrease and end with at most most_tokens."""
    fits = starts[0] == 0 and starts[len(seq_lens)] <= most_tokens
    for i in range(len(seq_lens)):
        fits = fits and 0 <= seq_lens[i] <= capacity and starts[i] <= starts[i + 1]
    return bool(fits)


@compiled
def copy_pages(
    address: int, row_bytes: int, column_bytes: int, seq_lens: Any, page_size: int, table: Any
) -> int:
    """Copy the page ids in use into ``table``, and find the highest, or −1 if there is none.

    Ids are read as unsigned: a negative id becomes one of at least 2³¹. The entries of a row beyond
    its sequence's last page are neither read nor written.

    Args:
        address: of int32 [batch, max_pages], whose strides follow in bytes.
        table: uint32 [batch, max_pages].
    """
    highest, any_used = np.uint32(0), False
    for i in range(len(seq_lens)):
        source, row = address + i * row_bytes, table[i]
        used = -(-seq_lens[i] // page_size)
        any_used = any_used or used > 0
        if column_bytes == 4:
            copy_bytes(row.ctypes.data, source, used * 4)
        else:
            for j in range(used):
                row[j] = load_i32(source + j * column_bytes)
        for j in range(used):  # a loop of its own, so that the compiler makes vectors of it
            highest = max(highest, row[j])
    return int(highest) if any_used else -1
