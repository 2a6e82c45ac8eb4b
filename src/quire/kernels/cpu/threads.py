"""How compiled functions run on all cores: on the OpenMP threads that torch already keeps.

A second pool would compete with the first for the same cores, because idle OpenMP threads spin. Whatever sets torch's
number of threads sets the number of threads that kernels run on.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quire.kernels.compile import machine_code
from quire.kernels.cpu import wake


def _find_openmp() -> bool:
    """Tell LLVM where torch's own OpenMP runtime is; False where none is found, and kernels run on one thread."""
    wanted = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    for candidate in (
        None,
        *map(str, libraries),
    ):  # None: the process's scope, where torch's own calls look first
        try:
            library = ctypes.CDLL(candidate)
            symbols = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in wanted}
        except (OSError, AttributeError):
            continue
        for name, address in symbols.items():
            llvm.add_symbol(name, address)
        return True
    for name in wanted:  # the machine code is the same, and calls them only when it runs on several threads.
        llvm.add_symbol(name, ctypes.cast(ctypes.pythonapi.Py_FatalError, ctypes.c_void_p).value)
    return False


HAS_OPENMP = _find_openmp()


def num_threads() -> int:
    """Threads a kernel runs on: torch's, as set by torch.set_num_threads, OMP_NUM_THREADS or the CPU affinity."""
    return torch.get_num_threads() if HAS_OPENMP else 1


def threads_for(nanoseconds: float) -> int:
    """Threads for work that takes one thread so long: all, or one where waking the others does not pay."""
    return num_threads() if nanoseconds >= wake.PAYS and not wake.stays_calm(nanoseconds) else 1


def _is_forked() -> bool:
    """Whether this process is a fork, perhaps one made before Quire was imported; known on Linux only."""
    try:
        flags = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6]
    except (OSError, IndexError):
        return False
    forked_without_exec = 0x40
    return bool(int(flags) & forked_without_exec)


_forked = _is_forked()
_younger_thread: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    global _forked, _younger_thread
    _forked, _younger_thread = True, None


os.register_at_fork(after_in_child=_after_fork)


def _run_on_younger_thread(entry: Callable[..., Any], *args: Any) -> Any:
    """Run on a thread that was started after the fork.

    OpenMP remembers a team of threads for each thread that led one. A forked child's main thread keeps that memory, but
    the team's threads do not exist in the child, so that OpenMP would wait for them for ever. A thread that was started
    after the fork has no team yet.
    """
    global _younger_thread
    if _younger_thread is None:
        _younger_thread = ThreadPoolExecutor(1, "quire-kernels")
    return _younger_thread.submit(entry, *args).result()


@intrinsic
def parallel_for(typingctx: Any, body: Any, threads: Any, count: Any, arguments: Any) -> Any:
    """Call ``body(i, *arguments)`` for i in range(count) on ``threads`` OpenMP threads.

    Emits what a C compiler makes of ``#pragma omp parallel``: the arguments go into a struct on the stack,
    and each thread takes i = its number, its number + threads, ….
    """
    body_args = (types.int64, *arguments.types)
    body_signature = typingctx.resolve_function_type(body, body_args, {})

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, threads_value, count_value, arguments_value = args
        compiled = body.dispatcher.overloads[tuple(body_args)]
        context.active_code_library.add_linking_library(compiled.library)
        packed_type = ir.LiteralStructType([count_value.type, arguments_value.type])
        thread_main = _emit_thread_main(
            context, builder.module, packed_type, arguments, body_signature, compiled
        )

        packed = cgutils.alloca_once(builder, packed_type)
        builder.store(count_value, cgutils.gep_inbounds(builder, packed, 0, 0))
        builder.store(arguments_value, cgutils.gep_inbounds(builder, packed, 0, 1))
        void_pointer = builder.bitcast(packed, cgutils.voidptr_t)
        _emit_fork(builder, thread_main, void_pointer, threads_value)
        return context.get_dummy_value()

    return types.void(body, types.int64, types.int64, arguments), codegen


def _emit_fork(builder: Any, thread_main: Any, packed: Any, threads: Any) -> None:
    zero, one = ir.Constant(ir.IntType(64), 0), ir.Constant(ir.IntType(64), 1)
    i32, module = ir.IntType(32), builder.module
    fork_type = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, cgutils.voidptr_t, i32, i32])
    number_type = ir.FunctionType(i32, [])
    trampoline = ir.Function(
        module,
        ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t]),
        module.get_unique_name("quire_omp_thread"),
    )
    trampoline.linkage = "internal"
    inner = ir.IRBuilder(trampoline.append_basic_block())
    numbers = [
        inner.sext(inner.call(cgutils.get_or_insert_function(module, number_type, name), []), ir.IntType(64))
        for name in ("omp_get_thread_num", "omp_get_num_threads")
    ]
    inner.call(thread_main, [trampoline.args[0], *numbers])
    inner.ret_void()
    with builder.if_else(builder.icmp_signed("<=", threads, one)) as (serial, parallel):
        with serial:
            builder.call(thread_main, [packed, zero, one])
        with parallel:
            fork = cgutils.get_or_insert_function(module, fork_type, "GOMP_parallel")
            entry = builder.bitcast(trampoline, cgutils.voidptr_t)
            builder.call(fork, [entry, packed, builder.trunc(threads, i32), ir.Constant(i32, 0)])


def _emit_thread_main(
    context: Any, module: Any, packed_type: Any, arguments: Any, body_signature: Any, compiled: Any
) -> Any:
    """``void f(packed*, first, step)``: the loop one thread runs."""
    i64 = ir.IntType(64)
    function = ir.Function(
        module,
        ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i64, i64]),
        module.get_unique_name("quire_thread_main"),
    )
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    packed, first, step = function.args
    fields = builder.bitcast(packed, packed_type.as_pointer())
    count = builder.load(cgutils.gep_inbounds(builder, fields, 0, 0))
    values = builder.load(cgutils.gep_inbounds(builder, fields, 0, 1))
    unpacked = cgutils.unpack_tuple(builder, values, len(arguments.types))
    with cgutils.for_range_slice(builder, first, count, step, intp=i64) as (index, _):
        context.call_internal_no_propagate(builder, compiled.fndesc, body_signature, [index, *unpacked])
    builder.ret_void()
    return function


_entries: dict[tuple[Any, tuple[int, ...]], Callable[..., Any]] = {}


def run(function: Any, config: tuple[int, ...], threads: int, nanoseconds: float, *args: Any) -> Any:
    """Run a kernel's machine code for a Config on so many threads, compiling it first if need be.

    A kernel's other arguments have one type each (ints, and tuples of ints and floats), so the Config alone
    says which code. A call on one thread does not enter OpenMP: it wakes no thread and leaves none spinning.

    nanoseconds: what the work takes one thread, by estimate (``wake``).
    """
    entry = _entries.get((function, config))
    if entry is None:
        entry = _entries[function, config] = machine_code(function, config, threads, *args)
    if threads == 1:
        return entry(config, 1, *args)
    if _forked and threading.current_thread() is threading.main_thread():
        return _run_on_younger_thread(entry, config, threads, *args)
    began = time.perf_counter_ns()
    result = entry(config, threads, *args)
    wake.note(nanoseconds, time.perf_counter_ns() - began)
    return result
