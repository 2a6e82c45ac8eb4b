"""Rows become a CSV file, plots, and one short table."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import quire
from benchmarks.gpu.device import make_device
from benchmarks.gpu.goals import goals
from benchmarks.gpu.jobs import Row

FACTS = ["date", "gpu", "driver", "python", "torch", "triton", "quire", "commit", "command", "seed"]
COLUMNS = [
    "section", "case", "heads", "page_size", "dtype", "kv_dtype", "who", "status", "median_us", "p20_us", "p80_us",
    "by", "launched_us", "host_us", "plan_us", "replan_us", "tb_per_s", "of_copy", "of_read", "tflop_per_s", "of_gemm",
    "max_error", "allowed_error", "layers", "repeats", "job_seconds", "note",
]  # fmt: skip
MAX_LINES, MAX_CHARACTERS = 80, 10_500
MAX_BAD = 8


def facts(device: str, seed: int) -> Row:
    """Where, with what and how a run was made."""
    try:
        of_device = make_device(device).facts()
    except RuntimeError:
        of_device = {"gpu": "unknown", "driver": "unknown"}
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "date": time.strftime("%Y-%m-%d"),
        **of_device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "quire": quire.__version__,
        "commit": commit(),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "seed": seed,
    }


def commit() -> str:
    """The commit measured: from QUIRE_COMMIT where there is no git repository."""
    if given := os.environ.get("QUIRE_COMMIT"):
        return given
    try:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def stem(gpu: str) -> str:
    """A file name for a GPU's measurements: gpu-h100, gpu-h200, …"""
    for word in gpu.replace("-", " ").lower().split():
        if word[0] in "abhlv" and word[1:].strip("s").isdigit():
            return f"gpu-{word}"
    return "gpu-dry-run" if "dry run" in gpu else "gpu-other"


def derive(rows: list[Row]) -> None:
    """Fill in rates, and shares of the ceilings measured in the same run."""
    for row in rows:
        if us := row.get("median_us"):
            for amount, rate in (("kv_bytes", "tb_per_s"), ("flops", "tflop_per_s")):
                if row.get(amount):
                    row[rate] = row[amount] / us / 1e6
    ceilings = {row["case"]: row for row in rows if row["section"] == "ceiling"}
    for row in rows:
        for what, rate in (("copy", "tb_per_s"), ("read", "tb_per_s"), ("gemm", "tflop_per_s")):
            best = ceilings.get(what, {}).get(rate)
            if best and row.get(rate) and row["section"] != "ceiling":
                row[f"of_{what}"] = round(row[rate] / best, 4)
    for row in rows:
        for rate, digits in (("tb_per_s", 4), ("tflop_per_s", 2)):
            if rate in row:
                row[rate] = round(row[rate], digits)


def write_csv(path: Path, facts: Row, rows: list[Row]) -> Path:
    """All rows of this run; an older file of the same name is replaced."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FACTS + COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow(facts | row | {"note": " ".join(str(row.get("note", "")).split())})
    return path


def read_csv(path: Path) -> list[Row]:
    """Rows of a file, numbers as numbers, empty cells left out."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _number(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    try:
        return float(text) if "." in text or "e-" in text else int(text)
    except ValueError:
        return text


# --- the table -------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The run in at most 80 lines."""
    lines = summary(rows)
    lines += [f"goals (H200): {'; '.join(found)}"] if (found := goals(rows)) else []
    decode = [row for row in rows if row["section"] == "decode"]
    lines += ["", "decode: us TB/s (keys, values, scales)"]
    lines += pivot(decode, _heads_and_case, _storage, _bandwidth)
    usual = [row for row in decode if row.get("page_size") == 16 and not row.get("kv_dtype")]
    lines += [
        "",
        "decode, page 16 bf16: us a layer by graph, launched, host; us a plan, anew; of copy, of read",
    ]
    for row in usual:
        if row.get("median_us") and row["heads"] == usual[0]["heads"]:
            lines.append(
                f"  {row['case']:<22} {row['median_us']:8.1f} {row['launched_us']:8.1f} {row['host_us']:7.1f} "
                f"{row['plan_us']:8.1f} {row['replan_us']:6.1f} {_percent(row, 'of_copy')} {_percent(row, 'of_read')}"
            )
    lines += ["", "prefill: us TFLOP/s (causal pairs once)"]
    prefill = [row for row in rows if row["section"] in ("prefill", "portable prefill")]
    lines += pivot(prefill, _heads_and_case, _storage, _rate)
    timed = [row for row in rows if row.get("median_us")]
    lines += [f"mixed: {row['case']} {_bandwidth(row)}" for row in timed if row["section"] == "mixed"]
    stores = [f"{row['case']} {_bandwidth(row)}" for row in timed if row["section"] == "write_kv"]
    lines += [f"us TB/s: {'; '.join(stores)}"] if stores else []
    lines += ["", "peers, bf16: us (rate)"]
    peers = [row for row in rows if row["section"] == "peer"]
    lines += pivot(
        peers,
        lambda row: f"{row['case']} p{row.get('page_size', '')}",
        lambda row: row.get("who", "?"),
        _either,
    )
    return clip(lines)


