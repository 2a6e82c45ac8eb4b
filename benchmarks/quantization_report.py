"""The tables of docs/quantization.md, from a CSV file of scripts/measure_quantization.py.

Example:
    python -m benchmarks.quantization_report benchmarks/results/quantization.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import records

WITHOUT_PAGES = "transformers, no pages"


class Figures:
    """A CSV file's numbers by measure, setting, kv_dtype and metric."""

    def __init__(self, rows: list[records.Row]) -> None:
        keys = ("measure", "setting", "kv_dtype", "metric")
        self._rows = {tuple(row[key] for key in keys): row for row in rows}

    def value(self, *key: str) -> float:
        return float(self._rows[key]["value"])

    def samples(self, *key: str) -> int:
        return int(self._rows[key]["samples"])

    def of(self, measure: str, column: int) -> list[str]:
        """What a measure's settings (1) or kv_dtypes (2) are called, in the file's order."""
        return list(dict.fromkeys(key[column] for key in self._rows if key[0] == measure))


def tables(path: Path) -> str:
    """Perplexity, retrieval and the error of attention, a line per kind of page."""
    figures = Figures(records.read(path))
    return "\n\n".join(
        "\n".join(table(figures)) for table in (perplexity_table, retrieval_table, attention_table)
    )


def perplexity_table(figures: Figures) -> list[str]:
    """Loss on held-out text, and distance from exact pages."""
    tokens = figures.samples("perplexity", "decode", "none", "nats/token")
    lines = [
        f"| `kv_dtype` ({tokens:,} tokens) | nats/token | perplexity | KL from none | same first choice |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in figures.of("perplexity", 2):
        loss, perplexity, divergence, same = (
            figures.value("perplexity", "decode", kind, metric)
            for metric in ("nats/token", "perplexity", "KL", "same choice")
        )
        lines.append(f"| {kind} | {loss:.4f} | {perplexity:.3f} | {divergence:.2g} | {same:.2%} |")
    loss, perplexity = (
        figures.value("perplexity", WITHOUT_PAGES, "none", metric) for metric in ("nats/token", "perplexity")
    )
    return [*lines, f"| ({WITHOUT_PAGES}) | {loss:.4f} | {perplexity:.3f} | | |"]


def retrieval_table(figures: Figures) -> list[str]:
    """Loss on a name's second half, the name defined so far back and not at all; and whole names retrieved."""
    settings = figures.of("retrieval", 1)
    headings = ["no name" if s.startswith("absent") else s.replace("defined", "name") for s in settings]
    lines = [
        "| `kv_dtype` | " + " | ".join(headings) + " | names retrieved whole |",
        "| --- |" + " ---: |" * (len(settings) + 1),
    ]
    defined = [setting for setting in settings if setting.startswith("defined")]
    for kind in figures.of("retrieval", 2):
        losses = [f"{figures.value('retrieval', setting, kind, 'nats/token'):.3f}" for setting in settings]
        names = [figures.samples("retrieval", setting, kind, "retrieved") for setting in defined]
        shares = [figures.value("retrieval", setting, kind, "retrieved") for setting in defined]
        whole = sum(share * count for share, count in zip(shares, names, strict=True))
        lines.append(f"| {kind} | " + " | ".join(losses) + f" | {whole:.0f} of {sum(names)} |")
    return lines


def attention_table(figures: Figures) -> list[str]:
    """Memory, and the relative error of one layer's output."""
    lines = ["| pages | bytes per token and layer | relative error of attention |", "| --- | ---: | ---: |"]
    for setting in figures.of("attention", 1):
        for kind in figures.of("attention", 2):
            if setting == "float32" or kind == "none":
                size = figures.value("attention", setting, kind, "bytes/token")
                error = figures.value("attention", setting, kind, "relative error")
                lines.append(f"| {setting if kind == 'none' else kind} | {size:,.0f} | {error:.2g} |")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(tables(Path(sys.argv[1])))
