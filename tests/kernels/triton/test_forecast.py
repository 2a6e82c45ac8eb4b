"""What a plan's launches are said to be, and to take."""

import csv
from pathlib import Path

import pytest
import torch
from support import Shape, make_batch

import quire
from quire.kernels.triton import forecast, tune
from quire.planning.step import plan_step
from quire.planning.work_list import TileShape, Tiling

ROOT = Path(__file__).parents[3]
SPEC = quire.AttentionSpec(8, 2, 64, page_size=16, kv_dtype="int8")


def work_of(seq_lens, q_lens, *, causal=True, workers=3):
    tiling = Tiling(workers, TileShape(4, 16), TileShape(8, 16), whole_tiles=True, decode_max_q_len=0)
    return plan_step(
        torch.zeros(len(seq_lens), 64, dtype=torch.int32), torch.tensor(seq_lens), torch.tensor([0, *q_lens]).cumsum(0),
        num_kv_heads=2, page_size=16, causal=causal, window_left=-1, tiling=tiling,
    ).prefill  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
def test_operations_are_counted_by_visible_pairs(causal):
    lens, q_lens = [100, 40, 5, 333], [100, 3, 9, 70]
    pairs = sum(
        max(0, length - q_len + row + 1) if causal else length
        for length, q_len in zip(lens, q_lens, strict=True)
        for row in range(q_len)
    )
    found = forecast.flops(SPEC, work_of(lens, q_lens, causal=causal), causal)
    assert found == 4 * 64 * 8 * pairs


def test_bytes_are_those_of_rows_and_their_scales():
    work = work_of([100, 40], [1, 1])
    assert forecast.read_bytes(SPEC, work) == 2 * 140 * (2 * 64 + 8)


def test_the_expected_time_is_bytes_over_the_rate_and_a_launch():
    tile = tune.decode_tile(SPEC, tune.known_chip("cuda", 90, 132), few_rows=True, many_items=False)
    work = work_of([1000], [1])
    rates = forecast.Rates(decode_bytes=1e9, prefill_flops=1e9, launch=5e-6)
    text = forecast.describe("decode", SPEC, tile, work, True, rates)
    assert f"decode tile: {tile.rows} rows × {tile.kv_tokens} keys, {tile.num_warps} warps" in text
    assert f"{tile.num_stages} stages" in text
    assert f"expected {5 + 2 * 1000 * 136 / 1e3:.0f} µs a layer at 0.0 TB/s" in text


@pytest.mark.interpreted
def test_a_plan_says_that_nobody_measured_the_chip_it_runs_on():
    batch = make_batch(Shape(torch.bfloat16, 64), [100, 40], [1, 20], page_size=16)
    text = quire.plan(
        *batch.lengths[:2], batch.shape.spec(16), batch.cu_seqlens_q, backend="triton"
    ).explain()
    assert "decode tile: 16 rows" in text
    assert "prefill tile: 128 rows" in text
    assert text.count("this chip was not measured") == 2
    assert "prefill kernel: portable, not Hopper's" in text
    decode_only = quire.plan(batch.page_table[:1], batch.seq_lens[:1], batch.shape.spec(16), backend="triton")
    assert "prefill kernel" not in decode_only.explain()
    assert "decode tile: 8 rows" in decode_only.explain()


def test_the_rates_are_those_of_the_committed_measurements():
    for chip, file in (("NVIDIA H200", "gpu-h200.csv"), ("NVIDIA H100 80GB HBM3", "gpu-h100.csv")):
        with (ROOT / "benchmarks/results" / file).open(newline="") as rows:
            usual = [
                row for row in csv.DictReader(rows) if row["heads"] == "32/8x128" and row["page_size"] == "16"
            ]
        [decode] = [
            float(row["tb_per_s"])
            for row in usual
            if (row["section"], row["case"], row["kv_dtype"]) == ("decode", "8x32k:1", "")
        ]
        [prefill] = [
            float(row["tflop_per_s"])
            for row in usual
            if (row["section"], row["case"], row["kv_dtype"]) == ("prefill", "1x16k:16k", "")
        ]
        rates = forecast.MEASURED[chip]
        assert rates.decode_bytes / 1e12 == pytest.approx(decode, rel=0.05)
        assert rates.prefill_flops / 1e12 == pytest.approx(prefill, rel=0.05)
