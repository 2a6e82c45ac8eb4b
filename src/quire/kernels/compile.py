"""Numba's compiler as Quire uses it, and the machine code that it keeps on disk. Importing this imports Numba.

``compiled`` functions are called by Python or by other compiled functions, ``part`` functions by compiled ones only. A
function that takes a ``compile_time`` tuple is compiled once per value of it.

Compiled functions inline one another across files, so that no file can tell by itself whether its machine code is old.
Machine code is therefore kept in one folder for each state of all sources, named by their digest. The folders lie below
``quire/kernels`` in ``NUMBA_CACHE_DIR`` where that is set, else in the user's cache folder (``$XDG_CACHE_HOME`` or
``~/.cache`` on Linux). A new folder removes all but the KEPT_FOLDERS used last. Every entry is a file that is renamed
into place, so that any number of processes may write at once. Where nothing can be written or no sources can be read,
every process compiles anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.core.compiler import CompileResult
from numba.core.imputils import impl_ret_untracked, lower_getattr_generic
from numba.core.serialize import dumps
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, intrinsic, models, register_model, typeof_impl, unbox
from numba.misc.appdirs import AppDirs

from quire.kernels.pipeline import ConfigType, KernelCompiler, PartCompiler

OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function on first use, keep it on disk, and run it without the GIL."""
    dispatcher = numba.njit(pipeline_class=KernelCompiler, **OPTIONS)(function)
    if Path(function.__code__.co_filename).is_relative_to(PACKAGE):  # the digest knows what it may inline
        dispatcher._cache = _MachineCode(function)
    return dispatcher


def part(function: Callable[..., Any]) -> Any:
    """Compile a function into the compiled functions that call it; Python cannot call it."""
    without = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}
    return numba.njit(pipeline_class=PartCompiler, **without, **OPTIONS)(function)


def machine_code(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """What a compiled function runs for arguments of these types, and must then be given no others.

    Numba's own dispatch, which looks at the type of every argument, is left out.
    Cost: seconds to compile, milliseconds from disk; its calls then cost about a microsecond.
    """
    signature = signature_of(*arguments)
    dispatcher: Any = function
    dispatcher.compile(signature)
    code: Callable[..., Any] = dispatcher.overloads[signature].entry_point
    return code


def signature_of(*arguments: Any) -> tuple[Any, ...]:
    """The types that a function is compiled for."""
    return tuple(numba.typeof(value) for value in arguments)


def is_ready(function: Any, *arguments: Any) -> bool:
    """Whether the machine code for arguments of these types is in this process or on disk."""
    signature = signature_of(*arguments)
    return signature in function.overloads or function._cache.holds(signature, function.targetctx.codegen())


# --- numbers known to the compiler -----------------------------------------------------------------------

AnyConfig = TypeVar("AnyConfig", bound=tuple[int, ...])


@register_model(ConfigType)
class _ConfigModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: ConfigType) -> None:
        super().__init__(manager, fe_type, ir.IntType(8))


def compile_time(config_class: type[AnyConfig]) -> type[AnyConfig]:
    """Make every value of a NamedTuple a type of its own.

    Its fields and properties are then numbers known to the compiler, and loops over them unroll.
    """
    typeof_impl.register(config_class)(lambda value, context: ConfigType(value))
    return config_class


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


# --- single elements in memory ---------------------------------------------------------------------------


