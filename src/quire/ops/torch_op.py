"""How Quire's operators become torch operators.

Their results are arguments (``Tensor(a!) out``) written in place: a compiled graph plans the memory, one operator
serves with and without each optional result, and the fake implementation has nothing to compute. ``Library``
costs 2 µs a call where ``torch.library.custom_op`` costs 20.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch.compiler import is_compiling

from quire.kernels.call import Scoring

# Of the operators that attend: what follows their outputs in the schema.
_SCHEMA_TYPES: dict[Any, str] = {float: "float", float | None: "float?", torch.Tensor | None: "Tensor?"}
SCORING = ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in get_type_hints(Scoring).items())
_library = torch.library.Library("quire", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(name: str, arguments: str, implementation: Callable[..., None]) -> None:
    """Make ``torch.ops.quire.<name>(arguments) -> ()`` run ``implementation`` on every device."""
    _library.define(f"{name}({arguments}) -> ()")  # type: ignore[no-untyped-call]
    _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"quire::{name}", _writes_in_place, lib=_library)


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether somebody has to see a call as an operator: a compiler, a mode, a profiler, a tensor that only pretends.

    If nobody has to, the implementation can be called itself, which saves the way through torch: 5 µs a call.
    """
    return (
        is_compiling()
        or type(tensor) not in _PLAIN
        or _active_modes() > 0
        or _active_transform() is not None
        or _profiler_enabled()
    )


# Looked up once: each is asked at every call.
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_active_modes = torch._C._len_torch_dispatch_stack
_active_transform = torch._C._functorch.peek_interpreter_stack
_profiler_enabled = torch._C._autograd._profiler_enabled


def _writes_in_place(*args: Any) -> None:
    """Every result's shape is known without running the operator: it is an argument."""
