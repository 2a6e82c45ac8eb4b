"""Triton's interpreter made faithful: ``install`` before the first kernel runs; see the README beside this file."""

from __future__ import annotations

import inspect
import math
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ptx
import thrift
import triton
import triton.language as tl
from arithmetic import FaithfulArithmetic, FaithfulReduce, KernelFault
from memory import Memory
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

_TRITON = Path(triton.__file__).parent


class FaithfulBuilder(FaithfulArithmetic):
    """Arithmetic as a GPU's, memory as a debugger's."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def create_masked_load(
        self, ptrs: TensorHandle, mask: Any, other: TensorHandle | None, *_: Any
    ) -> TensorHandle:
        dtype, shape = ptrs.get_element_ty(), ptrs.data.shape
        stored = stock._get_np_dtype(dtype)
        fill = _undefined(stored, dtype) if other is None else other.data
        addresses = self.memory.read(ptrs.data, _lanes(mask, shape), stored.itemsize)
        loaded = stock._interpreter.load(addresses, _lanes(mask, shape), np.broadcast_to(fill, shape), stored)
        return TensorHandle(loaded, dtype)

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask: Any, *_: Any) -> None:
        shape = ptrs.data.shape
        data = np.ascontiguousarray(np.broadcast_to(value.data, shape))
        addresses = self.memory.write(ptrs.data, _lanes(mask, shape), data)
        stock._interpreter.store(addresses, data, _lanes(mask, shape))

    def create_atomic_rmw(
        self, op: Any, ptr: TensorHandle, val: TensorHandle, mask: TensorHandle, sem: Any, scope: Any
    ) -> TensorHandle:
        lanes = _lanes(mask, ptr.data.shape)
        addresses = self.memory.update(ptr.data, lanes, val.data.itemsize, sem.name.lower())
        return super().create_atomic_rmw(op, TensorHandle(addresses, ptr.dtype), val, mask, sem, scope)

    def create_atomic_cas(
        self, ptr: TensorHandle, cmp: TensorHandle, val: TensorHandle, sem: Any, scope: Any
    ) -> TensorHandle:
        everywhere = np.ones(ptr.data.shape, bool)
        addresses = self.memory.update(ptr.data, everywhere, val.data.itemsize, sem.name.lower())
        return super().create_atomic_cas(TensorHandle(addresses, ptr.dtype), cmp, val, sem, scope)

    def create_inline_asm(
        self,
        assembly: str,
        constraints: str,
        values: list[TensorHandle],
        result_types: list[Any],
        is_pure: bool,
        pack: int,
    ) -> Any:
        if any(value.data.itemsize * pack != 4 for value in values):
            raise KernelFault("inline assembly is interpreted for 32 bits at a time")
        # Which elements share a register is the compiler's choice; here neighbours of the last axis do.
        registers = [np.ascontiguousarray(value.data).view(np.uint32) for value in values]
        words = ptx.run(assembly, registers, constraints.count("="))
        handles = [
            TensorHandle(
                np.broadcast_to(word, registers[0].shape).copy().view(stock._get_np_dtype(type_)),
                type_.scalar,
            )
            for word, type_ in zip(words, result_types, strict=True)
        ]
        return types.SimpleNamespace(get_result=handles.__getitem__)

    def create_barrier(self) -> None:
        self.memory.barrier()


def _lanes(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Which lanes take part; descriptors hand over bare arrays."""
    lanes: np.ndarray = mask if isinstance(mask, np.ndarray) else mask.data
    return lanes if lanes.shape == shape else np.broadcast_to(lanes, shape)


def _undefined(stored: np.dtype, dtype: tl.dtype) -> np.ndarray:
    """What a masked lane of a load without ``other`` holds: nobody knows, so something that shows. NaN if it can."""
    if stored.kind == "f":
        return np.array(np.nan, stored)
    if stored == np.bool_:
        return np.array(True)
    return np.array(
        0x7FFF if dtype == tl.bfloat16 else int.from_bytes(b"\x7f" * stored.itemsize, "little"), stored
    )


