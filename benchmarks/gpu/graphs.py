"""CUDA graphs that serve step after step against plain launches, and the memory checker."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

import quire
from benchmarks.cases import Case
from benchmarks.gpu.batches import Batch, make_batch
from benchmarks.gpu.checks import check_batch, forms
from benchmarks.gpu.device import Device, make_device
from benchmarks.gpu.jobs import Row, Setting
from benchmarks.gpu.speed import describe, parse_spec

LAYERS = 3


def check_graph(
    device: Device, setting: Setting, *, kv_dtype: str | None = None, title: str = ""
) -> list[Row]:
    """Several layers, each storing its keys and attending, captured on one step's plan and replayed on others'.

    Every replay must give the bits of plain launches on a plan of that step's own.
    """
    spec = parse_spec("32/8x128", 16, "bfloat16", kv_dtype)
    steps = [[(n, q) for n, q in forms(setting.seed + i, setting.quick)["mixed"] if n >= q] for i in range(3)]
    steps[1] = [(n, 1) for n, _ in steps[1]]  # decodes alone
    tokens = max(sum(q for _, q in step) for step in steps)
    for step in steps:  # a graph has one number of tokens
        step.append((0, tokens - sum(q for _, q in step)))
    batches = [make_batch(spec, step, device.where, setting.seed + i) for i, step in enumerate(steps)]
    work = _Layers(spec, batches, setting, device)
    planner = quire.Planner(
        spec, max_batch=max(map(len, steps)), max_seq_len=max(n for step in steps for n, _ in step),
        max_q_len=tokens, max_tokens=tokens, backend=setting.backend, device=device.where,
    )  # fmt: skip

    row = describe(Case(title, (), (), spec)) | {"who": setting.backend}
    work.take(0, planner.plan(*batches[0].lengths))
    try:
        replay = device.capture([work.run])
    except Exception as error:
        captured = f"no graph: {type(error).__name__}: {str(error)[:200]}"
        return [
            row | {"status": "failed" if device.where.type == "cuda" else "unavailable", "note": captured}
        ]
    wrong = []
    for i in (0, 1, 2, 0):
        work.take(
            i,
            quire.plan(
                *batches[i].lengths[:2],
                spec,
                batches[i].cu_seqlens_q,
                backend=setting.backend,
                device=device.where,
            ),
        )
        plain = work.results(work.run)
        work.plan = planner.plan(*batches[i].lengths)
        replayed = work.results(replay)
        if not plain.isfinite().all():
            wrong.append(f"step {i}: plain launches gave NaN")
        if not torch.equal(plain, replayed):
            wrong.append(f"step {i}: the replay differs in {int((plain != replayed).sum())} elements")
    return [row | {"status": "wrong" if wrong else "ok", "note": "; ".join(wrong)}]


class _Layers:
    """Tensors of a few layers that stay where they are, and the values of one step or another in them."""

    def __init__(
        self, spec: quire.AttentionSpec, batches: list[Batch], setting: Setting, device: Device
    ) -> None:
        self.device, self.backend, self.batches = device, setting.backend, batches
        where = device.where
        self.pool = quire.KVPool(spec, LAYERS, max(batch.k_pages.shape[1] for batch in batches), where)
        self.page_size = spec.page_size
        most = max(int(batch.seq_lens.sum()) for batch in batches)
        self.slots = torch.empty(most, dtype=torch.int64, device=where)
        sizes = (2, LAYERS, most, spec.num_kv_heads, spec.head_dim)
        self.keys, self.values = torch.empty(sizes, dtype=spec.dtype, device=where)
        self.hidden = [torch.empty_like(batches[0].q) for _ in range(LAYERS + 1)]
        self.plan: quire.AttentionPlan

    def take(self, number: int, plan: quire.AttentionPlan) -> None:
        """Fresh numbers for a step and its plan; the pool is poison until the step stores its keys."""
        batch, self.plan = self.batches[number], plan
        self.pool.poison(range(self.pool.num_pages))
        slots = _slots_of_all_tokens(batch.page_table, batch.seq_lens, self.page_size)
        self.slots.fill_(-1)
        self.slots[: len(slots)] = slots.to(self.slots.device)
        for tensor in (self.hidden[0], self.keys, self.values):
            tensor.normal_()

    def run(self) -> None:
        """The step, layer by layer."""
        k_scale, v_scale = self.pool.k_scale, self.pool.v_scale
        for i in range(LAYERS):
            scales = {}
            if k_scale is not None and v_scale is not None:
                scales = {"k_scale": k_scale[i], "v_scale": v_scale[i]}
            pages = self.pool.layer(i)
            quire.write_kv(self.keys[i], self.values[i], *pages, self.slots, backend=self.backend, **scales)
            self.plan.run(self.hidden[i], *pages, out=self.hidden[i + 1], **scales)

    def results(self, run: Callable[[], object]) -> torch.Tensor:
        """Every layer's output, poisoned before."""
        for out in self.hidden[1:]:
            out.fill_(math.nan)
        run()
        self.device.synchronize()
        return torch.stack(self.hidden[1:])


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
    missing = "no GPU is used" if setting.device == "cpu" else "compute-sanitizer is not on the PATH"
    if tool is None or setting.device == "cpu":
        return [row | {"status": "unavailable", "note": missing}]
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
