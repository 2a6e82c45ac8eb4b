"""Cases at the edge of ordinary calls: rows without keys, slots outside the pool, odd addresses, streams, graphs."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import torch

import quire
from benchmarks.cases import Case
from benchmarks.gpu.batches import Batch, exact, largest_value, make_batch, plain
from benchmarks.gpu.device import Device
from benchmarks.gpu.jobs import Row, Setting
from benchmarks.gpu.speed import describe, parse_spec
from benchmarks.judge import judge

Complaints = list[str]
HEADS = "8/2x128"


class UnavailableError(Exception):
    """The case needs what this device or backend has not."""


def check_edge(device: Device, setting: Setting, *, what: str, title: str = "") -> list[Row]:
    """One of EDGES."""
    row = describe(Case(title, (), (), parse_spec(HEADS, 16, "bfloat16", None))) | {"who": setting.backend}
    try:
        wrong = EDGES[what](device, setting)
    except UnavailableError as why:
        return [row | {"status": "unavailable", "note": str(why)}]
    return [row | {"status": "wrong" if wrong else "ok", "note": "; ".join(wrong)}]


def _need_cuda(device: Device) -> None:
    if device.where.type != "cuda":
        raise UnavailableError("it needs a CUDA device")


def _attend(batch: Batch, setting: Setting, **rules: Any) -> quire.SoftmaxState:
    plan = quire.plan(
        batch.page_table, batch.seq_lens, batch.spec, batch.cu_seqlens_q,
        backend=setting.backend, device=batch.q.device, **rules,
    )  # fmt: skip
    out = torch.full_like(batch.q, math.nan)
    state: quire.SoftmaxState = plan.run(
        batch.q, *batch.pages, out=out, return_state=True, **batch.scales, **batch.scoring
    )
    return state


def _sinks_without_keys(device: Device, setting: Setting) -> Complaints:
    """out 0 and lse = the sink, in whole tiles, split ones and batch-invariant ones."""
    wrong = []
    for kv_dtype in (None, "int8"):
        spec = parse_spec(HEADS, 16, "bfloat16", kv_dtype)
        batch = make_batch(
            spec,
            [(0, 1), (30, 45), (900, 1), (2500, 2530), (0, 3)],
            device.where,
            setting.seed,
            features=["sinks"],
        )
        blind = [0, *range(1, 16), *range(47, 77), *range(2577, 2580)]
        sinks = batch.scoring["sinks"]
        for batch_invariant in (False, True):
            if batch_invariant and setting.backend == "reference":
                continue
            state = _attend(batch, setting, batch_invariant=batch_invariant)
            name = f"{kv_dtype or 'bfloat16'}{', batch-invariant' if batch_invariant else ''}"
            if not (state.out[blind] == 0).all() or not state.out.isfinite().all():
                wrong.append(f"{name}: out is not 0 where no key is seen")
            if not torch.allclose(state.lse[blind], sinks.expand(len(blind), -1), rtol=1e-6, atol=0):
                wrong.append(f"{name}: lse is not the sink where no key is seen")
    return wrong


def _slots_outside_the_pool(device: Device, setting: Setting) -> Complaints:
    """A pool in the middle of larger tensors: what lies around it stays as it is."""
    if setting.backend != "triton":
        raise UnavailableError("other backends refuse such slots")
    wrong = []
    for kv_dtype in (None, "int8", "fp8_e4m3"):
        spec = parse_spec(HEADS, 16, "bfloat16", kv_dtype)
        around = [torch.full((6, 16, 2, 128), 3.0).to(spec.storage_dtype).to(device.where) for _ in range(2)]
        scales_around = [torch.full((6, 16, 2), 3.0, device=device.where) for _ in range(2)]
        pages = [whole[2:4].permute(2, 0, 1, 3) for whole in around]
        scales = [whole[2:4].permute(2, 0, 1) if spec.quantized else None for whole in scales_around]
        slots = [-1, 5, 32, 33, -16, 10**6, 2**31, 2**62, -(2**62), 31]
        rows = torch.ones(len(slots), 2, 128, dtype=spec.dtype, device=device.where)
        there = torch.tensor(slots, device=device.where)
        quire.write_kv(
            rows, rows, *pages, there, k_scale=scales[0], v_scale=scales[1], backend=setting.backend
        )
        for whole in (*around, *(scales_around if spec.quantized else ())):
            slot_changed = (whole.float() != 3.0).reshape(6 * 16, -1).any(1).nonzero().flatten().tolist()
            if slot_changed != [2 * 16 + 5, 2 * 16 + 31]:
                wrong.append(f"{kv_dtype or 'bfloat16'}: slots {slot_changed} changed")
    return wrong


def _given_scales(device: Device, setting: Setting) -> Complaints:
    """Per tensor and per head: the reference's bits, and attention with them."""
    wrong = []
    for kv_dtype in ("int8", "fp8_e4m3", "fp8_e5m2"):
        for name, k_scale, v_scale in (
            ("per tensor", torch.tensor(0.02), torch.tensor(0.03)),
            ("per head", torch.tensor([0.02, 0.05]), torch.tensor([0.03, 0.01])),
        ):
            spec = parse_spec(HEADS, 16, "bfloat16", kv_dtype)
            batch = make_batch(spec, [(300, 1), (75, 20), (33, 33)], device.where, setting.seed)
            tokens = 64
            slots = torch.randperm(batch.k_pages.shape[1] * 16)[:tokens]
            rows = (torch.randn(2, tokens, 2, 128) * torch.logspace(-2, 2, tokens)[:, None, None]).to(
                spec.dtype
            )
            stored = []
            for where, backend in ((device.where, setting.backend), (torch.device("cpu"), "reference")):
                pages = [torch.zeros(batch.k_pages.shape).to(spec.storage_dtype).to(where) for _ in range(2)]
                given = {"k_scale": k_scale.to(where), "v_scale": v_scale.to(where)}
                quire.write_kv(*rows.to(where), *pages, slots.to(where), **given, backend=backend)
                stored.append([page.cpu().view(torch.uint8) for page in pages])
            if not all(map(torch.equal, *stored)):
                wrong.append(f"{kv_dtype} {name}: write_kv differs from the reference")
            batch.scales = {"k_scale": k_scale.to(device.where), "v_scale": v_scale.to(device.where)}
            state = _attend(batch, setting)
            whole = {
                key: (scale if scale.dim() else scale.expand(2))[:, None, None].expand(
                    batch.k_pages.shape[:3]
                )
                for key, scale in batch.scales.items()
            }
            batch.scales = whole
            verdict = judge(state.out, exact(batch).out, plain(batch), largest_value(batch))
            if not verdict.good:
                wrong.append(f"{kv_dtype} {name}: error {verdict.error:.3g}, allowed {verdict.allowed:.3g}")
    return wrong


