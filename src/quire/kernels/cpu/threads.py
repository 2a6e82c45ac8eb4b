"""How a CPU kernel is specialised, compiled, cached on disk and run on all cores.

A kernel is an ordinary module-level Numba function whose first argument is a ``Config``: a value that is all
type, so that ``config.head_dim`` is a compile-time number and loops over it unroll. It is compiled once per
Config and found on disk by later processes; the cache key holds a digest of this package's sources, so that
an edited or upgraded kernel is never mistaken for an old one.

Workers run on the OpenMP threads that torch already keeps: a second pool would fight with the first for the
same cores, each spinning while the other works. Whatever sets torch's number of threads sets the kernels'.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding as llvm
import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import impl_ret_untracked, lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, intrinsic, models, register_model, typeof_impl, unbox

from quire.kernels import compile as compiler
from quire.kernels.compile import OPTIONS, compiled, machine_code
from quire.kernels.cpu.attend.config import Config

AnyConfig = TypeVar("AnyConfig", bound=tuple[int, ...])


@functools.cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.rglob("*.py")), Path(compiler.__file__)):
        digest.update(path.read_bytes())
    digest.update(repr((sorted(OPTIONS.items()), HAS_OPENMP)).encode())
    return digest.hexdigest()


class ConfigType(types.Type):
    """The Numba type of one Config."""

    def __init__(self, config: tuple[int, ...], sources: str) -> None:
        self.config = config
        super().__init__(f"quire_{type(config).__name__}{tuple(config)}@{sources}")


@register_model(ConfigType)
class _ConfigModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: ConfigType) -> None:
        super().__init__(manager, fe_type, ir.IntType(8))


def compile_time(config_class: type[AnyConfig]) -> type[AnyConfig]:
    """Make a NamedTuple's values Configs: all type, every field and property a number known to the compiler."""
    typeof_impl.register(config_class)(lambda value, context: ConfigType(value, _sources_digest()))
    return config_class


compile_time(Config)


@unbox(ConfigType)
def _unbox_config(typ: ConfigType, value: Any, context: Any) -> Any:
    return NativeValue(context.context.get_constant(types.int8, 0))


@infer_getattr
class _ConfigAttributes(AttributeTemplate):
    key = ConfigType

    def generic_resolve(self, config: ConfigType, field: str) -> Any:
        return types.literal(getattr(config.config, field))


@lower_getattr_generic(ConfigType)
def _lower_config_field(context: Any, builder: Any, typ: ConfigType, value: Any, field: str) -> Any:
    constant = context.get_constant(types.int64, getattr(typ.config, field))
    return impl_ret_untracked(context, builder, types.int64, constant)


# --- threads ---------------------------------------------------------------------------------------------


def _find_openmp() -> bool:
    """Make torch's own OpenMP runtime visible to the kernels; False where it has none we can call."""
    wanted = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    for candidate in [*map(str, libraries), None]:  # None: what the process has loaded already
        try:
            library = ctypes.CDLL(candidate)
            symbols = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in wanted}
        except (OSError, AttributeError):
            continue
        for name, address in symbols.items():
            llvm.add_symbol(name, address)
        return True
    return False


HAS_OPENMP = _find_openmp()


def num_threads() -> int:
    """Threads a kernel runs on: torch's, as set by torch.set_num_threads, OMP_NUM_THREADS or the CPU affinity."""
    return torch.get_num_threads() if HAS_OPENMP else 1


def _is_forked() -> bool:
    """Whether this process began as another's copy, perhaps before Quire was imported; known on Linux only."""
    try:
        flags = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6]
    except (OSError, IndexError):
        return False
    forked_without_exec = 0x40
    return bool(int(flags) & forked_without_exec)


_forked = _is_forked()
_stand_in: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    global _forked, _stand_in
    _forked, _stand_in = True, None


os.register_at_fork(after_in_child=_after_fork)


def _run_on_stand_in(entry: Callable[..., None], *args: Any) -> None:
    """Run on a thread that began after the fork.

    A forked child's main thread is the copy of one that may have led a team of OpenMP threads. The team was not
    copied, but OpenMP believes in it and would wait for it for ever; a younger thread founds its own.
    """
    global _stand_in
    if _stand_in is None:
        _stand_in = ThreadPoolExecutor(1, "quire-kernels")
    _stand_in.submit(entry, *args).result()


@intrinsic
def parallel_for(typingctx: Any, body: Any, threads: Any, count: Any, arguments: Any) -> Any:
    """Call ``body(i, *arguments)`` for i in range(count) on ``threads`` OpenMP threads.

    Emits what a C compiler makes of ``#pragma omp parallel``: the arguments go into a struct on the stack,
    and each thread walks i = its number, its number + threads, ….
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
    if not HAS_OPENMP:
        builder.call(thread_main, [packed, zero, one])
        return
    i32 = ir.IntType(32)
    module = builder.module
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


# --- compiling -------------------------------------------------------------------------------------------

kernel = compiled  # a kernel that Python calls: compiled on first use, kept on disk, run without the GIL


def part(function: Callable[..., Any]) -> Any:
    """Mark a piece that only kernels call: compiled into them, without a door to Python or disk of its own."""
    return numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)


@kernel
def addresses(page_table: Any, numbers: Any, lists: Any) -> tuple[int, int, int]:
    """Where a plan's arrays lie: one call, where NumPy takes one per array at four times the price."""
    return page_table.ctypes.data, numbers.ctypes.data, lists.ctypes.data


_compiled: dict[tuple[Any, tuple[int, ...]], Callable[..., None]] = {}


def run(function: Any, config: tuple[int, ...], threads: int, *args: Any) -> None:
    """Run a kernel's machine code for a Config on so many threads, compiling it first if need be.

    A kernel's other arguments have one type each (ints, and tuples of ints and floats), so the Config alone
    says which code.
    """
    entry = _compiled.get((function, config))
    if entry is None:
        entry = _compiled[function, config] = machine_code(function, config, threads, *args)
    if _forked and threads > 1 and threading.current_thread() is threading.main_thread():
        _run_on_stand_in(entry, config, threads, *args)
    else:
        entry(config, threads, *args)
