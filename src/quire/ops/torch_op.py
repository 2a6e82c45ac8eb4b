"""How Quire's operators become torch operators.

Results are arguments (``Tensor(a!) out``) that are written in place: a compiled graph plans their memory, one operator
serves with and without each optional result, and the fake implementation has nothing to compute. A call through
``Library`` costs 2 µs; through ``torch.library.custom_op`` it costs 20.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, get_type_hints

import torch
from torch.compiler import is_compiling

from quire.kernels.call import Scoring

# The scoring arguments in the schemas of paged_attention and run_plan.
_SCHEMA_TYPES: dict[Any, str] = {float: "float", float | None: "float?", torch.Tensor | None: "Tensor?"}
SCORING = ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in get_type_hints(Scoring).items())
_library = torch.library.Library("quire", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(name: str, arguments: str, implementation: Callable[..., None]) -> None:
    """Make ``torch.ops.quire.<name>(arguments) -> ()`` run ``implementation`` on every device."""
    _library.define(f"{name}({arguments}) -> ()")  # type: ignore[no-untyped-call]
    _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"quire::{name}", _writes_in_place, lib=_library)


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether a call must go through torch's dispatcher: for a compiler, a mode, a profiler, or a tensor subclass.

    Otherwise the implementation is called itself, which saves 5 µs a call.
    """
    return (
        is_compiling()
        or type(tensor) not in _PLAIN
        or _active_modes() > 0
        or _active_transform() is not None
        or _profiler_enabled()
    )


def _of_torch(name: str) -> Callable[[], Any]:
    """A private function of torch. Where torch has none of that name, every call counts as watched."""
    try:
        function: Callable[[], Any] = attrgetter(name)(torch._C)
    except AttributeError:
        return lambda: True
    return function


# Looked up once: each is asked at every call.
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_active_modes = _of_torch("_len_torch_dispatch_stack")
_active_transform = _of_torch("_functorch.peek_interpreter_stack")
_profiler_enabled = _of_torch("_autograd._profiler_enabled")


def _writes_in_place(*args: Any) -> None:
    """Every result's shape is known without running the operator: it is an argument."""
