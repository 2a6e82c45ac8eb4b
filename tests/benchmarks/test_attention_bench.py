"""The attention runner on tiny cases: no speed without correctness, every peer in one grammar, rows that say it all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import quire
from benchmarks import attention, peers, records
from benchmarks.cases import make_inputs, parse_case
from benchmarks.ceilings import GEMM, READ, SGEMM, gemm_size, make_ceilings
from benchmarks.gate import make_gate
from benchmarks.peers import Bench
from benchmarks.progress import Progress
from benchmarks.turns import time_in_turns

SPEC = quire.AttentionSpec(4, 2, 16, page_size=4, dtype=torch.float32)
MIXED = "2x9:1+1x12:12+3x20:6"
IN_PROCESS = ["quire", "sdpa, contiguous", "gather + sdpa"]


def measure(text, names, spec=SPEC):
    with Bench() as bench, Progress() as progress:
        cases = [parse_case(case, spec) for case in text.split(",")]
        return attention.measure(cases, names, 3, bench, progress)


@pytest.mark.parametrize(
    "text",
    [
        MIXED,
        pytest.param("3x17:1@bfloat16", marks=pytest.mark.exhaustive),
        pytest.param(f"{MIXED}@bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("3x17:1@float16", marks=pytest.mark.exhaustive),
    ],
)
def test_peers_that_are_right_get_a_speed_and_its_share_of_the_ceilings(text):
    rows = measure(text, IN_PROCESS)
    assert [row["who"] for row in rows] == [*IN_PROCESS, READ, GEMM, SGEMM]
    rate = {row["who"]: float(row["gb_per_s"] or row["gflop_per_s"]) for row in rows}
    for row in rows[:3]:
        assert row["status"] == "ok"
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["max_error"]) <= float(row["allowed_error"])
        assert math.isclose(float(row["of_read"]), float(row["gb_per_s"]) / rate[READ], abs_tol=0.02)
        assert math.isclose(float(row["of_sgemm"]), float(row["gflop_per_s"]) / rate[SGEMM], abs_tol=0.02)


def test_a_broken_kernel_is_refused_and_nothing_is_timed(monkeypatch):
    """The kernel leaves out one key: a mistake of a few percent, in one row of many."""
    real = peers.quire_planned

    def broken(case, inputs, bench):
        inputs.seq_lens[1] -= 1
        try:
            return real(case, inputs, bench)
        finally:
            inputs.seq_lens[1] += 1

    monkeypatch.setitem(peers.PEERS, "quire", broken)
    ours, theirs = measure("4x9:1", ["quire", "sdpa, contiguous"])
    assert ours["status"] == "wrong"
    assert float(ours["max_error"]) > float(ours["allowed_error"])
    assert theirs["status"] == "ok"
    assert ours["median_ms"] == theirs["median_ms"] == ""


def test_cases_joined_by_a_comma_take_turns_with_one_another(monkeypatch):
    order = []
    real = peers.quire_planned

    def noted(case, inputs, bench):
        ready = real(case, inputs, bench)
        return replace(ready, turn=lambda: order.append((case.name, bench.place)) or ready.turn())

    monkeypatch.setitem(peers.PEERS, "quire", noted)
    rows = [row for row in measure("2x9:1,2x9:1@page2", ["quire"]) if row["who"] == "quire"]
    assert [case for case, _ in order] == ["2x9:1", "2x9:1@page2"] * 3
    assert [row["case"] for row in rows] == ["2x9:1", "2x9:1@page2"]
    for row in rows:
        assert row["together"] == "2x9:1,2x9:1@page2"
        assert len(row["turns_ms"].split()) == 3
        assert float(row["median_ms"]) == sorted(map(float, row["turns_ms"].split()))[1]
    assert {row["together"] for row in measure("2x9:1", ["quire"])} == {""}


def test_a_case_that_is_wrong_does_not_keep_others_from_their_turns(monkeypatch):
    real = peers.quire_planned

    def broken(case, inputs, bench):
        ready = real(case, inputs, bench)
        if case.spec.page_size == 2:
            ready.output.neg_()
        return ready

    monkeypatch.setitem(peers.PEERS, "quire", broken)
    right, *ceilings, wrong = measure("2x9:1,2x9:1@page2", ["quire"])
    assert (right["status"], wrong["status"]) == ("ok", "wrong")
    assert right["median_ms"] != ""
    assert wrong["median_ms"] == wrong["turns_ms"] == ""
    assert [row["who"] for row in ceilings] == [READ, GEMM, SGEMM]


def test_a_broken_peer_gets_no_speed_beside_others_that_do(monkeypatch):
    def broken(case, inputs, bench):
        ready = peers.gather_sdpa(case, inputs, bench)
        ready.output[0, 0, 0] = math.nan
        return ready

    monkeypatch.setitem(peers.PEERS, "gather + sdpa", broken)
    rows = {row["who"]: row for row in measure("4x9:1", IN_PROCESS)}
    assert (rows["gather + sdpa"]["status"], rows["gather + sdpa"]["max_error"]) == ("wrong", "inf")
    assert rows["gather + sdpa"]["median_ms"] == ""
    assert rows["quire"]["median_ms"] != ""


def test_a_broken_kernel_makes_the_command_fail(monkeypatch, tmp_path):
    real = quire.AttentionPlan.run
    monkeypatch.setattr(quire.AttentionPlan, "run", lambda *args, **kw: real(*args, **kw).neg_())
    arguments = ["2x9:1", "--heads", "4/2x16", "--peers", "quire", "--out", str(tmp_path / "out.csv")]
    assert attention.main(arguments) == 1
    [row] = records.read(tmp_path / "out.csv")
    assert row["status"] == "wrong"
    assert row["median_ms"] == ""


def test_what_a_peer_cannot_do_is_said_in_its_row():
    rows = {row["who"]: row for row in measure("3x9:1@int8", ["sdpa, contiguous", "vllm"])}
    assert rows["sdpa, contiguous"]["status"] == "unavailable"
    assert rows["sdpa, contiguous"]["note"] == "no pages in int8"
    rows = {row["who"]: row for row in measure("3x9:1", ["quire", "vllm", "vllm, page 128"])}
    assert rows["vllm"]["note"].startswith("not installed: give the Python")
    assert rows["vllm, page 128"]["median_ms"] == ""


def test_a_run_without_vllms_python_has_no_rows_of_vllm_unless_asked_by_name():
    everyone = attention.parse_args(["2x9:1"], "bench").peers
    assert everyone == [*IN_PROCESS, "flex, paged"]
    assert attention.parse_args(["2x9:1", "--vllm-python", "python"], "bench").peers == list(peers.PEERS)
    assert attention.parse_args(["2x9:1", "--peers", "quire", "vllm"], "bench").peers == ["quire", "vllm"]


def test_the_gate_computes_without_quire_and_in_blocks(monkeypatch):
    case = parse_case(MIXED, SPEC)
    inputs = make_inputs(case)
    whole = make_gate(case, inputs)
    monkeypatch.setattr("benchmarks.gate.BLOCK", 5)
    blocks = make_gate(case, inputs)
    torch.testing.assert_close(blocks.exact, whole.exact, rtol=0, atol=1e-14)
    out = quire.paged_attention(
        inputs.q, inputs.k_pages, inputs.v_pages, inputs.page_table, inputs.seq_lens, inputs.cu_seqlens_q,
        backend="reference",
    )  # fmt: skip
    assert whole.judge(out).good
    out[3, 1, 2] += 1e-4
    assert not whole.judge(out).good


@pytest.mark.parametrize("change", ["float32", "bfloat16", "float16", "int8", "page1", "8/8x80@fp8_e5m2"])
def test_the_yardstick_of_reading_is_as_many_bytes_as_the_case(change):
    case = parse_case(f"8x64:1+1x37:9@{change}", quire.AttentionSpec(8, 8, 128, 16, torch.bfloat16))
    assert make_ceilings(case).bytes_read == case.kv_bytes


def test_ceilings_are_of_the_size_of_the_case():
    case = parse_case("8x64:1", quire.AttentionSpec(8, 8, 128, 16, torch.float32))
    ceilings = make_ceilings(case)
    rates = ceilings.rates(time_in_turns(ceilings.turns, 3)[0])
    assert rates[READ] > 0
    assert set(ceilings.flops) == {GEMM, SGEMM}
    assert gemm_size(3 * 4 * 1024**2, torch.float32) == 1024
    assert gemm_size(1, torch.float32) == gemm_size(1 << 40, torch.float16) == 256
    assert gemm_size(1 << 40, torch.float32) == 4096


def test_arguments_that_are_no_case_end_with_the_grammar(capsys):
    with pytest.raises(SystemExit):
        attention.main(["8x2k"])
    assert "case must look like 8x2048:1" in capsys.readouterr().err
