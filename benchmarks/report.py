"""Put the committed measurements into the README and the docs, and the plots beside the CSV files.

Example:
    python -m benchmarks.report          # after python -m benchmarks.attention --out …, or in `make bench`
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.ceilings import NAMES as CEILINGS
from benchmarks.environment import ROOT
from benchmarks.gpu import markdown as of_gpu
from benchmarks.serving import tables as of_serving
from benchmarks.shapes import COMPARISONS
from benchmarks.turns import Spread
from benchmarks.words import case_in_words, name_of

RESULTS = ROOT / "benchmarks/results"
ATTENTION, SHAPES, GENERATION, HOST, PREFIX = (
    RESULTS / f"cpu{name}.csv" for name in ("", "-shapes", "-generation", "-host", "-prefix")
)
GPU = RESULTS / "gpu-h100.csv"  # whose table the README shows
BASELINE = "model.generate"
NOT_MEASURED = "*Not measured yet.*"


def main() -> int:
    """Rewrite the tables and draw the plots; the exit code is 0."""
    for page, of_page in tables().items():
        text = page.read_text()
        for mark, table in of_page.items():
            text = put(text, mark, table)
        page.write_text(text)
    try:
        from benchmarks import plots
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is not installed. Fix: pip install -e '.[bench]'", file=sys.stderr)
        return 0
    from benchmarks.serving import plots as serving_plots

    drawn = [plots.attention(ATTENTION), plots.generation(GENERATION), plots.prefix(PREFIX)]
    for path in serving_files("cpu") + serving_files("gpu"):
        drawn += serving_plots.draw(path)
    for path in drawn:
        print(path.relative_to(ROOT))
    return 0


def tables() -> dict[Path, dict[str, str]]:
    """By the page that has them: tables by their marks."""
    attention, shapes, generation = (records.read(path) for path in (ATTENTION, SHAPES, GENERATION))
    return {
        ROOT / "README.md": {
            "bench: attention": short_table(attention),
            "gpu": of_gpu.short_table(GPU),
        },
        ROOT / "docs/benchmarks.md": {
            "bench: spread": f"{attention_table(attention, spread=True)}\n\n{origin(attention)}",
            "bench: shapes": f"{attention_table(shapes, spread=True)}\n\n{origin(shapes)}",
            "bench: comparisons": comparison_table(shapes),
            "bench: host": host_table(records.read(HOST)) if HOST.exists() else NOT_MEASURED,
            "bench: generation": f"{generation_table(generation)}\n\n{origin(generation)}",
            "bench: prefix": prefix_table(records.read(PREFIX)),
        },
        ROOT / "docs/serving-benchmarks.md": {
            f"serving: {device}": serving_tables(serving_files(device)) for device in ("cpu", "gpu")
        },
    }


def serving_files(device: str) -> list[Path]:
    """The committed files of `quire bench serving` on such a device: cpu-serving.csv, gpu-h100-serving.csv, …"""
    return sorted(RESULTS.glob(f"{device}*serving.csv"))


def serving_tables(paths: Sequence[Path]) -> str:
    """Each file's table and its two plots, or that nothing has been measured."""
    return "\n\n".join(map(_of_serving, paths)) or NOT_MEASURED


def _of_serving(path: Path) -> str:
    beside = f"../{path.parent.relative_to(ROOT)}" if path.is_relative_to(ROOT) else path.parent
    return "\n\n".join(
        [
            of_serving.markdown(records.read(path)),
            f"![Memory and waiting times while requests arrive]({beside}/{path.stem}-load.svg)",
            f"![The three lines of the original comparison]({beside}/{path.stem}-comparison.svg)",
            f"[Rows]({beside}/{path.name}).",
        ]
    )


def put(text: str, mark: str, table: str) -> str:
    """The text with a table between `<!-- mark -->` and the next `<!-- end -->`.

    Raises:
        ValueError: the text has no such mark.
    """
    place = re.compile(rf"(<!-- {re.escape(mark)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"text must hold <!-- {mark} --> and <!-- end -->; got neither")
    return place.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def short_table(rows: Sequence[records.Row]) -> str:
    """The README's table: cases and contestants in words, medians in milliseconds, and Quire's share of the ceiling."""
    peers = [name for name in dict.fromkeys(row["who"] for row in rows) if name not in CEILINGS]
    lines = ["| milliseconds a call | " + " | ".join(map(name_of, peers)) + " | Quire, of the ceiling |"]
    lines.append("| --- |" + " ---: |" * (len(peers) + 1))
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["who"]: row for row in rows if row["case"] == case}
        cells = [_milliseconds(of_case.get(peer), spread=False) for peer in peers]
        lines.append("| " + " | ".join([case_in_words(case), *cells, _rate(of_case["quire"])[1]]) + " |")
    return "\n".join(lines)


