"""The tables of docs/gpu.md, from a CSV file of measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.jobs import Row
from benchmarks.gpu.report import read_csv
from benchmarks.words import case_in_words, name_of

PEERS = ("sdpa flash", "sdpa cudnn", "gather + sdpa", "flex")


def tables(path: Path) -> str:
    """What was measured on one machine: its ceilings, decode, prefill, mixed steps."""
    rows = read_csv(path)
    timed = [row for row in rows if row.get("median_us")]
    head = rows[0]
    ceilings = {row["case"]: row for row in timed if row["section"] == "ceiling"}
    lines = [
        f"### {head['gpu']}",
        "",
        f"Driver {head['driver']}, torch {head['torch']}, Triton {head['triton']}, commit {head['commit']}, "
        f"{head['date']}: `{head['command']}`, seed {head['seed']}. {_checked(rows)}",
    ]
    if ceilings:
        lines += [
            "",
            "Ceilings of the same run: " + ", ".join(_ceiling(row) for row in ceilings.values()) + ".",
        ]
    for section, title, peers, rate in (
        ("decode", "Decode, µs a layer (TB/s of keys, values and scales)", PEERS, _bytes),
        ("prefill", "Prefill, µs a layer (TFLOP/s, causal pairs once)", PEERS, _flops),
        ("mixed", "Mixed step and its parts, µs a layer (TB/s)", (), _bytes),
    ):
        found = [row for row in timed if row["section"] in (section, f"portable {section}")]
        cases = {_case(row) for row in found}
        beside = [
            row for row in timed if row["section"] == "peer" and row["who"] in peers and _case(row) in cases
        ]
        if found:
            lines += ["", title + ":", "", *_grid([*found, *beside], rate)]
    return "\n".join(lines)


README_CASES = ("8x1k:1", "8x4k:1", "8x32k:1", "8x32k:1@int8", "1x8k:8k", "1x32k:32k", "1x16k:2k")
README_PEERS = ("sdpa cudnn", "sdpa flash", "gather + sdpa")


def short_table(path: Path) -> str:
    """The README's table of one machine: a few cases in words at 32/8 × 128 and page 16, beside peers."""
    timed = [row for row in read_csv(path) if row.get("median_us") and row.get("page_size") == 16]
    usual = [row for row in timed if row.get("heads") == "32/8x128"]

    def cell(case: str, who: str) -> str:
        name, _, kv_dtype = case.partition("@")
        for row in usual:
            if (row["case"], row["who"], row.get("kv_dtype", "")) == (name, who, kv_dtype):
                return _time_and_rate(row)
        return "–"

    columns = ("quire", *README_PEERS)
    head = f"time of a layer on an {' '.join(str(usual[0]['gpu']).split()[:2])}"
    lines = [f"| {head} | " + " | ".join(map(name_of, columns)) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [
        f"| {case_in_words(case)} | " + " | ".join(cell(case, who) for who in columns) + " |"
        for case in README_CASES
    ]
    return "\n".join(lines)


def _time_and_rate(row: Row) -> str:
    us = row["median_us"]
    time = f"{us:.1f} µs" if us < 1000 else f"{us / 1000:.2f} ms"
    by_bytes = str(row["case"]).endswith(":1")
    rate = f"{row['tb_per_s']:.2f} TB/s" if by_bytes else f"{row['tflop_per_s']:.0f} TFLOP/s"
    return f"{time}, {rate}"


def _checked(rows: Sequence[Row]) -> str:
    checks = [row for row in rows if str(row["section"]).startswith("check")]
    good = sum(row["status"] == "ok" for row in checks)
    bad = sum(row["status"] in ("wrong", "failed") for row in checks)
    return f"{good} checks against the reference passed, {bad} failed, {len(checks) - good - bad} had no time left."


def _ceiling(row: Row) -> str:
    rate = f"{row['tb_per_s']:.2f} TB/s" if row.get("tb_per_s") else f"{row['tflop_per_s']:.0f} TFLOP/s"
    return f"{row['case']} {rate}"


def _grid(rows: Sequence[Row], cell: Callable[[Row], str]) -> list[str]:
    """Cases down, who and what pages across."""
    cells = {(_case(row), _column(row)): cell(row) for row in rows}
    columns = list(dict.fromkeys(column for _, column in cells))
    lines = ["| case | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for case in dict.fromkeys(case for case, _ in cells):
        lines.append(f"| {case} | " + " | ".join(cells.get((case, column), "") for column in columns) + " |")
    return lines


def _case(row: Row) -> str:
    heads = str(row.get("heads", ""))
    return f"`{row['case']}`" + ("" if heads == "32/8x128" else f" {heads.replace('x', ' × ')}")


def _column(row: Row) -> str:
    if row["section"] == "peer":
        return str(row["who"])
    kernel = "portable, " if row["section"] == "portable prefill" else ""
    return f"{kernel}{row.get('kv_dtype') or 'bf16'}, page {row['page_size']}"


def _bytes(row: Row) -> str:
    return f"{row['median_us']:.1f} ({row['tb_per_s']:.2f})"


def _flops(row: Row) -> str:
    return f"{row['median_us']:.0f} ({row['tflop_per_s']:.0f})"
