"""Quire: PagedAttention for PyTorch, in Python.

A KV cache kept in fixed-size pages, and attention that reads the pages in place: on CPUs (Numba) and GPUs
(Triton), with one API and one host planner over both. Each name is loaded on first use: the operators and the pages
with torch and NumPy, kernels when they are first run, and models with transformers. The command line's help and errors
therefore need none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quire.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    ModelError,
    OutOfPages,
    PageStateError,
    QuireError,
    ShapeError,
    UnsupportedError,
    extra_is_missing,
)

if TYPE_CHECKING:
    from quire.engine import LLM, AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams
    from quire.ops.attention import paged_attention
    from quire.ops.attention_plan import AttentionPlan
    from quire.ops.flash_attn import flash_attn_with_kvcache
    from quire.ops.planner import Planner, plan
    from quire.ops.store import write_kv
    from quire.ops.warm_up import warm_up
    from quire.pages import KVPool, PageAllocator, PageTable, PrefixCache
    from quire.spec import AttentionSpec
    from quire.state import SoftmaxState, merge

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  # sorted as sorted() does
    "ArgumentError",
    "AsyncLLM",
    "AttentionPlan",
    "AttentionSpec",
    "BeamSearchParams",
    "DeviceError",
    "DtypeError",
    "KVPool",
    "LLM",
    "ModelError",
    "OutOfPages",
    "PageAllocator",
    "PageStateError",
    "PageTable",
    "Planner",
    "PrefixCache",
    "QuireError",
    "RequestOutput",
    "SamplingParams",
    "ShapeError",
    "SoftmaxState",
    "UnsupportedError",
    "flash_attn_with_kvcache",
    "merge",
    "paged_attention",
    "plan",
    "warm_up",
    "write_kv",
]

_ENGINE = "quire.engine"  # which loads transformers
_HOMES = {
    "AsyncLLM": _ENGINE,
    "AttentionPlan": "quire.ops.attention_plan",
    "AttentionSpec": "quire.spec",
    "BeamSearchParams": _ENGINE,
    "KVPool": "quire.pages",
    "LLM": _ENGINE,
    "PageAllocator": "quire.pages",
    "PageTable": "quire.pages",
    "Planner": "quire.ops.planner",
    "PrefixCache": "quire.pages",
    "RequestOutput": _ENGINE,
    "SamplingParams": _ENGINE,
    "SoftmaxState": "quire.state",
    "flash_attn_with_kvcache": "quire.ops.flash_attn",
    "merge": "quire.state",
    "paged_attention": "quire.ops.attention",
    "plan": "quire.ops.planner",
    "warm_up": "quire.ops.warm_up",
    "write_kv": "quire.ops.store",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if home != _ENGINE:
            raise
        raise extra_is_missing(f"quire.{name}", error) from error
    globals()[name] = value  # found at once from now on, which also a compiled graph of torch's relies on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
