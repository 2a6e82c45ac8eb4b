"""The arithmetic of Triton's interpreter, made that of a GPU.

The interpreter keeps bf16 and fp8 as raw bits and computes on the bits; it cuts where hardware rounds, and multiplies
fp32 matrices exactly where tensor cores see TF32. Here every operation that is not known to only move bits widens
its narrow operands to fp32, computes, and rounds once to nearest even, as the hardware does.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import InterpreterBuilder, InterpreterOptions, TensorHandle

NARROW = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
# Conversions to fp8 saturate (cvt.rn.satfinite), where torch overflows.
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_FP8_VALUES = {
    dtype: torch.arange(256, dtype=torch.uint8).view(NARROW[dtype]).float().numpy() for dtype in _LARGEST
}


class KernelFault(Exception):
    """What a kernel did that a GPU would answer with wrong results, or with none."""


def widen(bits: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """The values that stored bits stand for, in fp32."""
    if dtype in _LARGEST:
        return _FP8_VALUES[dtype][bits]
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """The bits that a GPU stores for fp32 values: rounded to nearest even, fp8 saturated, NaN kept."""
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if dtype in _LARGEST:
        wide = wide.clamp(-_LARGEST[dtype], _LARGEST[dtype])  # NaN stays NaN
    rounded = wide.to(NARROW[dtype])
    bits = rounded.view(torch.uint8 if dtype in _LARGEST else torch.uint16).numpy()
    return bits.reshape(np.shape(values))


_TF32_KEPT = np.uint32(0xFFFFE000)  # sign, exponent, ten bits of mantissa
_TF32_HALF = np.uint32(0x1000)


def tf32_cut(values: np.ndarray) -> np.ndarray:
    """What a tensor core sees of an fp32 operand."""
    return (values.view(np.uint32) & _TF32_KEPT).view(np.float32)


def tf32_rounded(values: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32: to nearest, ties away from zero."""
    rounded = (values.view(np.uint32) + _TF32_HALF) & _TF32_KEPT
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def _is_narrow(handle: Any) -> bool:
    return (
        isinstance(handle, TensorHandle)
        and not isinstance(handle.dtype, tl.pointer_type)
        and handle.dtype.scalar in NARROW
        and handle.data.dtype != np.bool_
    )


def _widened(handle: Any) -> Any:
    if not _is_narrow(handle):
        return handle
    return TensorHandle(widen(handle.data, handle.dtype.scalar), tl.float32)


def _through_fp32(name: str) -> Any:
    """The stock operation on fp32 copies of its narrow operands, its result rounded back."""
    operation = getattr(InterpreterBuilder, name)

    def rounded_once(self: Any, *operands: Any) -> Any:
        result = operation(self, *map(_widened, operands))
        if result.data.dtype == np.bool_:  # a comparison, which the stock interpreter labels as its operands
            return TensorHandle(result.data, tl.int1)
        dtype = next((operand.dtype.scalar for operand in operands if _is_narrow(operand)), None)
        return result if dtype is None else TensorHandle(narrow(result.data, dtype), dtype)

    return rounded_once


