"""What Triton works out anew for every value that it interprets, worked out once for each shape and dtype.

The interpreter's time is that of Triton's own Python: its types of tuples, of blocks and of NumPy. None of them depends
on a value, so the results are those of before, and an interpreted kernel takes two thirds of the time.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter as stock


def install() -> None:
    """Replace these parts in this process."""
    core.tuple.__init__ = _tuple_init
    core.tuple.type = _TupleType()
    core.block_type.__init__ = _block_init
    core.tensor.__init__ = _tensor_init
    stock._get_np_dtype = _np_dtype


class _TupleType:
    """The type of a ``tl.tuple``, made when someone asks for it: shapes are tuples, and nobody asks theirs."""

    def __get__(self, owner: Any, _: Any = None) -> Any:
        if owner is None:
            return self
        if "type" not in owner.__dict__:
            owner.__dict__["type"] = core._type_for_tuple_values(owner.values)
        return owner.__dict__["type"]

    def __set__(self, owner: Any, value: Any) -> None:
        owner.__dict__["type"] = value


def _tuple_init(self: Any, args: Any, type: Any = None) -> None:
    self.values = [*args]
    if type is not None:
        self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)


_blocks: dict[tuple[str, tuple[int, ...]], tuple[Any, int, str]] = {}  # by dtype and shape
_original_block_init = core.block_type.__init__


def _block_init(self: Any, element_ty: Any, shape: Any) -> None:
    key = element_ty.name, tuple([core._unwrap_if_constexpr(size) for size in shape])
    known = _blocks.get(key)
    if known is None:  # checked as ever: a shape that is refused is never known
        _original_block_init(self, element_ty, shape)
        _blocks[key] = self.shape, self.numel, self.name
    else:
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known


@functools.cache
def _shape_of_tensor(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """A tensor's shape and its number of elements, as constants."""
    numel = 1
    for size in sizes:
        numel *= size
    return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(numel)


def _tensor_init(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = _shape_of_tensor(tuple(type.shape) if type.is_block() else ())


_np_dtypes: dict[str, Any] = {}
_original_np_dtype = stock._get_np_dtype


def _np_dtype(dtype: Any) -> Any:
    """The NumPy dtype that a Triton type's values are kept in."""
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    known = _np_dtypes.get(scalar.name)
    if known is None:
        known = _np_dtypes[scalar.name] = _original_np_dtype(dtype)
    return known
