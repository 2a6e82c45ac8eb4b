"""Rows of measurements, as CSV: one row per case and peer, with everything needed to measure it again."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

Row = dict[str, str]


def write(path: Path, rows: Sequence[Row], *, replace: bool = True) -> None:
    """Write rows; their columns are those of the first.

    Args:
        replace: False keeps the file's rows of other cases, so that a long table can be measured in pieces.
    Raises:
        ValueError: the rows, or those kept, have other columns.
    """
    cases = {row["case"] for row in rows}
    kept = [] if replace or not path.exists() else [row for row in read(path) if row["case"] not in cases]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def read(path: Path) -> list[Row]:
    """The rows of a file, every value as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
