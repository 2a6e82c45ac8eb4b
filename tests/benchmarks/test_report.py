"""Tables and plots say what the rows say, of those that are missing too."""

from __future__ import annotations

import re

import pytest

from benchmarks import attention, generation, records, report
from benchmarks.ceilings import GEMM, READ, SGEMM
from benchmarks.environment import ROOT
from benchmarks.words import case_in_words, name_of


def timed(case: str, who: str, bound_by: str = "reading", **figures: str) -> records.Row:
    about = {
        "machine": "2-core Kind avx512f", "threads": "2", "date": "2026-01-02", "commit": "abc1234",
        "case": case, "heads": "4/2x16", "page_size": "4", "dtype": "bfloat16", "kv_dtype": "",
        "bound_by": bound_by, "kv_mb": "1.0", "fits_in": "L2", "who": who,
    }  # fmt: skip
    figures = {"status": "ok", **figures}
    return about | {column: figures.get(column, "") for column in attention.COLUMNS}


ROWS = [
    timed(
        "8x2k:1", "quire", median_ms="1.2345", p20_ms="1.2", p80_ms="1.3", gb_per_s="12.34", of_read="0.853"
    ),
    timed("8x2k:1", "vllm", status="unavailable", note="not installed: give the Python"),
    timed("8x2k:1", READ, gb_per_s="14.50"),
    timed(
        "1x2k:2k",
        "quire",
        "multiplying",
        median_ms="80",
        p20_ms="79",
        p80_ms="81",
        gflop_per_s="412.4",
        of_gemm="0.2",
    ),
    timed("1x2k:2k", "vllm", "multiplying", status="wrong", note="error 1"),
    timed("1x2k:2k", GEMM, "multiplying", gflop_per_s="2000.0"),
    timed("1x2k:2k", SGEMM, "multiplying", gflop_per_s="300.0"),
]
SPEEDS = {"tokens_per_s": "180.4", "p20_tokens_per_s": "170.2", "p80_tokens_per_s": "190.1"}
ENGINE = {"machine": "2-core Kind", "threads": "2", "date": "2026-01-02", "commit": "abc1234", "case": "8x16-256:64",
          "model": "llama", "dtype": "float32"} | dict.fromkeys(generation.COLUMNS, "")  # fmt: skip
ENGINES = [
    ENGINE | {"who": "quire", "status": "ok"} | SPEEDS,
    ENGINE
    | {"who": "model.generate", "status": "ok"}
    | SPEEDS
    | {"tokens_per_s": "90.2", "p20_tokens_per_s": "89.0"},
    ENGINE | {"who": "openvino-genai", "status": "unavailable", "note": "not installed"},
]


def test_a_line_per_case_with_the_ceiling_that_binds_it():
    lines = report.attention_table(ROWS).splitlines()
    assert lines[0] == "| case | fits in | quire | vllm | Quire's rate | ceiling |"
    assert lines[2] == "| `8x2k:1` | L2 | 1.23 | – | 12.3 GB/s | 85% of reading |"
    assert lines[3] == "| `1x2k:2k` | L2 | 80.00 | wrong | 412 GFLOP/s | 20% of bfloat16 gemm |"


def test_the_short_table_has_words_and_the_share_of_the_ceiling():
    lines = report.short_table(ROWS).splitlines()
    assert lines[0] == "| milliseconds a call | Quire | vLLM | Quire, of the ceiling |"
    assert lines[2] == "| decode, 8 × 2k keys | 1.23 | – | 85% of reading |"
    assert lines[3] == "| a prompt of 2k | 80.00 | wrong | 20% of bfloat16 gemm |"


def test_files_of_the_serving_table_are_found_by_device_and_their_plots_are_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.serving_tables(report.serving_files("cpu")) == report.NOT_MEASURED
    for name in ("cpu-serving.csv", "gpu-serving.csv", "gpu-h100-serving.csv", "cpu-shapes.csv"):
        (tmp_path / name).touch()
    assert [path.name for path in report.serving_files("cpu")] == ["cpu-serving.csv"]
    assert [path.name for path in report.serving_files("gpu")] == ["gpu-h100-serving.csv", "gpu-serving.csv"]
    monkeypatch.setattr(report.of_serving, "markdown", lambda rows: "| a table |")
    text = report.serving_tables(report.serving_files("cpu"))
    assert text.startswith("| a table |\n\n![")
    assert all(f"cpu-serving-{name}.svg" in text for name in ("load", "comparison"))


