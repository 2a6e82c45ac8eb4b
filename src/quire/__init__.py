"""Quire: PagedAttention for PyTorch, in Python.

A KV cache kept in fixed-size pages, and attention that reads the pages in place: on CPUs (Numba) and GPUs
(Triton), with one API and one host planner over both. Importing it loads torch and NumPy only; kernels and
models are loaded on first use.
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
    hf_is_missing,
)
from quire.ops.attention import paged_attention
from quire.ops.attention_plan import AttentionPlan
from quire.ops.flash_attn import flash_attn_with_kvcache
from quire.ops.planner import Planner, plan
from quire.ops.store import write_kv
from quire.pages import KVPool, PageAllocator, PageTable, PrefixCache
from quire.spec import AttentionSpec
from quire.state import SoftmaxState, merge

if TYPE_CHECKING:
    from quire.engine import LLM, BeamSearchParams, RequestOutput, SamplingParams

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  # sorted as sorted() does
    "ArgumentError",
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
    "write_kv",
]

_FROM_ENGINE = ("BeamSearchParams", "LLM", "RequestOutput", "SamplingParams")  # they load transformers


def __getattr__(name: str) -> Any:
    if name in _FROM_ENGINE:
        try:
            return getattr(importlib.import_module("quire.engine"), name)
        except ModuleNotFoundError as error:
            raise hf_is_missing(f"quire.{name}", error) from error
    raise AttributeError(f"module 'quire' has no attribute {name!r}")
