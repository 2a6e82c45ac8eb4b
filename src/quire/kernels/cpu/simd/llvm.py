"""What the modules of SIMD words say to LLVM. Vectors have LANES elements where nothing else is said."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16

f16, f32 = ir.HalfType(), ir.FloatType()
i1, i8, i16, i32, i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))


def vector_of(element: Any, lanes: int = LANES) -> Any:
    """The type of a vector."""
    return ir.VectorType(element, lanes)


floats, ints = vector_of(f32), vector_of(i32)


def every_lane(element: Any, value: Any, lanes: int = LANES) -> Any:
    """A vector constant with one value in every lane."""
    return ir.Constant(vector_of(element, lanes), [value] * lanes)


def broadcast(builder: Any, scalar: Any) -> Any:
    """A value in every lane."""
    undefined = ir.Constant(vector_of(scalar.type), ir.Undefined)
    first = builder.insert_element(undefined, scalar, i32(0))
    return builder.shuffle_vector(first, undefined, every_lane(i32, 0))


def shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    """The lanes of two vectors, a's first, in an order."""
    return builder.shuffle_vector(a, b, ir.Constant(vector_of(i32, len(order)), order))


def zipped(size: int, first: int) -> list[int]:
    """The order a₀ b₀ a₁ b₁ … of two vectors of ``size``, from element ``first`` on."""
    return [first + i // 2 + i % 2 * size for i in range(size)]


def pointer(builder: Any, address: Any, element: Any) -> Any:
    """A byte address as the pointer to an element."""
    return builder.inttoptr(address, element.as_pointer())


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """A call of a function by its name, such as one of LLVM's intrinsics."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)