def _pages_at_any_byte(device: Device, setting: Setting) -> Complaints:
    """int8 pages in words of four bytes, then off them: code compiled for the one must not read the other."""
    wrong = []
    for lengths in ([(300, 1), (75, 1)], [(300, 100), (75, 75)]):
        batch = make_batch(parse_spec(HEADS, 16, "bfloat16", "int8"), lengths, device.where, setting.seed)
        wanted, pages = _attend(batch, setting), batch.pages
        for offset in (4, 1, 0, 2, 8):
            room = [torch.empty(page.numel() + 16, dtype=page.dtype, device=device.where) for page in pages]
            batch.k_pages, batch.v_pages = (
                space[offset : offset + page.numel()].view(page.shape).copy_(page)
                for space, page in zip(room, pages, strict=True)
            )
            if not torch.equal(_attend(batch, setting).out, wanted.out):
                wrong.append(f"{lengths}: pages {offset} bytes past a multiple of 16 give other results")
    return wrong


def _steps(device: Device, setting: Setting, count: int) -> list[tuple[Batch, torch.Tensor]]:
    """Decode steps of one size on one pool, and what a plan of their own makes of each."""
    spec = parse_spec(HEADS, 16, "bfloat16", None)
    steps = []
    for i in range(count):
        batch = make_batch(spec, [(300 + 97 * i, 1), (3000, 1), (17 + i, 1)], device.where, setting.seed)
        batch.q.normal_()
        steps.append((batch, _attend(batch, setting).out))
    device.synchronize()
    return steps


def _planner(setting: Setting, device: Device) -> quire.Planner:
    spec = parse_spec(HEADS, 16, "bfloat16", None)
    return quire.Planner(spec, max_batch=4, max_seq_len=4096, backend=setting.backend, device=device.where)


