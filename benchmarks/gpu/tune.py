"""A sweep over tile shapes, warps, stages and workers of the Triton kernels, on a few cases.

The seam to the kernels is their table, ``quire.kernels.triton.tune``: its functions ``decode_tile`` and
``prefill_tile`` give a named tuple, some fields of which are replaced while a candidate is tried.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.gpu.device import Device
from benchmarks.gpu.jobs import Job, Row, Setting
from benchmarks.gpu.speed import portable_prefill, time_attention

CANDIDATES: dict[str, dict[str, list[int]]] = {
    "decode": {
        "kv_tokens": [32, 64, 128],
        "num_warps": [2, 4, 8],
        "num_stages": [2, 3, 4],
        "workers_per_sm": [1, 2, 3],
    },
    "prefill": {
        "rows": [64, 128],
        "kv_tokens": [32, 64, 128],
        "num_warps": [4, 8],
        "num_stages": [2, 3],
        "workers_per_sm": [1, 2],
    },
}
CASES = {"decode": ["8x1k:1", "8x4k:1", "8x32k:1"], "prefill": ["1x8k:8k"]}
QUICK_CASES = {"decode": ["2x64:1"], "prefill": ["1x48:48"]}


def settings_of(kernel: str, chosen: dict[str, list[int]] | None = None) -> list[dict[str, int]]:
    """All combinations of a kernel's candidates."""
    lists = CANDIDATES[kernel] if chosen is None else chosen
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def jobs(
    kind: str,
    chosen: dict[str, list[int]] | None,
    quick: bool,
    kernels: tuple[str, ...] = ("decode", "prefill"),
    kv_dtypes: tuple[str | None, ...] = (None,),
) -> list[Job]:
    """One job per candidate and case: of kind "compile", which fills the kernel cache, or "tune", which measures."""
    found = []
    for kernel, kv_dtype in itertools.product(kernels, kv_dtypes):
        cases = (QUICK_CASES if quick else CASES)[kernel]
        for settings in settings_of(kernel, chosen):
            for case in cases[: 1 if kind == "compile" else None]:
                title = f"{kernel} {case} {kv_dtype or 'bf16'} " + " ".join(
                    f"{k}={v}" for k, v in settings.items()
                )
                arguments = {"kernel": kernel, "settings": settings, "case": case, "kv_dtype": kv_dtype}
                found.append(Job(kind, title, arguments, seconds=4 if kind == "compile" else 1, timeout=60))
    return found


@contextmanager
def override(setting: Setting, kernel: str, settings: dict[str, int]) -> Iterator[None]:
    """Plans made inside use these fields of the kernel's tile instead of the table's."""
    table = importlib.import_module(f"quire.kernels.{setting.backend}.tune")
    shipped = getattr(table, f"{kernel}_tile")

    def changed(*arguments: Any) -> Any:
        return shipped(*arguments)._replace(**settings)

    with patch.object(table, f"{kernel}_tile", changed), portable_prefill(setting):
        yield


def compile_candidate(device: Device, setting: Setting, **arguments: Any) -> list[Row]:
    """Compile and run once, for the cache on disk; many processes at once."""
    return _run(device, setting, timed=False, **arguments)


def time_candidate(device: Device, setting: Setting, **arguments: Any) -> list[Row]:
    """Judge and time one candidate."""
    return _run(device, setting, timed=True, **arguments)


def _run(
    device: Device,
    setting: Setting,
    *,
    timed: bool,
    kernel: str,
    settings: dict[str, int],
    case: str,
    kv_dtype: str | None,
    heads: str = "32/8x128",
) -> list[Row]:
    with override(setting, kernel, settings):
        rows = time_attention(device, setting, case=case, heads=heads, kv_dtype=kv_dtype, timed=timed)
    columns = {"who": " ".join(f"{name}={value}" for name, value in settings.items())}
    return [row | columns for row in rows] if timed else []
