"""CUDA graphs of a whole step against plain launches, and the memory checker."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from functools import partial

import torch

import quire
from benchmarks.cases import Case
from benchmarks.gpu.batches import make_batch
from benchmarks.gpu.checks import check_batch, forms
from benchmarks.gpu.device import Device, make_device
from benchmarks.gpu.jobs import Row, Setting
from benchmarks.gpu.speed import describe, parse_spec

LAYERS = 3


def check_graph(
    device: Device, setting: Setting, *, kv_dtype: str | None = None, title: str = ""
) -> list[Row]:
    """A step of several layers, each storing its keys and attending, replayed from a graph: the bits of eager."""
    spec = parse_spec("32/8x128", 16, "bfloat16", kv_dtype)
    lengths = [(n, q) for n, q in forms(setting.seed, setting.quick)["mixed"] if n >= q]
    batch = make_batch(spec, lengths, device.where, setting.seed)
    pool = quire.KVPool(spec, LAYERS, batch.k_pages.shape[1], device.where)
    pool.poison(range(pool.num_pages))
    plan = quire.plan(*batch.lengths, spec, backend=setting.backend, device=device.where)
    slots = _slots_of_all_tokens(batch.page_table, batch.seq_lens, spec.page_size).to(device.where)
    keys, values = torch.randn(
        2, LAYERS, len(slots), spec.num_kv_heads, spec.head_dim, device=device.where
    ).to(spec.dtype)
    hidden = [batch.q.clone()] + [torch.full_like(batch.q, math.nan) for _ in range(LAYERS)]

    def step() -> None:
        for i in range(LAYERS):
            scales = {} if pool.k_scale is None else {"k_scale": pool.k_scale[i], "v_scale": pool.v_scale[i]}
            quire.write_kv(keys[i], values[i], *pool.layer(i), slots, backend=setting.backend, **scales)
            plan.run(hidden[i], *pool.layer(i), out=hidden[i + 1], **scales)

    row = describe(Case(title, (), (), spec)) | {"who": setting.backend}
    try:
        replay = device.capture([step])
    except Exception as error:
        captured = f"no graph: {type(error).__name__}: {str(error)[:200]}"
        return [
            row | {"status": "failed" if device.where.type == "cuda" else "unavailable", "note": captured}
        ]
    wrong = []
    for seed in range(2):  # the second time on other numbers in the same memory
        torch.manual_seed(setting.seed + seed)
        for tensor in (hidden[0], keys, values):
            tensor.normal_()
        results = []
        for run in (step, replay):
            for out in hidden[1:]:
                out.fill_(math.nan)
            run()
            device.synchronize()
            results.append(torch.stack(hidden[1:]))
        if not results[0].isfinite().all():
            wrong.append("plain launches gave NaN")
        if not torch.equal(*results):
            wrong.append(f"replay {seed} differs in {int((results[0] != results[1]).sum())} elements")
    return [row | {"status": "wrong" if wrong else "ok", "note": "; ".join(wrong)}]


def _slots_of_all_tokens(page_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int) -> torch.Tensor:
    slots = []
    for row, seq_len in enumerate(seq_lens.tolist()):
        token = torch.arange(seq_len)
        slots.append(page_table[row].long()[token // page_size] * page_size + token % page_size)
    return torch.cat(slots)


def check_memory(device: Device, setting: Setting, *, seconds: float, title: str = "") -> list[Row]:
    """compute-sanitizer's memcheck over one small mixed step, in a process of its own."""
    tool = shutil.which("compute-sanitizer")
    row: Row = {"case": title, "who": setting.backend}
    if tool is None:
        return [row | {"status": "unavailable", "note": "compute-sanitizer is not on the PATH"}]
    command = [
        tool, "--tool", "memcheck", "--error-exitcode", "9",
        sys.executable, "-m", "benchmarks.gpu.graphs", setting.device, setting.backend,
    ]  # fmt: skip
    own_allocations = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=own_allocations
        )
    except subprocess.TimeoutExpired:
        return [row | {"status": "unavailable", "note": f"not finished within {seconds:.0f} s"}]
    print(done.stdout[-4000:], done.stderr[-4000:])
    last = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    note = (last or [done.stderr.strip()[-200:] or done.stdout.strip()[-200:]])[-1].strip("= ")
    return [row | {"status": "ok" if done.returncode == 0 and last else "wrong", "note": note}]


def small_step(device: str, backend: str) -> None:
    """What the memory checker watches: the store, decode and prefill on one poisoned batch, judged."""
    chosen = make_device(device)
    spec = parse_spec("8/2x128", 16, "bfloat16", None)
    lengths = [(300, 1), (0, 1), (75, 20), (33, 33)]
    batch = make_batch(spec, lengths, chosen.where, seed=1)
    rows = torch.randn(40, spec.num_kv_heads, spec.head_dim, device=chosen.where).to(spec.dtype)
    pool = quire.KVPool(spec, 1, 5, chosen.where)
    write = partial(quire.write_kv, rows, rows, *pool.layer(0), backend=backend)
    write(torch.arange(79, 39, -1, device=chosen.where))
    verdict = check_batch(batch, backend)
    print(verdict)
    if not verdict.good:
        raise SystemExit("wrong result under the memory checker")


if __name__ == "__main__":
    small_step(*sys.argv[1:])
