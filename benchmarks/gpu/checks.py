"""Is it right? Kernels against the float64 reference on fresh random steps, poisoned inside and out."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import quire
from benchmarks.cases import Case
from benchmarks.gpu.batches import Batch, exact, largest_value, make_batch, plain
from benchmarks.gpu.device import Device
from benchmarks.gpu.jobs import Row, Setting
from benchmarks.gpu.speed import describe, parse_spec
from benchmarks.judge import Verdict, judge
from quire.kernels import reference

Lengths = list[tuple[int, int]]  # (seq_len, q_len) of each sequence
Chunk = tuple[int, int, int]  # a sequence, its first token in a step, and the token behind its last


def forms(seed: int, quick: bool) -> dict[str, Lengths]:
    """Steps of every form, with lengths drawn anew: seq_len 0, more queries than keys and no queries among them."""
    rng = np.random.default_rng(seed)

    def between(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1)) if not quick else low

    a, b, c = between(17, 90), between(130, 700), between(900, 2500)
    prompt, long_prompt = between(20, 60), between(100, 300)
    return {
        "decode": [(1, 1), (0, 1), (a, 1), (b, 1), (c, 1)],
        "long decode": [(between(120, 9000) if quick else between(5000, 9000), 1), (3, 1)],
        "prefill": [(1, 1), (prompt, prompt), (long_prompt, long_prompt)],
        "chunked prefill": [(b + 40, 40), (a + 3, 3), (prompt + 129, 129), (long_prompt, long_prompt // 2)],
        "mixed": [(b, 1), (0, 1), (c, 1), (a, 2), (prompt + 40, 33), (5, 9), (12, 0), (0, 3), (64, 64)],
    }


def layer_of(
    dtype: str = "bfloat16", kv_dtype: str | None = None, heads: str = "8/2x128", page_size: int = 16
) -> quire.AttentionSpec:
    """What a check's job says of the layer; the rest is as usual."""
    return parse_spec(heads, page_size, dtype, kv_dtype)


def check_attention(
    device: Device,
    setting: Setting,
    *,
    layout: str = "pool",
    causal: bool = True,
    features: Sequence[str] = (),
    title: str = "",
    **layer: Any,
) -> list[Row]:
    """One kernel specialisation on steps of every form; the row holds the verdict nearest to (or past) its limit."""
    spec = layer_of(**layer)
    worst, wrong = Verdict(0.0, 1.0), []
    seed = setting.seed + zlib.crc32(title.encode())
    for number, (form, lengths) in enumerate(forms(seed, setting.quick).items()):
        batch = make_batch(
            spec, lengths, device.where, seed + number, layout=layout, causal=causal, features=features
        )
        try:
            verdict = check_batch(batch, setting.backend)
        except AssertionError as error:
            wrong.append(f"{form}: {error}")
            continue
        if not verdict.good:
            wrong.append(f"{form}: error {verdict.error:.3g}, allowed {verdict.allowed:.3g}")
        if not verdict.good or verdict.error / verdict.allowed > worst.error / worst.allowed:
            worst = verdict
    row = describe(Case(title, (), (), spec)) | {"who": setting.backend, **worst.columns()}
    return [row | {"status": "wrong" if wrong else "ok", "note": "; ".join(wrong)}]


def check_batch(batch: Batch, backend: str) -> Verdict:
    """Run twice, with and without lse, into poisoned outputs; AssertionError on anything but rounding."""
    plan = quire.plan(
        *batch.lengths[:2],
        batch.spec,
        batch.cu_seqlens_q,
        backend=backend,
        device=batch.q.device,
        **batch.rules,
    )
    arguments: dict[str, Any] = batch.scales | batch.scoring
    out = torch.full_like(batch.q, math.nan)
    state = plan.run(batch.q, *batch.pages, out=out, return_state=True, **arguments)
    again = plan.run(batch.q, *batch.pages, out=torch.full_like(batch.q, math.nan), **arguments)
    _require(state.out.data_ptr() == out.data_ptr(), "out was not written in place")
    _require(bool(out.isfinite().all()), "poison reached the output, or it was not written whole")
    _require(torch.equal(out, again), "two runs gave different bits")
    wanted = exact(batch)
    empty = wanted.lse.isneginf()
    _require(torch.equal(state.lse.isneginf(), empty), "lse is not −inf exactly where no key is seen")
    _require(bool((out[empty] == 0).all()), "rows that see no key are not zero")
    difference = (state.lse - wanted.lse)[~empty].abs()
    allowed = 2e-5 + 2e-6 * wanted.lse[~empty].abs()
    _require(
        bool((difference <= allowed).all()), f"lse off by {difference.max().item() if len(difference) else 0}"
    )
    return judge(out, wanted.out, plain(batch), largest_value(batch))


