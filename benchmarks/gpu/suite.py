"""What is done, in which order, and what may be left out first when time runs short.

Priorities: 0 what the goals are about, 1 what rounds the picture, 2 what can wait for another run.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks.gpu.batches import FEATURES
from benchmarks.gpu.edges import EDGES
from benchmarks.gpu.jobs import Job

SECTIONS = ("checks", "ceilings", "decode", "prefill", "mixed", "peers", "graphs")

DECODE = ["8x1k:1", "8x4k:1", "8x16k:1", "8x32k:1", "1x32k:1", "64x4k:1"]
SKEWED_LABEL, SKEWED = (
    "64 skewed",
    "1x32k:1+63x3641:1",
)  # the tokens of 64x4k, and one sequence with eight times the others'
# 64 lengths from 256 to 16k, each a constant factor above the one before.
_GEOMETRIC = [round(256 * 64 ** (i / 63)) for i in range(64)]
MANY_ITEMS = {
    "+".join(f"1x{n}:1" for n in _GEOMETRIC): "64 ascending",
    "+".join(f"1x{n}:1" for n in random.Random(0).sample(_GEOMETRIC, 64)): "64 shuffled",
    "1024x300:1": "1024x300:1",
}
SPECULATIVE = ["8x4k:4", "8x32k:4"]  # a few tokens each, to be verified at once
HEAD_DIMS = ["32/8x64", "16/8x256"]
PREFILL = ["4x2k:2k", "2x4k:4k", "1x8k:8k", "1x16k:16k", "1x32k:32k"]
CHUNKED = ["1x16k:2k", "1x32k:2k"]
MIXED = {
    "32x4k:1+2x2k:2k": "32x4k:1+2x2k:2k",
    "32x4k:1": "its decode alone",
    "2x2k:2k": "its prefill alone",
}
QUANTIZED = ["int8", "fp8_e4m3"]


def make_jobs(section: str, quick: bool, seed: int = 0) -> list[Job]:
    """The jobs of one section."""
    return {
        "checks": check_jobs,
        "ceilings": ceiling_jobs,
        "decode": decode_jobs,
        "prefill": prefill_jobs,
        "mixed": mixed_jobs,
        "peers": peer_jobs,
        "graphs": graph_jobs,
    }[section](quick, seed)


def check_jobs(quick: bool, seed: int) -> list[Job]:
    """Every dtype, head_dim, page size, feature and grouping once; then random combinations while time lasts."""
    chosen: list[dict[str, Any]] = []
    for dtype in ("bfloat16", "float16", "float32"):
        for kv_dtype in (None, "int8", "fp8_e4m3", "fp8_e5m2"):
            chosen.append({"dtype": dtype, "kv_dtype": kv_dtype})
    chosen += [{"features": [feature]} for feature in FEATURES]
    chosen += [{"features": list(FEATURES)}, {"features": list(FEATURES), "kv_dtype": "int8"}]
    chosen += [{"heads": heads} for heads in ("2/2x128", "16/2x128", "6/2x128", "32/1x128", "32/8x128")]
    for head_dim in (64, 80, 96, 256):
        chosen += [{"heads": f"8/2x{head_dim}"}, {"heads": f"8/2x{head_dim}", "kv_dtype": "fp8_e4m3"}]
    for page_size in (1, 64, 128):
        chosen += [{"page_size": page_size}, {"page_size": page_size, "kv_dtype": "int8"}]
    chosen += [{"layout": "nhd"}, {"layout": "hnd"}, {"causal": False}]
    stores = [{"dtype": d, "kv_dtype": kv} for d in ("bfloat16", "float16", "float32") for kv in _KV_DTYPES]
    stores += [
        {"heads": "8/2x80", "page_size": 1},
        {"heads": "6/3x96", "page_size": 64, "kv_dtype": "fp8_e5m2"},
    ]
    if quick:
        chosen, stores = chosen[::5], stores[::4]
    rng = random.Random(seed)
    drawn = [_draw(rng) for _ in range(2 if quick else 60)]
    far = "pages beyond 2^31 elements"
    jobs = [Job("check far pages", far, {"title": far}, 8, 1)]
    jobs += [Job("check edge", what, {"what": what, "title": what}, 5, 0, timeout=90) for what in EDGES]
    jobs += [_check("check write_kv", arguments, 2, 0) for arguments in stores]
    invariant = [{}, {"kv_dtype": "int8"}, {"dtype": "float16", "kv_dtype": "fp8_e4m3"}]
    jobs += [_check("check batch_invariant", arguments, 4, 0) for arguments in invariant]
    jobs += [_check("check", arguments, 6, 0) for arguments in chosen]
    return jobs + [_check("check", arguments, 8, 2) for arguments in drawn]


_KV_DTYPES = (None, "int8", "fp8_e4m3", "fp8_e5m2")


def _draw(rng: random.Random) -> dict[str, Any]:
    """A random combination of everything."""
    kv_heads, group = rng.choice([(1, 8), (2, 1), (2, 3), (2, 4), (4, 2), (1, 16)])
    return {
        "dtype": rng.choice(["bfloat16", "float16", "float32"]),
        "kv_dtype": rng.choice(_KV_DTYPES),
        "heads": f"{kv_heads * group}/{kv_heads}x{rng.choice([64, 80, 96, 128, 256])}",
        "page_size": rng.choice([1, 16, 48, 64, 128]),
        "layout": rng.choice(["pool", "nhd", "hnd"]),
        "causal": rng.random() < 0.8,
        "features": [feature for feature in FEATURES if rng.random() < 0.4],
    }


def _check(kind: str, arguments: dict[str, Any], seconds: float, priority: int) -> Job:
    words = [
        f"{name}={'+'.join(value) if isinstance(value, list) else value}"
        for name, value in arguments.items()
        if value not in (None, [], True)
    ]
    title = " ".join(words) or "bfloat16"
    return Job(kind, title, arguments | {"title": title}, seconds, priority, timeout=90)


def ceiling_jobs(quick: bool, seed: int) -> list[Job]:
    """Copying, reading, multiplying."""
    return [Job("ceiling", what, {"what": what}, 2, 0) for what in ("copy", "read", "gemm")]


def decode_jobs(quick: bool, seed: int) -> list[Job]:
    """Lengths × page sizes × page dtypes at 32/8 × 128; several queries, other heads at page 16; the store."""
    cases, many_items = {case: case for case in DECODE} | {SKEWED: SKEWED_LABEL}, MANY_ITEMS
    heads, others = "32/8x128", ["32/32x128", "64/8x128"]
    several, head_dims, of_head_dims = SPECULATIVE, HEAD_DIMS, "8x8k:1"
    if quick:
        cases, many_items = {"2x60:1": "2x60:1", "1x90:1+3x20:1": "skewed"}, {}
        heads, others = "4/2x16", ["4/4x16"]
        several, head_dims, of_head_dims = ["2x60:4"], ["4/2x32"], "2x70:1"
    jobs = []
    for kv_dtype in (None, *QUANTIZED):
        for page_size in (16, 128, 64):
            for case, label in cases.items():
                priority = {16: 0, 128: 0 if kv_dtype is None else 1, 64: 1 if kv_dtype is None else 2}[
                    page_size
                ]
                jobs.append(_timed("decode", case, heads, page_size, kv_dtype, label, priority))
        jobs += [
            _timed("decode", case, heads, 16, kv_dtype, label, 1 if kv_dtype else 0)
            for case, label in many_items.items()
        ]
    for other in others:
        jobs += [_timed("decode", case, other, 16, None, label, 1) for case, label in cases.items()]
    jobs += [_timed("decode", case, heads, 16, kv, case, 1) for kv in (None, "int8") for case in several]
    jobs += [_timed("decode", of_head_dims, other, 16, None, of_head_dims, 1) for other in head_dims]
    for kv_dtype in (None, *QUANTIZED):
        for tokens in (8, 64) if quick else (64, 8192):
            arguments = {"tokens": tokens, "heads": heads, "page_size": 16, "kv_dtype": kv_dtype}
            jobs.append(Job("write_kv", f"write_kv {tokens} tokens {kv_dtype or ''}", arguments, 1.5, 1))
    return sorted(jobs, key=lambda job: job.priority)


def prefill_jobs(quick: bool, seed: int) -> list[Job]:
    """Whole prompts, chunks behind cached tokens, quantised pages."""
    whole, chunked, quantized, heads = PREFILL, CHUNKED, ["1x8k:8k"], "32/8x128"
    if quick:
        whole, chunked, quantized, heads = ["2x40:40"], ["1x70:20"], ["1x33:33"], "4/2x16"
    jobs = [_timed("prefill", case, heads, 16, None, case, 0) for case in whole + chunked]
    jobs += [_timed("prefill", case, heads, 128, None, case, 1) for case in whole]
    jobs += [_timed("portable prefill", case, heads, 16, None, case, 1) for case in whole[2:] or whole]
    jobs += [_timed("prefill", case, heads, 16, kv, case, 1) for kv in QUANTIZED for case in quantized]
    return jobs


def mixed_jobs(quick: bool, seed: int) -> list[Job]:
    """A step of decodes and prompts, and its two parts apart."""
    cases, heads = MIXED, "32/8x128"
    if quick:
        cases, heads = {"3x50:1+2x20:20": "mixed", "3x50:1": "its decode", "2x20:20": "its prefill"}, "4/2x16"
    return [_timed("mixed", case, heads, 16, None, label, 0) for case, label in cases.items()]


def peer_jobs(quick: bool, seed: int) -> list[Job]:
    """SDPA on contiguous memory, gathered from pages, and FlexAttention."""
    usual = ["sdpa flash", "sdpa cudnn", "gather + sdpa"]
    if quick:
        return [_peers("2x64:1", ["sdpa", "gather + sdpa"], "4/2x16", 16, 0, 2)] + [
            _peers(case, ["sdpa", "flex"], "4/2x16", 128, 2, 5)
            for case in ("1x256:256", "2x256:1", "1x256:128")
        ]
    first, then = (
        ("8x4k:1", "8x32k:1", "1x8k:8k", "1x32k:32k"),
        ("4x2k:2k", "8x1k:1", "1x16k:2k", "2x4k:4k", "8x16k:1"),
    )
    jobs = [_peers(case, usual, "32/8x128", 16, 0, 4) for case in first]
    jobs += [_peers(case, usual, "32/8x128", 16, 1, 4) for case in (*then, "1x16k:16k", "1x32k:1")]
    return jobs + [_peers(case, ["flex"], "32/8x128", 128, 2, 30) for case in ("8x4k:1", "1x8k:8k")]


def _peers(case: str, who: list[str], heads: str, page_size: int, priority: int, seconds: float) -> Job:
    arguments = {"case": case, "who": who, "heads": heads, "page_size": page_size}
    return Job("peer", f"{case} {', '.join(who)}", arguments, seconds, priority, timeout=120)


def graph_jobs(quick: bool, seed: int) -> list[Job]:
    """Replays against plain launches, and memcheck."""
    jobs = []
    for kv_dtype in (None, "int8"):
        title = f"3 layers, {kv_dtype or 'bfloat16'}, one graph for 3 plans"
        jobs.append(Job("graph", title, {"kv_dtype": kv_dtype, "title": title}, 5, 0))
    arguments = {"seconds": 20 if quick else 80, "title": "memcheck, small mixed step"}
    return [*jobs, Job("sanitizer", "memcheck, small mixed step", arguments, 40, 1, timeout=100)]


def warm_up_jobs(jobs: list[Job]) -> list[Job]:
    """One small step for each set of kernels that the jobs will time: compiled by many processes at once."""
    found: dict[str, Job] = {}
    for job in jobs:
        if "case" in job.arguments:
            queries = {part.rpartition(":")[2] for part in job.arguments["case"].split("+")}
            few = len(queries) == 1 and queries <= {"1", "4"}
            small = f"2x300:{queries.pop()}" if few else "2x300:1+1x400:300"
            arguments = {
                "case": small,
                "heads": job.arguments["heads"],
                "page_size": job.arguments["page_size"],
            }
            arguments["kv_dtype"] = job.arguments.get("kv_dtype")
            title = f"{small} {arguments['heads']} page {arguments['page_size']} {arguments['kv_dtype'] or 'bf16'}"
            if job.kind == "portable prefill":
                arguments["portable"], title = True, f"{title} portable"
            found[title] = Job("warm up", title, arguments, 8, 0)
    return list(found.values())


def _timed(
    kind: str, case: str, heads: str, page_size: int, kv_dtype: str | None, label: str, priority: int
) -> Job:
    arguments = {"case": case, "heads": heads, "page_size": page_size, "kv_dtype": kv_dtype, "label": label}
    title = f"{kind} {label} {heads} page {page_size} {kv_dtype or 'bf16'}"
    return Job(kind, title, arguments, 1.7, priority, 60)
