"""Rows as people read them: on the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks import records
from benchmarks.serving.cases import Case
from benchmarks.serving.profile import PARTS

NAMES = {
    "quire": "Quire", "quire, compiled": "Quire, compiled", "generate_batch": "transformers' generate_batch",
    "generate, dynamic cache": "generate, dynamic cache",
    "generate, static cache, compiled": "generate, static cache, compiled",
}  # fmt: skip
BASELINE = "generate, dynamic cache"
HEADS = (
    "tokens/s", "decoded/s", "step ms", "floor ms", "first token p50, p99 ms", "between tokens p50, p99 ms", "peak GiB",
    "slots wasted", "regret, allowed",
)  # fmt: skip


def of_rows(rows: Sequence[records.Row]) -> Table:
    """A line for each contestant and case; what has no speed says why."""
    table = Table("case", "served by", *HEADS)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        cells = _cells(row)
        table.add_row(row["case"], NAMES[row["who"]], *(cells or [_why(row)]))
    return table


def markdown(rows: Sequence[records.Row]) -> str:
    """The table, the original comparison's three lines beside it, and where the figures come from."""
    lines = ["| case | served by | " + " | ".join(HEADS) + " |", "| --- | --- |" + " ---: |" * len(HEADS)]
    for row in rows:
        cells = _cells(row) or [_why(row), *[""] * (len(HEADS) - 1)]
        lines.append("| " + " | ".join([row["case"], NAMES[row["who"]], *cells]) + " |")
    return "\n".join([*lines, "", *comparison(rows), "", origin(rows)])


def comparison(rows: Sequence[records.Row]) -> list[str]:
    """The three lines by which PagedAttention was first compared with contiguous caches, and the same of these rows."""
    lines = ["| | a contiguous cache, there | pages, there | a contiguous cache, here | Quire, here |"]
    lines.append("| --- | --- | --- | --- | --- |")
    there = {
        "7B, 8k": ("1 ×", "about 3 ×"),
        "13B, 32k": ("out of memory", "runs"),
        "8 requests at once": ("stalls", "steady"),
    }
    here = {
        "7B, 8k": [_times_baseline(rows, who) for who in (BASELINE, "quire")],
        "13B, 32k": [_how_many(rows, who) for who in (BASELINE, "quire")],
        "8 requests at once": [_steadiness(rows, who) for who in (BASELINE, "quire")],
    }
    return lines + [f"| {name} | {' | '.join([*there[name], *here[name]])} |" for name in there]


def origin(rows: Sequence[records.Row]) -> str:
    """What the rows have in common."""
    if not rows:
        return "*Nothing was measured.*"
    row = rows[0]
    machine = row["machine"] if row["device"] == "cpu" else row["device_name"]
    scaled = "" if row["scale"] == "1" else f", shapes and lengths divided by {row['scale']}"
    busy = " The machine was busy." if any(each["busy"] for each in rows) else ""
    return f"*{machine}, {row['dtype']}{scaled}; {row['date']}, commit {row['commit']}.{busy}*"


def of_profile(case: Case, result: dict[str, Any], *, on_host: bool) -> Table:
    """A decode step by its parts; the share is of a step without timers."""
    step, parts = result["step_us"], result["parts_us"]
    title = f"{case.name}: a decode step takes {step:,.0f} µs"
    table = Table("part", "µs", "of a step", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in PARTS:
        said = f"{name} (while the host launches and waits)" if name == "kernels" and not on_host else name
        table.add_row(said, f"{parts[name]:,.0f}", f"{parts[name] / step:.1%}")
    return table


def _cells(row: records.Row) -> list[str]:
    if not row["tokens_per_s"]:
        return []
    return [
        _short(row["tokens_per_s"]),
        _short(row["decode_tokens_per_s"]),
        _short(row["step_ms"]) + (f" ({row['of_floor']} ×)" if row["of_floor"] else ""),
        _short(row["floor_ms"]),
        _both(row, "first_token_p50_ms", "first_token_p99_ms"),
        _both(row, "between_p50_ms", "between_p99_ms"),
        f"{float(row['peak_gib']):.2f}",
        f"{float(row['wasted']):.1%}",
        f"{row['regret']}, {row['allowed']}",
    ]


def _why(row: records.Row) -> str:
    return row["note"].partition(":")[0] if row["status"] == "out of memory" else row["status"]


def _both(row: records.Row, *names: str) -> str:
    return ", ".join(_short(row[name]) for name in names)


def _short(number: str) -> str:
    """Three digits or all before the point; "–" for nothing."""
    if not number:
        return "–"
    value = float(number)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times_baseline(rows: Sequence[records.Row], who: str) -> str:
    """How many times the contiguous cache's rate a contestant decodes at, on 4 requests of 8k."""
    rates = {
        row["who"]: float(row["decode_tokens_per_s"])
        for row in rows
        if row["key"] == "7b-8k-4" and row["decode_tokens_per_s"]
    }
    return f"{rates[who] / rates[BASELINE]:.1f} ×" if {who, BASELINE} <= rates.keys() else "–"


def _how_many(rows: Sequence[records.Row], who: str) -> str:
    """Up to how many requests of up to 32k a contestant serves."""
    own = [row for row in rows if row["key"].startswith("13b-32k-") and row["who"] == who]
    served = max((int(row["requests"]) for row in own if row["status"] == "ok"), default=0)
    refused = min((int(row["requests"]) for row in own if row["status"] == "out of memory"), default=0)
    if not own:
        return "–"
    return f"serves {served}" + (f", out of memory at {refused}" if refused else "")


def _steadiness(rows: Sequence[records.Row], who: str) -> str:
    """How much longer than usual the longest waits for a next token, or for the first, are."""
    for row in rows:
        if row["key"] == "7b-mixed-8" and row["who"] == who and row["between_p99_ms"]:
            ratio = float(row["between_p99_ms"]) / float(row["between_p50_ms"])
            return f"p99 between tokens {ratio:.1f} × p50, first token p99 {_short(row['first_token_p99_ms'])} ms"
    return "–"