def attention_table(rows: Sequence[records.Row], *, spread: bool = False) -> str:
    """One line per case: each peer's median in milliseconds, and Quire's rate beside the ceiling that binds it.

    Args:
        spread: behind each median say between what times the middle 60 % of the rounds lie.
    """
    peers = [name for name in dict.fromkeys(row["who"] for row in rows) if name not in CEILINGS]
    lines = ["| case | fits in | " + " | ".join(peers) + " | Quire's rate | ceiling |"]
    lines.append("| --- | --- |" + " ---: |" * (len(peers) + 2))
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["who"]: row for row in rows if row["case"] == case}
        ours = of_case["quire"]
        cells = [f"`{case}`", ours["fits_in"]]
        cells += [_milliseconds(of_case.get(peer), spread) for peer in peers]
        lines.append("| " + " | ".join([*cells, *_rate(ours)]) + " |")
    return "\n".join(lines)


def origin(rows: Sequence[records.Row]) -> str:
    """What a table's rows have in common: machine, threads, date, commit, rounds."""
    row = rows[0]
    threads = f"{row['threads']} thread{'' if row['threads'] == '1' else 's'}"
    return f"*{row['machine']}, {threads}; {row['date']}, commit {row['commit']}, {row['rounds']} rounds.*"


def generation_table(rows: Sequence[records.Row]) -> str:
    """One line per engine: tokens per second, and how many times the padded batch's."""
    base = next((float(row["tokens_per_s"] or 0) for row in rows if row["who"] == BASELINE), 0.0)
    lines = [f"| engine | tokens/s | p20 – p80 | × {BASELINE} |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        if row["tokens_per_s"]:
            speed = float(row["tokens_per_s"])
            between = f"{float(row['p20_tokens_per_s']):.0f} – {float(row['p80_tokens_per_s']):.0f}"
            lines.append(
                f"| {row['who']} | {speed:.0f} | {between} | {f'{speed / base:.2f}' if base else ''} |"
            )
        else:
            lines.append(f"| {row['who']} | {row['status']} | | |")
    return "\n".join(lines)


def comparison_table(rows: Sequence[records.Row]) -> str:
    """One line per comparison across cases that took turns: how many times the others' time together Quire took.

    The ratio is taken within each round, so that what the machine did between rounds is not in it.
    """
    lines = ["| case | set beside | × its time | p20 – p80 |", "| --- | --- | ---: | ---: |"]
    timed = {row["case"]: row for row in rows if row["who"] == "quire" and row.get("turns_ms")}
    for case, others in COMPARISONS.items():
        found = [timed[name] for name in (case, *others) if name in timed]
        if len(found) == 1 + len(others) and len({row["together"] for row in found}) == 1:
            times = zip(*([float(ms) for ms in row["turns_ms"].split()] for row in found), strict=True)
            ratio = Spread.of([ours / sum(theirs) for ours, *theirs in times])
            beside = " + ".join(f"`{name}`" for name in others)
            lines.append(f"| `{case}` | {beside} | {ratio.median:.2f} | {ratio.p20:.2f} – {ratio.p80:.2f} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_MEASURED


def host_table(rows: Sequence[records.Row]) -> str:
    """One line per call of the host: its median in microseconds, and what was set out for."""
    lines = ["| call | step | µs | p20 – p80 | set out for |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        figures = [row["status"], ""]
        if row["median_us"]:
            median, p20, p80 = (f"{float(row[name]):.1f}" for name in ("median_us", "p20_us", "p80_us"))
            figures = [median, f"{p20} – {p80}"]
        goal = f"≤ {row['goal_us']}" if row["goal_us"] else ""
        lines.append("| " + " | ".join([f"`{row['who']}`", f"`{row['case']}`", *figures, goal]) + " |")
    return "\n".join([*lines, "", origin(rows)])


def prefix_table(rows: Sequence[records.Row]) -> str:
    """One line per trace and engine: what was found in pages, and the milliseconds that it took."""
    lines = ["| trace | engine | found in pages | full pages allow | first token, ms | whole trace, ms |"]
    lines.append("| --- | --- |" + " ---: |" * 4)
    for row in rows:
        rates = (f"{float(row[name]):.1%}" for name in ("hit_rate", "theoretical_hit_rate"))
        times = (
            _between(row, name) if row["status"] == "ok" else row["status"]
            for name in ("first_token", "trace")
        )
        lines.append("| " + " | ".join([f"`{row['case']}`", row["who"], *rates, *times]) + " |")
    return "\n".join([*lines, "", origin(rows)])


def _between(row: records.Row, name: str) -> str:
    median, p20, p80 = (f"{float(row[f'{name}_{of}_ms']):,.0f}" for of in ("median", "p20", "p80"))
    return f"{median} ({p20} – {p80})"


def _milliseconds(row: records.Row | None, spread: bool) -> str:
    if row is None or not row["median_ms"]:
        return "–" if row is None or row["status"] == "unavailable" else row["status"]
    median, p20, p80 = (f"{float(row[name]):.2f}" for name in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} ({p20} – {p80})" if spread else median


def _rate(row: records.Row) -> tuple[str, str]:
    if not row["median_ms"]:
        return row["status"], ""
    if row["bound_by"] == "reading":
        return f"{float(row['gb_per_s']):.1f} GB/s", f"{float(row['of_read']):.0%} of reading"
    return f"{float(row['gflop_per_s']):.0f} GFLOP/s", f"{float(row['of_gemm']):.0%} of {row['dtype']} gemm"


if __name__ == "__main__":
    sys.exit(main())