def tune_table(rows: Sequence[Row]) -> str:
    """Candidates of each case, fastest first."""
    lines = [line for line in summary(rows) if line]
    cases = dict.fromkeys((row["case"], row.get("kv_dtype", "")) for row in rows if row.get("median_us"))
    each = max(4, (MAX_LINES - len(lines)) // max(1, len(cases)) - 1)
    for case, kv_dtype in cases:
        found = [
            r for r in rows if r.get("median_us") and (r["case"], r.get("kv_dtype", "")) == (case, kv_dtype)
        ]
        found.sort(key=lambda row: row["median_us"])
        lines.append(f"{case} {kv_dtype or 'bf16'}: {len(found)} candidates")
        lines += [f"  {_either(row):>18}  {row['who']}" for row in found[: each - 1]]
        lines.append(f"  {_either(found[-1]):>18}  {found[-1]['who']} (slowest)")
    return clip(lines)


def summary(rows: Sequence[Row]) -> list[str]:
    """Counts, everything that went wrong, what was skipped, the ceilings, graphs and the memory checker."""
    lines = []
    for section in dict.fromkeys(row["section"] for row in rows):
        counts = Counter(row["status"] for row in rows if row["section"] == section)
        lines.append(
            f"{section}: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        )
    lines = [" | ".join(lines)]
    bad = [row for row in rows if row["status"] in ("wrong", "failed", "unavailable")]
    for row in bad[:MAX_BAD]:
        note = " ".join(str(row.get("note", "")).split())
        lines.append(f"!! {row['section']} {row['case']} {row.get('who', '')}: {row['status']}: {note}"[:230])
    if len(bad) > MAX_BAD:
        lines.append(f"!! and {len(bad) - MAX_BAD} more, see the CSV")
    skipped = [f"{row['section']} {row['case']}" for row in rows if row["status"] == "skipped"]
    if skipped:
        lines.append(f"skipped for time ({len(skipped)}): " + "; ".join(skipped)[:400])
    for row in rows:
        if row["section"] == "ceiling" and row.get("median_us"):
            lines.append(f"ceiling {row['case']}: {_either(row)}")
        elif row["section"] in ("graph", "sanitizer"):
            lines.append(f"{row['section']} {row['case']}: {row['status']} {str(row.get('note', ''))[:80]}")
    return lines


def pivot(
    rows: Sequence[Row],
    line_of: Callable[[Row], str],
    column_of: Callable[[Row], str],
    cell: Callable[[Row], str],
) -> list[str]:
    """Rows as a grid of short cells."""
    cells = {(line_of(row), column_of(row)): cell(row) for row in rows if "who" in row}
    lines = list(dict.fromkeys(line for line, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    widths = [max(len(column), *(len(cells.get((line, column), "")) for line in lines)) for column in columns]
    grid = (
        [f"  {'':<22}" + "".join(f"{c:>{w + 2}}" for c, w in zip(columns, widths, strict=True))]
        if lines
        else []
    )
    for line in lines:
        found = (f"{cells.get((line, c), ''):>{w + 2}}" for c, w in zip(columns, widths, strict=True))
        grid.append(f"  {line:<22}" + "".join(found))
    return grid


def clip(lines: list[str]) -> str:
    """As much as one answer holds."""
    kept = lines[:MAX_LINES] if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "… more in the CSV"]
    text = "\n".join(kept)
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "\n… more in the CSV"


def _heads_and_case(row: Row) -> str:
    heads = str(row.get("heads", ""))
    return f"{row['case']}" if heads == "32/8x128" else f"{row['case']} {heads}"


def _storage(row: Row) -> str:
    kernel = "portable " if row["section"] == "portable prefill" else ""
    return f"{kernel}{str(row.get('kv_dtype') or 'bf16').removeprefix('fp8_')} p{row.get('page_size', '')}"


def _bandwidth(row: Row) -> str:
    return f"{row['median_us']:.1f} {row['tb_per_s']:.2f}" if row.get("median_us") else row["status"]


def _rate(row: Row) -> str:
    return f"{row['median_us']:.0f} {row['tflop_per_s']:.0f}" if row.get("median_us") else row["status"]


def _either(row: Row) -> str:
    """Microseconds and the rate that binds: decode and memory by bytes, the rest by operations."""
    if not row.get("median_us"):
        return str(row["status"])
    by_bytes = row["case"].endswith(":1") or "tflop_per_s" not in row
    rate = f"{row['tb_per_s']:.2f} TB/s" if by_bytes else f"{row['tflop_per_s']:.0f} TFLOP/s"
    return f"{row['median_us']:.1f} ({rate})"


def _percent(row: Row, column: str) -> str:
    return f"{row[column]:6.0%}" if column in row else "      "
