"""What the GPU script does, and that every handler it names runs (here on the host, with the reference)."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from benchmarks.cases import parse_case
from benchmarks.gpu import graphs, peers, speed, tune
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.device import Host
from benchmarks.gpu.jobs import Job, Setting
from benchmarks.gpu.report import read_csv
from benchmarks.gpu.speed import parse_spec
from benchmarks.gpu.suite import SECTIONS, SKEWED, SPECULATIVE, make_jobs, warm_up_jobs
from benchmarks.gpu.worker import HANDLERS, run_guarded
from quire.kernels import reference

SETTING = Setting("cpu", "reference", seed=3, quick=True)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("section", SECTIONS)
def test_jobs_can_be_handed_to_a_worker(section, quick):
    jobs = make_jobs(section, quick)
    assert jobs
    assert all(job.kind in HANDLERS for job in jobs)
    assert json.loads(json.dumps([job.arguments for job in jobs])) == [job.arguments for job in jobs]
    assert len({(job.kind, job.title) for job in jobs}) == len(jobs)
    for job in jobs:
        if "case" in job.arguments:
            parse_case(job.arguments["case"], parse_spec(job.arguments["heads"], 16, "bfloat16", None))


def test_the_skewed_batch_holds_the_tokens_of_the_balanced_one():
    spec = parse_spec("32/8x128", 16, "bfloat16", None)
    skewed, balanced = (sum(parse_case(text, spec).seq_lens) for text in (SKEWED, "64x4k:1"))
    assert abs(skewed - balanced) <= 64


def test_decode_has_several_queries_and_every_common_head_dim_once():
    jobs = [job for job in make_jobs("decode", False) if job.kind == "decode"]
    several = {(job.arguments["case"], job.arguments["kv_dtype"]) for job in jobs if job.title.count(":4 ")}
    assert several == {(case, kv_dtype) for case in SPECULATIVE for kv_dtype in (None, "int8")}
    assert {job.arguments["heads"].rpartition("x")[2] for job in jobs} == {"64", "128", "256"}


def test_random_checks_are_those_of_the_seed():
    assert make_jobs("checks", False, 1) == make_jobs("checks", False, 1)
    assert make_jobs("checks", False, 1) != make_jobs("checks", False, 2)


def test_a_failing_job_is_a_row():
    [row] = run_guarded(Job("decode", "x", {"case": "nonsense"}), Host(), SETTING)
    assert (row["section"], row["case"], row["status"]) == ("decode", "x", "failed")
    assert "ValueError: case must look like" in row["note"]


@pytest.mark.parametrize("what", ["copy", "read", "gemm"])
def test_a_ceiling_is_counted_and_timed(what):
    [row] = speed.time_ceiling(Host(), SETTING, what=what)
    assert row["median_us"] > 0
    assert row.get("kv_bytes") or row.get("flops") == 2 * 256**3


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_case_is_judged_and_timed(kv_dtype):
    [row] = speed.time_attention(
        Host(), SETTING, case="2x60:1+1x20:20", heads="4/2x16", kv_dtype=kv_dtype, label="mixed"
    )
    scales = 140 * 2 * 2 * 4 if kv_dtype else 0
    assert row["kv_bytes"] == 140 * 2 * 2 * 16 * (1 if kv_dtype else 2) + scales
    assert (row["status"], row["case"]) == ("ok", "mixed")
    assert row["median_us"] > 0
    assert row["plan_us"] > 0
    assert row["replan_us"] > 0


def test_what_is_wrong_is_not_timed(monkeypatch):
    right = reference.attend
    monkeypatch.setattr(reference, "attend", lambda step, call: [right(step, call), call.out.mul_(1.1)])
    [row] = speed.time_attention(Host(), SETTING, case="2x60:1", heads="4/2x16")
    assert row["status"] == "wrong"
    assert "median_us" not in row


def test_the_store_is_timed():
    [row] = speed.time_write_kv(Host(), SETTING, tokens=8, heads="4/2x16", page_size=16, kv_dtype="int8")
    assert row["kv_bytes"] == 8 * (2 * 2 * (16 * 2 + 16 * 1 + 4) + 8)  # rows, pages, scales; and a slot
    assert row["median_us"] > 0


@pytest.mark.parametrize("case", ["2x64:1", "2x40:40", "1x60:20"])
def test_peers_compute_the_same(case):
    rows = peers.time_peer(Host(), SETTING, case=case, who=["sdpa", "gather + sdpa"], heads="4/2x16")
    assert [row["status"] for row in rows] == ["ok"] * 3


@pytest.mark.parametrize("case", ["2x256:1", "1x256:256", "1x256:128"])
def test_flex_attention_reads_our_pages(case):
    rows = peers.time_peer(Host(), SETTING, case=case, who=["flex"], heads="4/2x16", page_size=128)
    assert [row["status"] for row in rows] == ["ok"] * 2


def test_a_peer_that_cannot_is_a_row():
    rows = peers.time_peer(Host(), SETTING, case="1x64:1+1x32:1", who=["sdpa", "nobody"], heads="4/2x16")
    assert [row["status"] for row in rows] == ["ok", "unavailable", "unavailable"]


def test_a_replayed_step_is_compared_with_plain_launches(monkeypatch):
    assert [row["status"] for row in graphs.check_graph(Host(), SETTING, kv_dtype="int8")] == ["ok"]
    monkeypatch.setattr(Host, "capture", lambda self, calls: lambda: None)  # a graph that does nothing
    [row] = graphs.check_graph(Host(), SETTING)
    assert row["status"] == "wrong"


def test_without_the_memory_checker_the_row_says_so(monkeypatch):
    monkeypatch.setattr(graphs.shutil, "which", lambda name: None)
    [row] = graphs.check_memory(Host(), SETTING, seconds=1)
    assert row["status"] == "unavailable"


def test_what_the_memory_checker_watches_runs():
    graphs.small_step("cpu", "reference")


class Tile(NamedTuple):
    rows: int = 128
    num_warps: int = 2


def test_candidates_are_tried_in_place_of_the_tables_tiles(monkeypatch):
    table = ModuleType("quire.kernels.reference.tune")
    table.prefill_tile = lambda spec, chip: Tile()
    monkeypatch.setitem(sys.modules, table.__name__, table)
    monkeypatch.setattr(sys.modules["quire.kernels.reference"], "__path__", [], raising=False)
    used = []
    right = reference.prepare
    monkeypatch.setattr(
        reference, "prepare", lambda *a: [used.append(table.prefill_tile(None, None)), right(*a)][1]
    )
    candidates = {"num_warps": [4, 8]}
    jobs = [job for kind in ("compile", "tune") for job in tune.jobs(kind, candidates, True, ("prefill",))]
    rows = [
        row
        for job in jobs
        for row in HANDLERS[job.kind](Host(), SETTING, **job.arguments | {"heads": "4/2x16"})
    ]
    assert list(dict.fromkeys(used)) == [Tile(128, 4), Tile(128, 8)]
    assert table.prefill_tile(None, None) == Tile()
    assert [row["who"] for row in rows] == ["num_warps=4", "num_warps=8"]
    assert all(row["median_us"] > 0 for row in rows)


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_the_triton_kernels_take_their_tiles_from_the_table_that_is_overridden(kernel):
    pytest.importorskip("triton")
    from quire.kernels import triton

    spec = parse_spec("32/8x128", 16, "bfloat16", None)
    chosen = {name: values[-1] for name, values in tune.CANDIDATES[kernel].items()} | {"kv_tokens": 32}
    with tune.override(Setting(backend="triton"), kernel, chosen):
        changed = getattr(triton.tiling(spec, torch.device("cpu"), 8), kernel)
    assert changed.kv_tokens == 32
    assert changed != getattr(triton.tiling(spec, torch.device("cpu"), 8), kernel)


def test_every_kernel_that_is_timed_is_compiled_ahead():
    jobs = [job for section in ("decode", "prefill", "mixed") for job in make_jobs(section, False)]
    warm = warm_up_jobs(jobs)
    assert len({job.title for job in warm}) == len(warm) < 30
    kinds = {tuple(job.arguments[name] for name in ("heads", "page_size", "kv_dtype")) for job in warm}
    timed = {
        tuple(job.arguments[name] for name in ("heads", "page_size", "kv_dtype"))
        for job in jobs
        if "case" in job.arguments
    }
    assert timed == kinds
    assert {job.arguments["case"] for job in warm} == {"2x300:1", "2x300:4", "2x300:1+1x400:300"}
    assert HANDLERS["warm up"](Host(), SETTING, **warm[0].arguments | {"heads": "4/2x16"}) == []


def test_one_call_writes_a_file_a_log_and_a_table(tmp_path, capsys, monkeypatch):
    dry = ["--device", "cpu", "--backend", "reference", "--quick", "--seed", "5"]
    words = ["gpu", *dry, "--only", "ceilings,graphs", "--out"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path)])
    monkeypatch.setenv("QUIRE_COMMIT", "abc1234")
    assert main() == 0
    rows = read_csv(tmp_path / "gpu-dry-run.csv")
    assert [row["section"] for row in rows] == ["ceiling"] * 3 + ["graph"] * 2 + ["sanitizer"]
    assert {row["commit"] for row in rows} == {"abc1234"}
    assert "ceiling gemm" in capsys.readouterr().out
    assert "section=ceiling case=copy" in (tmp_path / "log.txt").read_text()