def test_the_middle_rounds_stand_behind_the_median_where_asked_for():
    lines = report.attention_table(ROWS, spread=True).splitlines()
    assert lines[2] == "| `8x2k:1` | L2 | 1.23 (1.20 – 1.30) | – | 12.3 GB/s | 85% of reading |"
    assert lines[3].startswith("| `1x2k:2k` | L2 | 80.00 (79.00 – 81.00) | wrong |")


def test_the_origin_of_rows_is_their_machine_and_commit():
    row = ROWS[0] | {"rounds": "9"}
    text = "*2-core Kind avx512f, 2 threads; 2026-01-02, commit abc1234, 9 rounds.*"
    assert report.origin([row]) == text
    assert report.origin([row | {"threads": "1"}]) == text.replace("2 threads", "1 thread")


def test_a_line_per_engine_beside_the_padded_batch():
    lines = report.generation_table(ENGINES).splitlines()
    assert lines[2] == "| quire | 180 | 170 – 190 | 2.00 |"
    assert lines[4] == "| openvino-genai | unavailable | | |"


def test_a_ratio_across_cases_is_that_of_each_round(monkeypatch):
    monkeypatch.setattr(report, "COMPARISONS", {"a": ["b", "c"], "d": ["a"], "e": ["a"]})
    rows = [
        timed("a", "quire", together="a,b,c", turns_ms="11.0 30.0 12.0"),
        timed("b", "quire", together="a,b,c", turns_ms="6.0 15.0 5.0"),
        timed("c", "quire", together="a,b,c", turns_ms="4.0 15.0 5.0"),
        timed("c", "sdpa, contiguous", together="a,b,c", turns_ms="1.0 1.0 1.0"),
        timed("d", "quire", turns_ms="1.0 1.0 1.0"),  # timed by itself: nothing can be said
    ]
    lines = report.comparison_table(rows).splitlines()
    assert lines[2:] == ["| `a` | `b` + `c` | 1.10 | 1.04 – 1.16 |"]
    assert report.comparison_table(rows[-1:]) == report.NOT_MEASURED
    del rows[-1]["turns_ms"]  # as in files of before
    assert report.comparison_table(rows[-1:]) == report.NOT_MEASURED


def test_a_line_per_call_of_the_host_with_what_was_set_out_for():
    call = {"machine": "2-core Kind", "threads": "2", "date": "2026-01-02", "commit": "abc1234", "rounds": "9",
            "case": "1x2k:1", "who": "quire.plan", "status": "ok", "goal_us": "10"}  # fmt: skip
    timed_call = call | {"median_us": "12.54", "p20_us": "12.01", "p80_us": "13.20"}
    wrong_call = call | dict.fromkeys(("median_us", "p20_us", "p80_us", "goal_us"), "") | {"status": "wrong"}
    lines = report.host_table([timed_call, wrong_call]).splitlines()
    assert lines[2:4] == [
        "| `quire.plan` | `1x2k:1` | 12.5 | 12.0 – 13.2 | ≤ 10 |",
        "| `quire.plan` | `1x2k:1` | wrong |  |  |",
    ]
    assert lines[5] == "*2-core Kind, 2 threads; 2026-01-02, commit abc1234, 9 rounds.*"


TRACE = {"machine": "2-core Kind", "threads": "2", "date": "2026-01-02", "commit": "abc1234", "rounds": "3",
         "case": "again", "status": "ok"}  # fmt: skip
TIMES = {"first_token_median_ms": "26.4", "first_token_p20_ms": "25.9", "first_token_p80_ms": "27.8",
         "trace_median_ms": "4634.29", "trace_p20_ms": "4000", "trace_p80_ms": "5000"}  # fmt: skip
TRACES = [
    TRACE | {"who": "with prefix caching", "hit_rate": "0.9999", "theoretical_hit_rate": "0.9999"} | TIMES,
    TRACE
    | {"who": "without prefix caching", "hit_rate": "0.0", "theoretical_hit_rate": "0.0", "status": "wrong"}
    | dict.fromkeys(TIMES, ""),
]


def test_a_line_per_trace_and_engine_says_what_was_found_and_how_long_it_took():
    lines = report.prefix_table(TRACES).splitlines()
    assert lines[2:4] == [
        "| `again` | with prefix caching | 100.0% | 100.0% | 26 (26 – 28) | 4,634 (4,000 – 5,000) |",
        "| `again` | without prefix caching | 0.0% | 0.0% | wrong | wrong |",
    ]


