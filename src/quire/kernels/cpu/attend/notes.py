"""A plan's launches in words, for plan.explain(): tiles, threads, and how wide this CPU computes."""

from __future__ import annotations

from numba.core.registry import cpu_target

from quire.kernels.cpu.attend.config import Config
from quire.kernels.cpu.simd.llvm import LANES
from quire.planning.work_list import TileShape

SINGLE, PAIRS = "float32 numbers", "pairs of bfloat16 numbers"


def factors(config: Config) -> str:
    """What decode multiplies."""
    if config.integers:
        return "integers of 16 bits, in pairs" if config.shorts else "bytes, in fours"
    return PAIRS if config.pairs else SINGLE


def prefill_factors(config: Config) -> str:
    """What prefill multiplies."""
    if config.amx:
        return "bfloat16 numbers, in AMX's tile registers"
    return PAIRS if config.prefill_pairs else SINGLE


def describe_tile(name: str, shape: TileShape, rows: int, numbers: str) -> str:
    """One kernel: what it works on at once."""
    tokens = f"{shape.q_tokens} token{'' if shape.q_tokens == 1 else 's'}"
    return f"{name} tile: {tokens} × {shape.kv_tokens} keys, {rows} rows; multiplies {numbers}"


def describe_machine(threads: int) -> str:
    """What all launches run on."""
    bits = register_bits(cpu_target.target_context.codegen().magic_tuple()[2])
    registers = f", in registers of {bits} bits" if bits else ""
    return f"{threads} thread{'' if threads == 1 else 's'}; vectors of {LANES} float32 numbers{registers}"


def register_bits(features: str) -> int:
    """Bits of a vector register, by LLVM's list of features; 0 where Numba was told a CPU by its name alone."""
    enabled = features.split(",")
    if "+avx512f" in enabled:
        return 512
    if "+avx" in enabled:
        return 256
    return 128 if features else 0
