"""Time: ceilings of the device, attention over pages, and the store."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

import quire
from benchmarks.cases import Case, parse_case, parse_heads
from benchmarks.gpu.device import Device, host_cost, measure
from benchmarks.gpu.jobs import Row, Setting
from benchmarks.gpu.layers import Layers, layers_beyond_cache, make_layers


def parse_spec(heads: str, page_size: int, dtype: str, kv_dtype: str | None) -> quire.AttentionSpec:
    """A spec from "32/8x128" and names of dtypes."""
    return quire.AttentionSpec(*parse_heads(heads), page_size, getattr(torch, dtype), kv_dtype)  # type: ignore[arg-type]


def describe(case: Case, label: str | None = None) -> Row:
    """The columns that say what was measured."""
    spec = case.spec
    return {
        "case": label or case.name,
        "heads": f"{spec.num_qo_heads}/{spec.num_kv_heads}x{spec.head_dim}",
        "page_size": spec.page_size,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "kv_dtype": spec.kv_dtype or "",
    }


def work(case: Case) -> Row:
    """Bytes of keys and values (and their scales) read once, and floating-point operations."""
    return {"kv_bytes": case.kv_bytes, "flops": case.flops}


def time_attention(
    device: Device,
    setting: Setting,
    *,
    case: str,
    heads: str = "32/8x128",
    page_size: int = 16,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    label: str | None = None,
    timed: bool = True,
) -> list[Row]:
    """Quire on one case: judged first, then timed."""
    parsed = parse_case(case, parse_spec(heads, page_size, dtype, kv_dtype))
    layers = make_layers(parsed, device.where, setting.seed, layers_beyond_cache(parsed, device.cache_bytes))
    return [describe(parsed, label) | time_quire(device, setting, layers, timed)]


@contextmanager
def portable_prefill(setting: Setting) -> Iterator[None]:
    """Plans made inside use the portable prefill kernel on every chip, as they would without Hopper's."""
    if setting.backend != "triton":
        yield
        return
    hopper = importlib.import_module("quire.kernels.triton.hopper")
    with patch.object(hopper, "why_not", lambda *_: "the portable kernel is measured"):
        yield


def time_portable(device: Device, setting: Setting, **arguments: Any) -> list[Row]:
    """``time_attention`` with the portable prefill kernel."""
    with portable_prefill(setting):
        return time_attention(device, setting, **arguments)


def compile_kernels(
    device: Device, setting: Setting, *, portable: bool = False, **arguments: Any
) -> list[Row]:
    """Run a case once, so that its kernels lie compiled on disk when it is timed; only failures make a row."""
    time_any = time_portable if portable else time_attention
    return [row for row in time_any(device, setting, **arguments, timed=False) if row["status"] != "ok"]


def time_quire(device: Device, setting: Setting, layers: Layers, timed: bool = True) -> Row:
    """Columns of one row; a wrong result has no time."""
    case = layers.case

    def make_plan() -> quire.AttentionPlan:
        return quire.plan(
            *layers.lengths[:2], case.spec, layers.cu_seqlens_q, backend=setting.backend, device=device.where
        )

    plan = make_plan()
    out = torch.full_like(layers.q, math.nan)
    calls = [
        partial(plan.run, layers.q, *layers.pool.layer(i), out=out, **layers.scales(i))
        for i in range(layers.pool.num_layers)
    ]
    calls[-1]()
    verdict = layers.judge(layers.pool.num_layers - 1, out)
    row: Row = {"who": "quire", **work(case), **verdict.columns()}
    if not verdict.good:
        return row | {"status": "wrong", "note": "differs from the float64 reference; not timed"}
    if not timed:
        return row | {"status": "ok"}
    print(plan.explain())
    timing = measure(device, calls)
    planner = quire.Planner(
        case.spec, max_batch=len(case.seq_lens), max_seq_len=max(case.seq_lens), max_q_len=max(case.q_lens),
        max_tokens=sum(case.q_lens), backend=setting.backend, device=device.where,
    )  # fmt: skip
    planner.plan(*layers.lengths)
    plans = {
        "plan_us": round(host_cost(device, make_plan), 2),
        "replan_us": round(host_cost(device, partial(planner.plan, *layers.lengths)), 2),
    }
    return row | {"status": "ok"} | timing | plans


def time_write_kv(
    device: Device, setting: Setting, *, tokens: int, heads: str, page_size: int, kv_dtype: str | None = None
) -> list[Row]:
    """The store of one step's tokens, into slots all over a pool; bytes read and written, of scales and slots too."""
    spec = parse_spec(heads, page_size, "bfloat16", kv_dtype)
    num_pages = max(math.ceil(tokens / page_size), 1 << 9 if setting.quick else 1 << 13)
    pool = quire.KVPool(spec, 2, num_pages, device.where)
    k, v = torch.randn(2, tokens, spec.num_kv_heads, spec.head_dim, device=device.where).to(spec.dtype)
    slots = torch.randperm(num_pages * page_size, device=device.where)[:tokens]
    calls = []
    for layer in range(2):
        scales: dict[str, Any] = {}
        if pool.k_scale is not None and pool.v_scale is not None:
            scales = {"k_scale": pool.k_scale[layer], "v_scale": pool.v_scale[layer]}
        calls.append(
            partial(quire.write_kv, k, v, *pool.layer(layer), slots, backend=setting.backend, **scales)
        )
    row = describe(Case(f"write_kv {tokens} tokens {kv_dtype or 'bf16'}", (), (), spec))
    read = k[0].nbytes + v[0].nbytes + slots.itemsize
    moved = tokens * (read + spec.num_kv_heads * spec.bytes_per_token)
    return [row | {"who": "quire", "status": "ok", "kv_bytes": moved} | measure(device, calls)]


def time_ceiling(device: Device, setting: Setting, *, what: str) -> list[Row]:
    """What the device can do at best: copy (bytes read and written), read, or multiply."""
    small = setting.quick
    where = device.where
    if what == "gemm":
        size = 256 if small else 8192
        a, b = (torch.randn(size, size, device=where).to(torch.bfloat16) for _ in range(2))
        product = torch.empty_like(a)
        calls, counted = [partial(torch.mm, a, b, out=product)], {"flops": 2 * size**3}
    else:
        nbytes = 1 << (20 if small else 31)
        buffers = [torch.randn(nbytes // 4, device=where) for _ in range(2)]
        if what == "copy":
            calls, counted = [partial(buffers[0].copy_, buffers[1])], {"kv_bytes": 2 * nbytes}
        else:
            total = torch.empty((), device=where)
            calls = [partial(torch.sum, buffer, 0, out=total) for buffer in buffers]
            counted = {"kv_bytes": nbytes}
    return [{"case": what, "who": f"ceiling: {what}", "status": "ok"} | counted | measure(device, calls)]