def test_a_table_takes_the_place_of_the_one_before():
    text = "a\n<!-- bench: x -->\nold\n<!-- end -->\nb\n<!-- bench: y -->\nother\n<!-- end -->\n"
    new = report.put(text, "bench: x", "| new |")
    assert new == text.replace("old\n", "\n| new |\n\n")
    assert report.put(new, "bench: x", "| new |") == new
    with pytest.raises(ValueError, match="must hold <!-- bench: z -->"):
        report.put(text, "bench: z", "")


def test_the_plots_show_every_row_that_was_timed(tmp_path):
    plots = pytest.importorskip("benchmarks.plots")
    records.write(tmp_path / "cpu.csv", ROWS)
    drawn = plots.attention(tmp_path / "cpu.csv")
    assert drawn == tmp_path / "cpu.svg"
    text = drawn.read_text()
    for word in (
        "decode, 8 × 2k keys<",
        "a prompt of 2k<",
        "Quire<",
        "1.23<",
        "80<",
        "2-core Kind",
        "dashed: ",
    ):
        assert f">{word}" in text, word
    assert "vLLM" not in text, "what was wrong has no time"

    records.write(tmp_path / "engines.csv", ENGINES)
    text = plots.generation(tmp_path / "engines.csv").read_text()
    assert all(f">{word}<" in text for word in ("Quire", "transformers' generate", "180", "90"))
    assert "OpenVINO" not in text

    records.write(tmp_path / "prefix.csv", TRACES)
    text = plots.prefix(tmp_path / "prefix.csv").read_text()
    assert all(f">{word}<" in text for word in ("a long prompt,", "26", "4,634", "Quire with prefix caching"))
    assert "without" not in text, "what was wrong has no time"


def test_the_same_rows_draw_the_same_plot(tmp_path):
    plots = pytest.importorskip("benchmarks.plots")
    records.write(tmp_path / "cpu.csv", ROWS)
    assert (
        plots.attention(tmp_path / "cpu.csv").read_bytes()
        == plots.attention(tmp_path / "cpu.csv").read_bytes()
    )


def test_the_committed_plot_of_prefixes_holds_the_committed_rows():
    text = report.PREFIX.with_suffix(".svg").read_text()
    for row in records.read(report.PREFIX):
        assert f">{name_of(row['who'])}<" in text
        assert f">{float(row['first_token_median_ms']):,.0f}<" in text
        assert f">{float(row['trace_median_ms']):,.0f}<" in text
        assert row["commit"] in text


def test_the_committed_plot_of_attention_names_every_case_and_time():
    text = report.ATTENTION.with_suffix(".svg").read_text()
    for row in records.read(report.ATTENTION):
        if row["median_ms"]:
            assert f">{name_of(row['who'])}<" in text
            ms = float(row["median_ms"])
            assert f">{ms:.2f}<" in text if ms < 10 else f">{ms:.0f}<" in text
        assert all(
            f">{line}<" in text
            for line in case_in_words(row["case"]).replace(" beside", "\nbeside").split("\n")
        )
        assert row["commit"] in text


def test_the_committed_plot_of_engines_names_each_and_its_rate():
    text = report.GENERATION.with_suffix(".svg").read_text()
    for row in records.read(report.GENERATION):
        if row["tokens_per_s"]:
            assert f">{name_of(row['who'])}<" in text
            assert f">{float(row['tokens_per_s']):.0f}<" in text
        assert row["commit"] in text


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.svg")), ids=lambda path: path.name)
def test_a_committed_plot_names_quire_follows_light_and_dark_and_fits_a_page(path):
    text = path.read_text()
    assert re.search(">[^<]*Quire", text)
    assert "prefers-color-scheme:dark" in text
    width = float(re.search(r'<svg [^>]*width="([\d.]+)pt"', text)[1])
    assert width * 4 / 3 <= 830
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:bold )?([\d.]+)px", text)]
    assert sizes
    assert min(sizes) >= 8, "points, each of which is 4/3 of a pixel"


def test_committed_rows_name_where_they_come_from():
    found = [
        path
        for path in (report.ATTENTION, report.SHAPES, report.GENERATION, report.HOST, report.PREFIX)
        if path.exists()
    ]
    for path in found:
        for row in records.read(path):
            assert all(row[name] for name in ("date", "machine", "threads", "versions", "commit", "command"))
            assert row["command"].startswith("python -m benchmarks.")
            assert str(ROOT) not in row["command"]
