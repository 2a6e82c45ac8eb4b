"""Whether this process may use AMX's tile registers: asked for by QUIRE_AMX=1, there, and permitted by Linux.

The tiles are off unless asked for, because no machine that has them has run them here yet.

Linux saves tile registers only for processes that asked for them once, and ends others at their first such instruction.
The permission is the whole process's, with threads that start later; children by fork have it too, and a program that
is started anew asks anew. It is refused while a thread's alternate signal stack is too small for the registers.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys

import llvmlite.binding as llvm
from numba.core.registry import cpu_target

from quire.errors import ArgumentError, UnsupportedError

VARIABLE = "QUIRE_AMX"
FEATURES = ("amx-tile", "amx-bf16", "avx512bf16")
# From Linux's asm/prctl.h, and its number of arch_prctl on x86-64. State component 18 is the tiles' data.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def is_asked_for() -> bool:
    """Whether QUIRE_AMX is 1; read once.

    Raises ArgumentError where it is neither empty, 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ArgumentError(f"{VARIABLE} must be 0 or 1; got {value!r}. Fix: unset it, or set it to 0 or 1")
    return value == "1"


@functools.cache
def lacks() -> str | None:
    """Why there are no tiles in this machine, or None."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return "the tile registers are used on 64-bit Linux alone"
    present = llvm.get_host_cpu_features()
    missing = [name for name in FEATURES if not present.get(name)]
    return f"this CPU has no {', '.join(missing)}" if missing else None


@functools.cache
def why_not() -> str | None:
    """Why this process cannot use tiles, or None. Asks Linux for them where the CPU has them."""
    reason = lacks()
    if reason is not None:
        return reason
    compiled_for = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    if not all(f"+{name}" in compiled_for for name in FEATURES):
        return "Numba compiles for another CPU (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES)"
    return refusal(_request_permission())


def _request_permission() -> int:
    """Ask Linux for the tiles of this process; 0, or the number of the error."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    result = syscall(*map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)))
    return 0 if result == 0 else ctypes.get_errno()


def refusal(error: int) -> str | None:
    """What an answer of Linux means; None where it permits the tiles."""
    if error == 0:
        return None
    if error == errno.ENOSPC:
        return "Linux does not permit the tile registers: a thread's alternate signal stack is too small for them"
    return f"Linux does not permit the tile registers: {os.strerror(error)}"


def in_use() -> bool:
    """Whether kernels use tiles.

    Raises UnsupportedError where they are asked for and cannot be had.
    """
    if not is_asked_for():
        return False
    reason = why_not()
    if reason is not None:
        raise UnsupportedError(f"{VARIABLE}=1 needs AMX; got a process where {reason}. Fix: unset {VARIABLE}")
    return True