def check_invariance(device: Device, setting: Setting, *, title: str = "", **layer: Any) -> list[Row]:
    """Batch-invariant steps, bit for bit: each sequence alone, in company, and divided into steps."""
    spec = layer_of(**layer)
    row = describe(Case(title, (), (), spec)) | {"who": setting.backend}
    if setting.backend == "reference":
        return [row | {"status": "unavailable", "note": "the reference does not plan batch-invariantly"}]
    seed = setting.seed + zlib.crc32(title.encode())
    drawn = np.random.default_rng(seed)
    # The longest has more keys than a part of them holds, so that parts are folded.
    lengths = [
        int(drawn.integers(low, low + 1 if setting.quick else high)) for low, high in _INVARIANT_LENGTHS
    ]
    batch = make_batch(spec, [(length, length) for length in lengths], device.where, seed)
    alone = run_chunks(batch, setting.backend, [[(i, 0, length)] for i, length in enumerate(lengths)])
    wrong = []
    for name, steps in _divisions(lengths, drawn).items():
        state = run_chunks(batch, setting.backend, steps)
        wrong += [f"{name}: {words}" for words in _differences(("out", "lse"), state, alone)]
    verdict = judge(alone.out, exact(batch).out, plain(batch), largest_value(batch))
    if not verdict.good:
        wrong.append(f"alone: error {verdict.error:.3g}, allowed {verdict.allowed:.3g}")
    return [row | verdict.columns() | {"status": "wrong" if wrong else "ok", "note": "; ".join(wrong)}]


_INVARIANT_LENGTHS = ((2100, 2900), (130, 700), (17, 90))


def _divisions(lengths: Sequence[int], drawn: np.random.Generator) -> dict[str, list[list[Chunk]]]:
    """Steps that take every sequence from its first token to its last, by what they have to do with being alone."""
    cuts = [int(drawn.integers(1, length)) for length in lengths]
    pairs = list(enumerate(zip(cuts, lengths, strict=True)))
    return {
        "in company": [[(i, 0, length) for i, length in enumerate(lengths)]],
        "in two steps": [
            chunk for i, (cut, length) in pairs for chunk in ([(i, 0, cut)], [(i, cut, length)])
        ],
        "in two steps, in company": [
            [(i, 0, cut) for i, (cut, _) in pairs],
            [(i, cut, length) for i, (cut, length) in reversed(pairs)],
        ],
        "last tokens decoded": [
            [(i, 0, length - 1) for i, length in enumerate(lengths)],
            [(i, length - 1, length) for i, length in enumerate(lengths)],
        ],
    }


def run_chunks(batch: Batch, backend: str, steps: Sequence[Sequence[Chunk]]) -> quire.SoftmaxState:
    """All rows of a batch whose every token is a query, computed step by step by batch-invariant plans."""
    out = torch.full_like(batch.q, math.nan)
    lse = torch.full(batch.q.shape[:2], math.nan, device=batch.q.device)
    for chunks in steps:
        starts = [int(batch.cu_seqlens_q[i]) for i, _, _ in chunks]
        rows = torch.cat(
            [torch.arange(start + a, start + b) for start, (_, a, b) in zip(starts, chunks, strict=True)]
        ).to(out.device)
        plan = quire.plan(
            batch.page_table[[i for i, _, _ in chunks]],
            torch.tensor([end for _, _, end in chunks], dtype=torch.int32),
            batch.spec,
            torch.tensor([0, *np.cumsum([end - begin for _, begin, end in chunks])], dtype=torch.int32),
            batch_invariant=True, backend=backend, device=out.device,
        )  # fmt: skip
        state = plan.run(batch.q[rows], *batch.pages, return_state=True, **batch.scales)
        out[rows], lse[rows] = state.out, state.lse
    return quire.SoftmaxState(out, lse)