def scalar_load(element: Any, result: Any, convert: Callable[[Any, Any], Any] | None = None) -> Any:
    """An intrinsic that reads one element of an LLVM type at an address and returns it as the Numba type ``result``."""

    def load_one(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loaded = builder.load(builder.inttoptr(args[0], element.as_pointer()))
            return loaded if convert is None else convert(builder, loaded)

        return result(types.int64), codegen

    return intrinsic(load_one)


_i64 = ir.IntType(64)
load_i64 = scalar_load(_i64, types.int64)
load_i32 = scalar_load(ir.IntType(32), types.int64, lambda builder, value: builder.sext(value, _i64))


# --- machine code on disk --------------------------------------------------------------------------------

PACKAGE = Path(__file__).parents[1]
ROOMS = ("kernels", "planning")  # where compiled functions are, with all that they import but floor 0
KEPT_FOLDERS = 8
_DIGEST = 32  # bytes of the SHA-256 before an entry's content
_LONGEST_WRITE = 3600.0  # seconds


def digest_of(package: Path) -> str | None:
    """A digest of all that decides what compiled functions become; None where there are no sources to read.

    That is every source file that a compiled function can see, the versions of Python, Numba and LLVM, and the
    options. The CPU is in the key of each entry.
    """
    rooms = (path for room in ROOMS for path in (package / room).rglob("*.py"))
    sources = sorted([*package.glob("*.py"), *rooms])
    if not sources:
        return None
    versions = numba.__version__, llvmlite.__version__, sys.version
    digest = hashlib.sha256(repr((versions, sorted(OPTIONS.items()))).encode())
    for path in sources:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:32]


SOURCES = digest_of(PACKAGE)  # on import: later the files may be others than those that were imported


@functools.cache
def cache_folder() -> Path | None:
    """Where machine code of these sources is kept, marked as used now; it need not exist. None: nowhere."""
    if numba.config.CACHE_DIR:
        root = Path(numba.config.CACHE_DIR).absolute() / "quire"
    else:
        root = Path(AppDirs("quire", appauthor=False).user_cache_dir)
    if SOURCES is None or not root.is_absolute():  # it is relative for a user without a home
        return None
    folder = root / "kernels" / SOURCES
    with contextlib.suppress(OSError):
        os.utime(folder)
    return folder


def _make_folder(folder: Path) -> None:
    """Make a folder. If it is new, remove all beside it but those used last."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        others = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in others[:-KEPT_FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)


def can_keep() -> bool:
    """Whether this process can leave machine code for others."""
    folder = cache_folder()
    if folder is None:
        return False
    try:
        _make_folder(folder)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


class _MachineCode(FunctionCache):
    """The machine code of one function on disk: a file for each signature and CPU."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._py_func = function

    @property
    def cache_path(self) -> str | None:
        folder = cache_folder()
        return None if folder is None else str(folder)

    def _file(self, signature: Any, codegen: Any) -> Path | None:
        folder = cache_folder()
        if folder is None:
            return None
        function = self._py_func
        place = function.__module__, function.__code__.co_firstlineno
        key = place, self._index_key(signature, codegen)  # types, CPU, byte code, and what a closure holds
        digest = hashlib.sha256(repr(key).encode()).hexdigest()
        return folder / f"{function.__qualname__}-{digest[:32]}.nbc"

    def holds(self, signature: Any, codegen: Any) -> bool:
        """Whether there is a file for this signature; whether it is sound shows when it is loaded."""
        file = self._file(signature, codegen)
        return file is not None and file.is_file()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        file = self._file(sig, target_context.codegen())
        if file is None:
            return None
        try:
            content = file.read_bytes()
        except OSError:
            return None
        if (
            hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]
        ):  # damaged: it could end the process
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(content[_DIGEST:]))

    def save_overload(self, sig: Any, data: Any) -> None:
        file = self._file(sig, data.codegen)
        if file is None or data.library.has_dynamic_globals:  # addresses that hold in this process alone
            return
        unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
        try:
            _make_folder(file.parent)
            content = dumps(data._reduce())
            unfinished.write_bytes(hashlib.sha256(content).digest() + content)
            unfinished.replace(file)
            for other in file.parent.glob(f"{file.name}.*"):  # of processes that ended while they wrote
                if other.stat().st_mtime < time.time() - _LONGEST_WRITE:
                    other.unlink()
        except OSError:  # nowhere to write, or no room
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def flush(self) -> None:
        """Nothing to forget: a folder serves one state of the sources."""
