"""A few PTX instructions in NumPy, so that kernels with inline assembly can be interpreted too."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from arithmetic import KernelFault, narrow, widen

Words = np.ndarray  # uint32


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    """Byte permute: each hexadecimal digit of the selector picks one of eight bytes, b's above a's."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape), np.uint64)
    for place in range(4):
        digit = (int(selector.flat[0]) >> (4 * place)) & 0xF
        if digit > 7:
            raise KernelFault("prmt that replicates signs is not interpreted")
        result |= ((both >> np.uint64(8 * digit)) & np.uint64(0xFF)) << np.uint64(8 * place)
    return result.astype(np.uint32)


def _per_half(dtype: tl.dtype, operation: Callable[..., np.ndarray]) -> Callable[..., Words]:
    """An operation on both 16-bit halves, rounded once."""

    def values(bits: np.ndarray) -> np.ndarray:
        return widen(bits, dtype) if dtype == tl.bfloat16 else bits.view(np.float16)

    def on_halves(*operands: Words) -> Words:
        halves = []
        for shift in (0, 16):
            parts = [
                values(((operand >> shift) & 0xFFFF).astype(np.uint16)).astype(np.float64)
                for operand in operands
            ]
            exact = operation(*parts)
            rounded = (
                narrow(exact, dtype) if dtype == tl.bfloat16 else exact.astype(np.float16).view(np.uint16)
            )
            halves.append(rounded.astype(np.uint32) << shift)
        return halves[0] | halves[1]

    return on_halves


def _e4m3_pair(pair: Words) -> Words:
    """Two e4m3 bytes, the low ones of each word, as float16 halves."""
    two = np.stack([pair & 0xFF, (pair >> 8) & 0xFF], -1).astype(np.uint8)
    halves = torch.from_numpy(two).view(torch.float8_e4m3fn).to(torch.float16).numpy()
    return np.ascontiguousarray(halves).view(np.uint32)[..., 0]


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "cvt.rn.f16x2.e4m3x2": _e4m3_pair,
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "prmt.b32": _prmt,
    "lop3.b32": lambda a, b, c, table: _lop3(a, b, c, int(table.flat[0])),
}
for _name, _dtype in (("f16x2", tl.float16), ("bf16x2", tl.bfloat16)):
    INSTRUCTIONS[f"fma.rn.{_name}"] = _per_half(_dtype, lambda a, b, c: a * b + c)
    INSTRUCTIONS[f"add.rn.{_name}"] = INSTRUCTIONS[f"add.{_name}"] = _per_half(_dtype, np.add)
    INSTRUCTIONS[f"sub.rn.{_name}"] = INSTRUCTIONS[f"sub.{_name}"] = _per_half(_dtype, np.subtract)
    INSTRUCTIONS[f"mul.rn.{_name}"] = INSTRUCTIONS[f"mul.{_name}"] = _per_half(_dtype, np.multiply)


def _lop3(a: Words, b: Words, c: Words, table: int) -> Words:
    """Any function of three bits, by its truth table."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for row in range(8):
        if table >> row & 1:
            terms = [x if row & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def run(assembly: str, inputs: list[Words], num_outputs: int) -> list[Words]:
    """Run straight-line PTX on 32-bit registers; operand $i is the i-th output, then the inputs."""
    registers = {f"${num_outputs + i}": words for i, words in enumerate(inputs)}

    def operand(text: str) -> Words:
        if text in registers:
            return registers[text]
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)", text):
            raise KernelFault(f"inline assembly reads {text}, which nothing has set")
        return np.array(int(text, 0) & 0xFFFFFFFF, np.uint32)

    for statement in assembly.strip()[1:-1].split(";"):
        words = statement.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        if unpacked := re.fullmatch(r"\s*mov.b32 \{(\w+), (\w+)\}, (\S+)", statement):  # a register's halves
            low, high, source = unpacked.groups()
            registers[low], registers[high] = operand(source) & 0xFFFF, operand(source) >> 16
            continue
        name, target, *sources = words
        if name not in INSTRUCTIONS:
            raise KernelFault(f"{name} is not interpreted: add it to {__name__}.INSTRUCTIONS")
        registers[target] = INSTRUCTIONS[name](*map(operand, sources)).astype(np.uint32)
    return [registers[f"${i}"] for i in range(num_outputs)]