class CheckedGrid(stock.GridExecutor):
    """Runs the programs of a grid one after another over checked memory."""

    # A GPU promises no order: tests that depend on none put another here.
    order: Callable[[list[Any]], list[Any]] = staticmethod(list)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        parameters = inspect.signature(self.fn).parameters
        options = {name: value for name, value in kwargs.items() if name in parameters}
        given = inspect.getcallargs(self.fn, *args, **options)
        builder = stock.interpreter_builder
        builder.memory = memory = Memory()
        arguments = {
            name: value if name in self.constexprs else _argument(memory, name, value)
            for name, value in given.items()
        }
        grid = self.grid(arguments) if callable(self.grid) else self.grid
        grid = (*grid, *(1,) * (3 - len(grid)))
        builder.set_grid_dim(*grid)
        # Masked lanes compute with infinities and NaN all the time.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for program, where in self.order(list(enumerate(np.ndindex(*grid)))):
                builder.set_grid_idx(*where)
                memory.begin(program, math.prod(grid), where)
                try:
                    self.fn(**arguments)
                except Exception as error:
                    raise error.with_traceback(_without_triton(error.__traceback__)) from None


def _without_triton(trace: types.TracebackType | None) -> types.TracebackType | None:
    """The frames of kernels and tests: a reader looks for the kernel's line, not for the interpreter's."""
    if trace is None:
        return None
    rest = _without_triton(trace.tb_next)
    if Path(trace.tb_frame.f_code.co_filename).is_relative_to(_TRITON):
        return rest
    return types.TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)


def _argument(memory: Memory, name: str, value: Any) -> Any:
    """A launch argument as the kernel sees it: tensors by their made-up addresses."""
    if isinstance(value, TensorDescriptor):
        return _descriptor(memory, name, value)
    if isinstance(value, tuple):
        items = [_argument(memory, f"{name}[{i}]", item) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    argument = stock._implicit_cvt(value)
    if hasattr(value, "data_ptr"):
        argument.handle.data[...] = memory.enter(name, value)
    return argument


def _descriptor(memory: Memory, name: str, value: TensorDescriptor) -> Any:
    strides = [stock._implicit_cvt(stride) for stride in value.strides[:-1]]
    return stock.interpreter_semantic.make_tensor_descriptor(
        base=_argument(memory, name, value.base),
        shape=[stock._implicit_cvt(size) for size in value.shape],
        strides=[*strides, tl.constexpr(1)],
        block_shape=[tl.constexpr(size) for size in value.block_shape],
        padding_option=value.padding,
    )


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The stock interpreter patches the language anew at each call, and wraps each error in one more."""
    return self.rewrite()(*args, **kwargs)


def _check_hint(name: str, tensor: Any, values: Any) -> Any:
    """tl.multiple_of, max_contiguous and max_constancy promise and the compiler believes: hold them to it."""
    if not isinstance(tensor, tl.tensor):
        return tensor
    values = values if isinstance(values, (list, tuple)) else [values]
    data = tensor.handle.data.astype(np.int64)
    for axis, length in enumerate(int(getattr(value, "value", value)) for value in values):
        lanes = np.moveaxis(data, axis, -1)
        if name == "multiple_of":  # said of the first of each contiguous run
            starts = np.ones(lanes.shape, bool)
            starts[..., 1:] = np.diff(lanes, axis=-1) != 1
            kept = lanes[starts] % length == 0
        else:
            runs = lanes.reshape(*lanes.shape[:-1], -1, length)
            kept = np.diff(runs, axis=-1) == (name == "max_contiguous")
        if not kept.all():
            raise KernelFault(f"tl.{name}({length}) is not true along axis {axis} of {lanes.ravel()[:16]}...")
    return tensor


def install() -> None:
    """Replace the stock interpreter of this process; TRITON_INTERPRET=1 must have been set before triton's import."""
    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before importing triton"
    stock.interpreter_builder = FaithfulBuilder()
    stock.interpreter_semantic = stock.TritonSemantic(stock.interpreter_builder)
    stock.GridExecutor = CheckedGrid
    stock.ReduceOps = FaithfulReduce
    stock.InterpretedFunction.__call__ = _call_device_function
    thrift.install()
    # Once and for good: this process only interprets.
    stock._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    for module in (tl, tl.core):
        for name in ("multiple_of", "max_contiguous", "max_constancy"):
            setattr(module, name, lambda tensor, values, name=name, **_: _check_hint(name, tensor, values))