def _table_on_the_device(device: Device, setting: Setting) -> Complaints:
    """Filled by kernels right before planning and overwritten right after; no step waits for the host."""
    _need_cuda(device)
    steps, planner, found = _steps(device, setting, 20), _planner(setting, device), []
    tables = [batch.page_table.to(device.where) for batch, _ in steps]
    shared = torch.empty(3, 300, dtype=torch.int32, device=device.where)
    for (batch, _), table in zip(steps, tables, strict=True):
        shared.fill_(-7)
        torch.add(table, 0, out=shared[:, : table.shape[1]])
        plan = planner.plan(shared[:, : table.shape[1]], batch.seq_lens)
        shared.fill_(10**6)
        found += [(plan.run(batch.q, *batch.pages), plan.run(batch.q, *batch.pages))]
    return [
        f"step {i} differs from a plan of a table on the host"
        for i, ((_, wanted), outs) in enumerate(zip(steps, found, strict=True))
        if not all(torch.equal(out, wanted) for out in outs)
    ]


def _two_streams(device: Device, setting: Setting) -> Complaints:
    """A plan is made on a stream that is busy, run on another one, and replaced while that is busy too."""
    _need_cuda(device)
    steps, planner = _steps(device, setting, 12), _planner(setting, device)
    found: list[tuple[torch.Tensor, ...]] = []
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    busy = 20_000_000  # clock cycles, some 10 ms
    for batch, _ in steps:
        with torch.cuda.stream(first):
            torch.cuda._sleep(busy)
            plan = planner.plan(batch.page_table, batch.seq_lens)
        with torch.cuda.stream(second):
            out = plan.run(batch.q, *batch.pages)
            torch.cuda._sleep(busy)
            again = plan.run(batch.q, *batch.pages)
        found.append((out, again))
        # A plan of its own, whose memory the first stream must not get back before the second has read it.
        with torch.cuda.stream(first):
            plan = quire.plan(
                batch.page_table, batch.seq_lens, batch.spec, backend=setting.backend, device=device.where
            )
        with torch.cuda.stream(second):
            torch.cuda._sleep(busy)
            found[-1] += (plan.run(batch.q, *batch.pages),)
        del plan
        with torch.cuda.stream(first):
            for size in range(8, 22):
                torch.full((1 << size,), -1, dtype=torch.int32, device=device.where)
    device.synchronize()
    return [
        f"step {i} differs from a plan on one stream"
        for i, ((_, wanted), outs) in enumerate(zip(steps, found, strict=True))
        if not all(torch.equal(out, wanted) for out in outs)
    ]


def _graph_without_its_planner(device: Device, setting: Setting) -> Complaints:
    """The planner's memory stays where the graph reads it, whatever is allocated after it."""
    _need_cuda(device)
    [(batch, wanted)], wrong = _steps(device, setting, 1), []
    for kind in ("planner", "plan"):
        owner: Any = _planner(setting, device) if kind == "planner" else quire
        arguments = () if kind == "planner" else (batch.spec,)
        options = {} if kind == "planner" else {"backend": setting.backend, "device": device.where}
        plan = owner.plan(batch.page_table, batch.seq_lens, *arguments, **options)
        out = torch.full_like(batch.q, math.nan)
        replay = device.capture([lambda plan=plan, out=out: plan.run(batch.q, *batch.pages, out=out)])
        del plan, owner
        gc.collect()
        device.free()
        garbage = [
            torch.full((1 << size,), -1, dtype=torch.int32, device=device.where) for size in range(8, 26)
        ]
        out.fill_(math.nan)
        replay()
        device.synchronize()
        if not torch.equal(out, wanted):
            wrong.append(f"after its {kind} is gone, a replay differs")
        del garbage
    return wrong


EDGES: dict[str, Callable[[Device, Setting], Complaints]] = {
    "sinks of rows without keys": _sinks_without_keys,
    "slots outside the pool": _slots_outside_the_pool,
    "given scales": _given_scales,
    "int8 pages at any byte": _pages_at_any_byte,
    "a page table on the device": _table_on_the_device,
    "planned on one stream, run on another": _two_streams,
    "a graph after its planner is gone": _graph_without_its_planner,
}