class FaithfulArithmetic(InterpreterBuilder):
    """The interpreter's operations with a GPU's rounding, and faults where a GPU's integers would wrap."""

    def __init__(self) -> None:
        super().__init__()
        # debug: device_assert asserts. Overflow is checked below, ten times cheaper than as kernel code.
        self.options = InterpreterOptions(debug=True, sanitize_overflow=False)
        self.codegen_fns["min_dot_size"] = _min_dot_size

    unary_op = _through_fp32("unary_op")
    create_rsqrt = _through_fp32("create_rsqrt")
    create_erf = _through_fp32("create_erf")
    create_clampf = _through_fp32("create_clampf")
    _float_op = _through_fp32("binary_op")

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        result = self._float_op(lhs, rhs, op)
        if op in (np.add, np.subtract, np.multiply) and lhs.data.dtype.kind == "i" and lhs.data.itemsize <= 4:
            self._refuse_overflow(lhs.data, rhs.data, op, result.data)
        return result

    def _refuse_overflow(self, lhs: np.ndarray, rhs: np.ndarray, op: Any, result: np.ndarray) -> None:
        exact = op(lhs, rhs, dtype=np.int64)
        wrong = exact != result
        if wrong.any():
            raise KernelFault(
                f"{result.dtype} overflow in {op.__name__} at program {self.grid_idx}: "
                f"{exact[wrong].flat[0]} became {result[wrong].flat[0]}. Fix: widen an operand to int64 first"
            )

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        """x · y + z rounded once; NumPy would round the product too, and a kernel may count on either."""
        if x.dtype.scalar != tl.float32:
            raise KernelFault(f"fma of {x.dtype.scalar} is not interpreted")
        # The product of two float32 numbers is exact in float64.
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), tl.float32)

    # A GPU's min and max return the number when the other operand is NaN; NumPy's return NaN.
    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        target = dst_type.scalar
        source = _widened(src)
        if target in NARROW:
            return TensorHandle(narrow(source.data, target), target)
        data = source.data.astype(stock._get_np_dtype(target))
        if source.data.dtype == np.int64 and target == tl.int32 and (data != source.data).any():
            lost = source.data[data != source.data].flat[0]
            raise KernelFault(f"{lost} does not fit the int32 it is cast to, at program {self.grid_idx}")
        return TensorHandle(data, target)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        return self.cast_impl(src, dst_type)

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(narrow(np.array([value], np.float32), tl.bfloat16), tl.bfloat16)

    def create_dot(
        self, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, *_: Any
    ) -> TensorHandle:
        lhs, rhs = _widened(a).data, _widened(b).data
        if lhs.dtype.kind == "i":
            product = _matmul(lhs.astype(np.int32), rhs.astype(np.int32))
        elif a.dtype.scalar == tl.float32 and input_precision.name != "IEEE":
            product = _tf32_matmul(lhs, rhs, three_times=input_precision.name == "TF32x3")
        else:
            product = _matmul(lhs.astype(np.float32), rhs.astype(np.float32))
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _tf32_matmul(lhs: np.ndarray, rhs: np.ndarray, three_times: bool) -> np.ndarray:
    """One product of what the tensor core sees; or three, two of them with what rounding left of either operand."""
    lhs, rhs = (np.ascontiguousarray(operand, np.float32) for operand in (lhs, rhs))
    if not three_times:
        return _matmul(tf32_cut(lhs), tf32_cut(rhs))
    a, b = tf32_rounded(lhs), tf32_rounded(rhs)
    rest = _matmul(tf32_cut(lhs - a), b) + _matmul(a, tf32_cut(rhs - b))
    return np.nan_to_num(rest, nan=0.0, posinf=np.inf, neginf=-np.inf) + _matmul(a, b)


def _matmul(lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """The product of matrices, or of stacks of them, each element summed from the first k to the last.

    So a row's bits depend on that row and the columns alone. NumPy's BLAS chooses the order by shape and processor.
    """
    *stack, rows, _ = lhs.shape
    out = np.zeros((math.prod(stack), rows, rhs.shape[-1]), lhs.dtype)
    _sum_in_order(
        np.ascontiguousarray(lhs).reshape(-1, *lhs.shape[-2:]),
        np.ascontiguousarray(rhs).reshape(-1, *rhs.shape[-2:]),
        out,
    )
    return out.reshape(*stack, rows, rhs.shape[-1])


@numba.njit(cache=True)  # without fastmath LLVM neither reorders the sum nor fuses multiply and add
def _sum_in_order(lhs: np.ndarray, rhs: np.ndarray, out: np.ndarray) -> None:
    for s in range(lhs.shape[0]):
        for i in range(lhs.shape[1]):
            for k in range(lhs.shape[2]):
                for j in range(rhs.shape[2]):
                    out[s, i, j] += lhs[s, i, k] * rhs[s, k, j]


def _min_dot_size(lhs_type: Any, rhs_type: Any) -> tuple[int, int, int]:
    """What the compiler for NVIDIA asks of a dot, where the interpreter would take anything."""
    return (1, 1, 32) if lhs_type.scalar.primitive_bitwidth == 8 else (1, 1, 16)


class FaithfulReduce(stock.ReduceOps):
    """Reductions; of the narrow dtypes only those that the language itself widens first."""

    def check_tensor(self, input: Any) -> None:
        super().check_tensor(input)
        for arg in input:
            if arg.dtype.scalar in NARROW:
                raise KernelFault(
                    f"a reduction of {arg.dtype.scalar} rounds at every step. Fix: widen it to fp32"
                )
