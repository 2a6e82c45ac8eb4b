"""Rates, shares of ceilings, the table's limits, and a file that reads back."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.goals import goals
from benchmarks.gpu.markdown import tables
from benchmarks.gpu.suite import MIXED

ROOT = Path(__file__).parent.parent.parent

CEILINGS = [
    {"section": "ceiling", "case": "copy", "who": "c", "status": "ok", "median_us": 1000.0, "kv_bytes": 4e9},
    {"section": "ceiling", "case": "read", "who": "c", "status": "ok", "median_us": 1000.0, "kv_bytes": 2e9},
    {"section": "ceiling", "case": "gemm", "who": "c", "status": "ok", "median_us": 1000.0, "flops": 8e11},
]


def a_row(**fields):
    row = {
        "section": "decode", "case": "8x1k:1", "heads": "32/8x128", "page_size": 16, "who": "quire", "status": "ok",
        "median_us": 100.0, "launched_us": 120.0, "host_us": 9.0, "plan_us": 50.0, "replan_us": 20.0,
        "kv_bytes": 1e8, "flops": 1e9,
    }  # fmt: skip
    return row | fields


def test_rates_are_amounts_over_time_and_shares_are_of_this_runs_ceilings():
    rows = [dict(row) for row in CEILINGS] + [a_row()]
    report.derive(rows)
    assert rows[0]["tb_per_s"] == 4.0
    assert (rows[3]["tb_per_s"], rows[3]["of_copy"], rows[3]["of_read"]) == (1.0, 0.25, 0.5)
    assert (rows[3]["tflop_per_s"], rows[3]["of_gemm"]) == (10.0, 0.0125)


def test_a_row_without_a_time_has_no_rate():
    rows = [dict(CEILINGS[0]), {"section": "decode", "case": "x", "status": "wrong", "kv_bytes": 1e9}]
    report.derive(rows)
    assert "tb_per_s" not in rows[1]


def test_the_table_shows_what_failed_and_stays_short():
    rows = [dict(row) for row in CEILINGS]
    rows += [
        a_row(case=f"{i}x1k:1", page_size=p, kv_dtype=kv)
        for i in range(90)
        for p in (16, 64, 128)
        for kv in ("", "int8")
    ]
    rows += [
        {"section": "check", "case": f"c{i}", "status": "wrong", "note": "error 1\n2"} for i in range(50)
    ]
    rows += [{"section": "peer", "case": "y", "status": "skipped", "note": "no time"}]
    report.derive(rows)
    text = report.table(rows)
    assert len(text.splitlines()) <= 80
    assert len(text) <= 11_000
    assert "50 wrong" in text
    assert "!! check c0 : wrong: error 1 2" in text
    assert "skipped for time (1): peer y" in text


@pytest.mark.parametrize("rows", [[], [{"section": "decode", "case": "x", "status": "failed", "note": "n"}]])
def test_the_table_of_a_run_that_failed_is_a_table(rows):
    assert isinstance(report.table(rows), str)
    assert isinstance(report.tune_table(rows), str)


def test_candidates_are_listed_fastest_first():
    rows = [a_row(who=f"warps={i}", section="tune", median_us=float(i), tb_per_s=1.0) for i in (8, 2, 4)]
    lines = report.tune_table(rows).splitlines()
    assert [line.split()[-1] for line in lines[2:5]] == ["warps=2", "warps=4", "warps=8"]


def test_a_file_reads_back(tmp_path):
    rows = [a_row(note="two\nlines"), dict(CEILINGS[0])]
    report.derive(rows)
    path = report.write_csv(tmp_path / "gpu.csv", {"gpu": "NVIDIA H100 80GB HBM3", "seed": 7}, rows)
    back = report.read_csv(path)
    assert (back[0]["median_us"], back[0]["tb_per_s"], back[0]["note"]) == (100.0, 1.0, "two lines")
    assert (back[0]["gpu"], back[0]["seed"]) == ("NVIDIA H100 80GB HBM3", 7)
    assert "heads" not in back[1]


@pytest.mark.parametrize(
    ("gpu", "stem"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu-h100"),
        ("NVIDIA H200", "gpu-h200"),
        ("NVIDIA A100-SXM4-80GB", "gpu-a100"),
        ("NVIDIA L40S", "gpu-l40s"),
        ("none (dry run on the CPU)", "gpu-dry-run"),
        ("unknown", "gpu-other"),
    ],
)
def test_files_are_named_after_the_chip(gpu, stem):
    assert report.stem(gpu) == stem


def test_plots_are_drawn_from_the_file_alone(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.gpu.plots import plot

    rows = [dict(row) for row in CEILINGS] + [a_row(), a_row(section="prefill", case="1x8k:8k")]
    rows += [a_row(section="peer", who="sdpa flash"), a_row(section="peer", who="sdpa flash", case="1x8k:8k")]
    report.derive(rows)
    path = report.write_csv(tmp_path / "gpu-h100.csv", {"gpu": "NVIDIA H100"}, rows)
    names = {written.name for written in plot(path, tmp_path)}
    assert names == {
        f"gpu-h100-{what}.{suffix}" for what in ("decode", "prefill") for suffix in ("svg", "png")
    }
    svg = (tmp_path / "gpu-h100-decode.svg").read_text()
    words = (
        "Quire<",
        "FlashAttention-2, contiguous<",
        "decode, 8 × 1k keys<",
        "100 µs<",
        "Quire's decode on pages, NVIDIA H100",
    )
    for word in words:
        assert f">{word}" in svg, word
    assert "FlashAttention-3" not in svg, "its paper has figures of prefill alone"
    assert ">FlashAttention-3, its paper<" in (tmp_path / "gpu-h100-prefill.svg").read_text()


@pytest.mark.parametrize(("gpu", "shown"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA A100", False)])
def test_the_published_line_is_the_paper_s_rate_on_the_rows_own_products_and_on_its_chip_alone(gpu, shown):
    plots = pytest.importorskip("benchmarks.gpu.plots")
    row = a_row(section="prefill", case="1x8k:8k", median_us=1000.0, tflop_per_s=301.0, gpu=gpu)
    _, times = plots.series([row], "prefill")
    assert times["Quire"] == {"1x8k:8k": (1000.0, 1000.0, 1000.0)}
    assert (plots.PUBLISHED in times) == shown
    if shown:
        assert times[plots.PUBLISHED]["1x8k:8k"][0] == pytest.approx(1000.0 * 301 / 602)


def test_the_committed_plots_hold_the_time_of_every_rival():
    for path in sorted((ROOT / "benchmarks/results").glob("gpu-*-decode.svg")):
        text = path.read_text()
        rows = report.read_csv(path.with_name(path.name.replace("-decode.svg", ".csv")))
        for row in rows:
            if (
                row["section"] == "peer"
                and row["case"].endswith(":1")
                and row["who"] != "quire"
                and row.get("median_us")
            ):
                us = row["median_us"]
                time = f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.1f} µs" if us < 100 else f"{us:.0f} µs"
                assert f">{time}<" in text, (path.name, row["who"], row["case"])


def test_the_tables_of_the_docs_are_made_from_the_committed_files():
    page = (ROOT / "docs/gpu.md").read_text()
    measured = [
        path
        for path in sorted((ROOT / "benchmarks/results").glob("gpu-*.csv"))
        if "tune" not in path.name and "serving" not in path.name
    ]
    for path in measured:
        assert tables(path) in page
    assert bool(measured) != ("Not measured yet" in page)


def test_tables_hold_every_case_and_the_peers_beside_it(tmp_path):
    rows = [dict(row) for row in CEILINGS] + [a_row(), a_row(kv_dtype="int8", median_us=60.0)]
    rows += [
        a_row(section="peer", who="sdpa flash"),
        a_row(section="peer", who="sdpa flash", case="not ours:1"),
    ]
    rows += [
        a_row(section="prefill", case="1x8k:8k", heads="64/8x128"),
        {"section": "check", "case": "x", "status": "ok"},
    ]
    report.derive(rows)
    path = report.write_csv(
        tmp_path / "gpu-h100.csv", dict.fromkeys(report.FACTS, "?") | {"gpu": "H100"}, rows
    )
    lines = tables(path).splitlines()
    assert "| case | bf16, page 16 | int8, page 16 | sdpa flash |" in lines
    assert "| `8x1k:1` | 100.0 (1.00) | 60.0 (1.67) | 100.0 (1.00) |" in lines
    assert "| `1x8k:8k` 64/8 × 128 | 100 (10) |" in lines
    assert "copy 4.00 TB/s, read 2.00 TB/s, gemm 800 TFLOP/s" in tables(path)
    assert "1 checks against the reference passed, 0 failed" in tables(path)
    assert "not ours" not in tables(path)


def test_goals_are_set_beside_what_was_measured():
    rows = [dict(row) for row in CEILINGS]
    rows += [a_row(case="8x32k:1", kv_bytes=4e8), a_row(case="8x32k:1", page_size=128, median_us=80.0)]
    rows += [
        a_row(case="8x32k:1", kv_dtype="int8", median_us=50.0),
        a_row(case="8x32k:1", heads="64/8x128", median_us=1.0),
    ]
    rows += [a_row(case="64 skewed", median_us=121.0), a_row(case="64x4k:1", median_us=110.0)]
    rows += [a_row(section="prefill", case="1x8k:8k", flops=5e10)]
    times = zip(MIXED.values(), (90.0, 60.0, 40.0), strict=True)
    rows += [a_row(section="mixed", case=label, median_us=us) for label, us in times]
    report.derive(rows)
    assert goals(rows) == [
        "8x32k:1 4.00 TB/s (≥ 4.2)",
        "prefill 1x8k:8k 500 TFLOP/s (≥ 600)",
        "page 16 takes at most 1.250 × page 128 (≤ 1.05)",
        "int8 2.00 × bf16 at 8x32k (≥ 1.6)",
        "skewed 1.100 × balanced (≤ 1.1)",
        "mixed 0.900 × its parts one after the other",
    ]
