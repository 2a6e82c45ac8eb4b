"""The table of `quire demo`: the same prompts on pages and in a contiguous padded cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quire.cli.measure import Divergence, Run
from quire.cli.page_map import LETTERS

Row = tuple[str, Callable[[Run], str]]


def report(
    on_pages: Sequence[Run], padded: Sequence[Run], *, num_pages: int, footnote: str
) -> RenderableType:
    """A column per way of serving; of several runs each figure is the median.

    Args:
        on_pages, padded: the measured runs; padded may be empty.
        num_pages: pages of the pool.
        footnote: under which conditions this was measured.
    """
    columns = [("Quire: pages", on_pages), ("contiguous, padded", padded)]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("")
    for name, runs in columns:
        if runs:
            table.add_column(name, justify="right")
    for label, figure in _speed_rows():
        table.add_row(label, *(figure(runs) for _, runs in columns if runs))
    for label, of_run in _memory_rows(num_pages):
        table.add_row(label, *(of_run(runs[0]) for _, runs in columns if runs))
    return Group(table, Text(footnote, "grey62"))


def _speed_rows() -> list[tuple[str, Callable[[Sequence[Run]], str]]]:
    return [
        ("tokens per second", lambda runs: f"{median(r.tokens_per_second for r in runs):.0f}"),
        ("time to first token, median", lambda runs: _ms(median(median(r.first_token) for r in runs))),
        ("time to first token, slowest", lambda runs: _ms(median(max(r.first_token) for r in runs))),
    ]


def _memory_rows(num_pages: int) -> list[Row]:
    """Memory does not depend on the clock: it is the same in every run."""
    return [
        ("pages at peak", lambda r: "–" if r.pages is None else f"{r.pages} of {num_pages}"),
        ("KV cache at peak, bytes", lambda r: f"{r.kv_bytes:,}"),
        ("slots at peak", lambda r: f"{r.allocated_slots:,}"),
        ("slots wasted", lambda r: f"{r.allocated_slots - r.filled_slots:,}  ({100 * r.wasted:.1f} %)"),
        ("pages given back and computed again", lambda r: "–" if r.pages is None else f"{r.preemptions} ×"),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def agreement(
    num_prompts: int, differing: Sequence[Divergence], decode: Callable[[int], str]
) -> RenderableType:
    """Whether the greedy texts agree, and where they do not, how near a tie that was."""
    same = num_prompts - len(differing)
    verdict = Text(
        f"greedy texts that agree, token for token: {same}/{num_prompts}",
        "bold green" if not differing else "bold yellow",
    )
    return Group(verdict, *(Text("  " + _explain(d, decode)) for d in differing))


def _explain(d: Divergence, decode: Callable[[int], str]) -> str:
    chose = [_token(token, decode) for token in (d.on_pages, d.padded)]
    where = f"{LETTERS[d.prompt % 26]} differs from its token {d.position + 1} on: pages {chose[0]}, padded {chose[1]}"
    if d.gap is None:
        return where
    nearer = "for the pages' choice" if d.gap > 0 else "for the padded choice" if d.gap < 0 else "a tie"
    return f"{where}; alone and unpadded, the model's logits are {abs(d.gap):.2g} apart, {nearer}"


def _token(token: int | None, decode: Callable[[int], str]) -> str:
    return "had ended" if token is None else f"chose {decode(token)!r}"