def check_write_kv(device: Device, setting: Setting, *, title: str = "", **layer: Any) -> list[Row]:
    """The store, bit for bit against the reference on the host; what it must not touch stays as it was."""
    spec = layer_of(**layer)
    generator = torch.Generator().manual_seed(setting.seed)
    tokens, num_pages = 203, 7 + 300 // spec.page_size
    fused = torch.randn(tokens, 3, spec.num_kv_heads, spec.head_dim, generator=generator)
    fused = (fused * torch.logspace(-3, 2, tokens)[:, None, None, None]).to(spec.dtype)
    fused[5] = 0
    slots = torch.randperm(num_pages * spec.page_size, generator=generator)[:tokens]
    slots[::11] = -1
    sizes = (spec.num_kv_heads, num_pages, spec.page_size, spec.head_dim)
    found, wanted = [], []
    for where, results in ((device.where, found), (torch.device("cpu"), wanted)):
        pages = [torch.full(sizes, 3.0).to(spec.storage_dtype).to(where) for _ in range(2)]
        scales = [torch.full(sizes[:3], -1.0, device=where) if spec.quantized else None for _ in range(2)]
        rows, there = fused.to(where), slots.to(where)
        if results is found:
            quire.write_kv(
                rows[:, 1], rows[:, 2], *pages, there,
                k_scale=scales[0], v_scale=scales[1], backend=setting.backend,
            )  # fmt: skip
        else:
            reference.write_kv(rows[:, 1], rows[:, 2], *pages, there, *scales)
        results += [*pages, *(scale for scale in scales if scale is not None)]
    names = ("k_pages", "v_pages", "k_scale", "v_scale")
    wrong = _differences(names[: len(found)], [tensor.cpu() for tensor in found], wanted)
    row = describe(Case(title, (), (), spec)) | {"who": setting.backend}
    return [row | {"status": "wrong" if wrong else "ok", "note": "; ".join(wrong)}]


def check_far_pages(device: Device, setting: Setting, *, title: str = "") -> list[Row]:
    """Pages whose elements lie beyond 2³¹: written by write_kv, read by both kernels."""
    spec = parse_spec("8/2x128", 16, "bfloat16", None)
    per_page = spec.num_kv_heads * spec.page_size * spec.head_dim
    num_pages = 200 if setting.quick else (1 << 31) // per_page * 2 + 100
    pool = quire.KVPool(spec, 1, num_pages, device.where)
    lengths = [(301, 1), (150, 37)]
    small = make_batch(spec, lengths, device.where, setting.seed)
    shift = num_pages - small.k_pages.shape[1]
    counts = [math.ceil(seq_len / spec.page_size) for seq_len, _ in lengths]
    table = small.page_table.clone()
    for row, count in enumerate(counts):
        table[row, :count] += shift
    slots, rows = [], []
    for row, (seq_len, _) in enumerate(lengths):
        near = small.page_table[row, : counts[row]].long().to(device.where)
        token = torch.arange(seq_len, device=device.where)
        slots.append((near[token // spec.page_size] + shift) * spec.page_size + token % spec.page_size)
        rows.append(
            [gathered[:, near].flatten(1, 2)[:, :seq_len].transpose(0, 1) for gathered in small.pages]
        )
    k, v = (torch.cat([pair[i] for pair in rows]) for i in range(2))
    k_pages, v_pages = pool.layer(0)
    quire.write_kv(k, v, k_pages, v_pages, torch.cat(slots), backend=setting.backend)
    plan = quire.plan(
        table, small.seq_lens, spec, small.cu_seqlens_q, backend=setting.backend, device=device.where
    )
    out = plan.run(small.q, k_pages, v_pages, out=torch.full_like(small.q, math.nan))
    verdict = judge(out, exact(small).out, plain(small), largest_value(small))
    row_ = describe(Case(title, (), (), spec)) | {"who": setting.backend, **verdict.columns()}
    return [row_ | {"status": "ok" if verdict.good else "wrong"}]


def _differences(
    names: Sequence[str], found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
) -> list[str]:
    """A phrase for each tensor that differs from what is wanted by any bit."""
    return [
        f"{name} differs in {different} of {a.numel()} elements"
        for name, a, b in zip(names, found, wanted, strict=True)
        if (different := int((_bits(a) != _bits(b)).sum()))
    ]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise AssertionError(complaint)
