"""What the modules of SIMD words say to LLVM. Vectors have LANES elements where nothing else is said.

A vector is one register of AVX-512, one of AVX, or two of NEON, so that the tiles of a kernel fill the registers that
there are (32, 16 and 32) and none is moved to memory and back.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target


def assembly_of(source: str) -> str:
    """What LLVM makes of a module for the CPU that Numba compiles for."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    return str(machine.emit_assembly(llvm.parse_assembly(source)))


def _has_registers_of_512_bits() -> bool:
    wide = "<16 x float>"
    return "%zmm" in assembly_of(
        f"define {wide} @add({wide} %x, {wide} %y) {{\n %z = fadd {wide} %x, %y\n ret {wide} %z\n}}"
    )


LANES = 16 if _has_registers_of_512_bits() else 8  # float32 numbers in a vector

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
