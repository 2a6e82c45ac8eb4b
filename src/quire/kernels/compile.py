"""Numba's compiler as Quire uses it. Importing this imports Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function on first use, keep it on disk, and run it without the GIL."""
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # nowhere to write a cache: an installation without a writable home
        return numba.njit(**OPTIONS)(function)


def machine_code(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """What a compiled function runs for arguments of these types, and must then be given no others.

    Numba's own dispatch, which looks at the type of every argument, is left out.
    Cost: seconds to compile, milliseconds from disk; its calls then cost about a microsecond.
    """
    signature = tuple(numba.typeof(value) for value in arguments)
    dispatcher: Any = function
    dispatcher.compile(signature)
    code: Callable[..., Any] = dispatcher.overloads[signature].entry_point
    return code


def scalar_load(element: Any, result: Any, convert: Callable[[Any, Any], Any] | None = None) -> Any:
    """A word of compiled code that reads one element of an LLVM type at a byte address, as ``result`` of Numba's."""

    def load_one(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loaded = builder.load(builder.inttoptr(args[0], element.as_pointer()))
            return loaded if convert is None else convert(builder, loaded)

        return result(types.int64), codegen

    return intrinsic(load_one)


_i64 = ir.IntType(64)
load_i64 = scalar_load(_i64, types.int64)
load_i32 = scalar_load(ir.IntType(32), types.int64, lambda builder, value: builder.sext(value, _i64))
