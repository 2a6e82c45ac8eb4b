"""The table says what was measured, and does not hide where texts part."""

import io

import pytest
from rich.console import Console

from quire.cli.measure import Divergence, Run
from quire.cli.report import agreement, report


def on_pages(seconds=2.0, first=(0.010, 0.020, 0.090)):
    return Run(
        [[1] * 10] * 3,
        seconds,
        list(first),
        allocated_slots=80,
        filled_slots=60,
        kv_bytes=12345,
        pages=5,
        preemptions=2,
    )


def padded(seconds=5.0):
    return Run([[1] * 10] * 3, seconds, [0.5] * 3, allocated_slots=200, filled_slots=50, kv_bytes=54321)


def printed(renderable):
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return console.file.getvalue()


def figures(text):
    """Label → the columns of its row."""
    rows = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in cells if row}


def test_the_table_has_the_figures_of_both_ways():
    table = figures(printed(report([on_pages()], [padded()], num_pages=8, footnote="here")))
    assert table["tokens per second"] == ["15", "6"]
    assert table["time to first token, median"] == ["20.0 ms", "500.0 ms"]
    assert table["time to first token, slowest"] == ["90.0 ms", "500.0 ms"]
    assert table["pages at peak"] == ["5 of 8", "–"]
    assert table["KV cache at peak, bytes"] == ["12,345", "54,321"]
    assert table["slots at peak"] == ["80", "200"]
    assert table["slots wasted"] == ["20", "(25.0 %)", "150", "(75.0 %)"]
    assert table["pages given back and computed again"] == ["2 ×", "–"]
    assert "here" in table


def test_the_speed_shown_is_that_of_the_median_run():
    runs = [
        on_pages(seconds=1, first=(0.1,)),
        on_pages(seconds=30, first=(3,)),
        on_pages(seconds=3, first=(0.2,)),
    ]
    table = figures(printed(report(runs, [], num_pages=8, footnote="")))
    assert table["tokens per second"] == ["10"]
    assert table["time to first token, median"] == ["200.0 ms"]


def test_without_a_comparison_there_is_one_column():
    text = printed(report([on_pages()], [], num_pages=8, footnote=""))
    assert "padded" not in text
    assert figures(text)["slots at peak"] == ["80"]


def test_agreement_counts_the_texts_that_are_the_same():
    assert "token for token: 8/8" in printed(agreement(8, [], str))
    differing = [Divergence(2, 30, 5, 6, 1e-4), Divergence(7, 3, None, 4, None)]
    assert "token for token: 6/8" in printed(agreement(8, differing, str))


SENTENCES = {
    "nearer to pages": (
        Divergence(2, 30, 5, 6, 0.00031),
        "C differs from its token 31 on: pages chose 't5', padded chose 't6'",
        "0.00031 apart, for the pages' choice",
    ),
    "nearer to padded": (
        Divergence(0, 0, 5, 6, -2.5),
        "A differs from its token 1 on",
        "2.5 apart, for the padded choice",
    ),
    "a tie": (Divergence(0, 0, 5, 6, 0.0), "A differs", "0 apart, a tie"),
    "ended": (
        Divergence(1, 3, None, 6, None),
        "B differs from its token 4 on: pages had ended, padded chose 't6'",
        "",
    ),
}


@pytest.mark.parametrize(("difference", "where", "gap"), SENTENCES.values(), ids=SENTENCES.keys())
def test_a_difference_is_said_where_it_is_and_how_near_a_tie(difference, where, gap):
    text = " ".join(printed(agreement(8, [difference], lambda token: f"t{token}")).split())
    assert where in text
    assert gap in text
    assert ("apart" in text) == (difference.gap is not None)
