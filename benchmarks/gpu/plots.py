"""Plots of a CSV file: the time of a layer's attention, decode and prefill apart, beside peers and ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.jobs import Row
from benchmarks.gpu.report import read_csv
from benchmarks.words import case_in_words, name_of

PEERS = ("sdpa cudnn", "sdpa flash", "gather + sdpa", "flex")
PUBLISHED = "FlashAttention-3, its paper"
# TFLOP/s of the forward with a causal mask, head_dim 128, on an H100 80GB SXM5, 16k tokens in all: figure 5 of
# arXiv:2407.08608. Contiguous keys, 16 heads of queries and of keys.
FLASH_ATTENTION_3 = {"4x2k:2k": 521.0, "2x4k:4k": 579.0, "1x8k:8k": 602.0, "1x16k:16k": 616.0}
Times = dict[
    str, dict[str, tuple[float, float, float]]
]  # name → case → median, 20th and 80th percentile in µs


def plot(path: Path, folder: Path) -> list[Path]:
    """Draw what the file holds, as SVG and PNG; nothing where matplotlib is missing."""
    try:
        from benchmarks import drawing
    except ImportError:
        print("matplotlib is not installed: no plots. Later: python -m benchmarks.gpu --plot CSV")
        return []
    rows = [row for row in read_csv(path) if row.get("median_us")]
    if not rows:
        return []
    colours = {
        "Quire": drawing.OURS, "Quire, pages of 128": drawing.OURS_DARKER, "Quire, int8": drawing.OURS_LIGHTER,
        "Quire, fp8_e4m3": drawing.OURS_LIGHTEST, "cuDNN, contiguous": drawing.PEERS[2],
        "FlashAttention-2, contiguous": drawing.PEERS[0], PUBLISHED: drawing.PEERS[4],
        "gather + SDPA": drawing.PEERS[1], "FlexAttention, paged": drawing.PEERS[5],
    }  # fmt: skip
    written = []
    for section, rate, ceiling, dashed in (
        ("decode", "tb_per_s", "read", "reading as many bytes as keys and values have in bfloat16"),
        ("prefill", "tflop_per_s", "gemm", "as many products at the rate of a bfloat16 product of 8192³"),
    ):
        cases, times = series(rows, section)
        if not cases:
            continue
        limit = next((float(row[rate]) for row in rows if row["case"] == ceiling), None)
        found = [
            drawing.Panel(
                case_in_words(case).replace(" up to ", "\nup to "),
                tuple(
                    drawing.Bar(who, *of[case], _short(of[case][0]))
                    for who, of in times.items()
                    if case in of
                ),
                _at_ceiling(rows, section, case, rate, limit),
            )
            for case in cases
        ]
        about = f"{_about(rows, section)}\ndashed: {dashed}"
        if PUBLISHED in times:
            about += "\nFlashAttention-3: as many products at the rate of its paper's figure 5, an H100, 16/16 heads"
        with drawing.pyplot.rc_context(drawing.STYLE):
            title = f"Quire's {section} on pages, {rows[0]['gpu']}: time of a layer"
            figure = drawing.panels(found, colours, title=title, about=about)
            plain = folder / f"{path.stem}-{section}.png"
            figure.savefig(plain, dpi=140)
            written += [drawing.save(figure, plain.with_suffix(".svg")), plain]
    return written


def series(rows: Sequence[Row], section: str) -> tuple[list[str], Times]:
    """Cases of a section at its first row's heads that a peer has too (all, where none has), and everyone's times."""
    heads = next((row["heads"] for row in rows if row["section"] == section), None)
    ours = [row for row in rows if row["section"] == section and row["heads"] == heads]
    peers = [
        row for row in rows if row["section"] == "peer" and row["who"] in PEERS and row["heads"] == heads
    ]
    cases = list(dict.fromkeys(row["case"] for row in ours))
    shared = [case for case in cases if any(row["case"] == case for row in peers)] or cases
    times: Times = {}
    for row in [*ours, *peers]:
        name = _name(row)
        if name and row["case"] in shared:
            spread = (
                row["median_us"],
                row.get("p20_us", row["median_us"]),
                row.get("p80_us", row["median_us"]),
            )
            times.setdefault(name, {})[row["case"]] = spread
    if section == "prefill" and "H100" in str(rows[0].get("gpu", "")) and heads and heads.endswith("x128"):
        for row in ours:
            if row["case"] in FLASH_ATTENTION_3 and row["case"] in shared:
                us = row["median_us"] * row["tflop_per_s"] / FLASH_ATTENTION_3[row["case"]]
                times.setdefault(PUBLISHED, {})[row["case"]] = (us, us, us)
    return shared, times


def _name(row: Row) -> str:
    """Empty for what is not drawn: other page sizes, quantised pages of other sizes than 16."""
    if row["section"] == "peer":
        return name_of(str(row["who"]))
    found = {(16, ""): "Quire", (128, ""): "Quire, pages of 128"}
    kinds = {(16, kind): f"Quire, {kind}" for kind in ("int8", "fp8_e4m3")}
    return (found | kinds).get((row["page_size"], row.get("kv_dtype") or ""), "")


def _at_ceiling(
    rows: Sequence[Row], section: str, case: str, rate: str, ceiling: float | None
) -> float | None:
    """Microseconds at the ceiling's rate, for what Quire's bfloat16 row of the case reads or multiplies."""
    for row in rows:
        if ceiling and row["section"] == section and row["case"] == case and not row.get("kv_dtype"):
            return float(row["median_us"]) * float(row[rate]) / ceiling
    return None


def _short(us: float) -> str:
    if us < 1000:
        return f"{us:.1f} µs" if us < 100 else f"{us:.0f} µs"
    return f"{us / 1000:.2f} ms"


def _about(rows: Sequence[Row], section: str) -> str:
    row = next(row for row in rows if row["section"] == section)
    heads, _, width = str(row.get("heads", "")).partition("x")
    facts = (
        f"{heads} heads of {width}",
        f"pages of {row['page_size']}, bfloat16 unless said",
        row.get("date"),
    )
    commit = f"commit {row['commit']}" if row.get("commit") else None
    return ", ".join(str(fact) for fact in (*facts, commit) if fact)
