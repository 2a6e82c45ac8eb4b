"""The host's costs: a row per call, none without a right result, and goals that name calls which are measured."""

from __future__ import annotations

import pytest
import torch

import quire
from benchmarks import host, records
from benchmarks.cases import parse_case

CALLS = [(who, name) for name in ("1x9:1", "2x40:1") for who in ("quire.plan", "Planner.plan")]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(host, "PLANNED", ["1x9:1", "2x40:1"])


def test_every_goal_is_of_a_call_that_is_measured(monkeypatch):
    monkeypatch.undo()
    calls = {(who, name) for name in host.PLANNED for who in ("quire.plan", "Planner.plan")}
    assert host.GOALS.keys() <= calls | {("plan.run", host.ONE_KEY)}


def test_a_step_has_a_page_for_every_sixteen_keys_and_one_token_a_sequence():
    table, seq_lens, starts = host.step_of(parse_case("256x8k:1", host.SPEC))
    assert table.shape == (256, 512)
    assert sorted(table.view(-1).tolist()) == list(range(256 * 512))
    assert set(seq_lens.tolist()) == {8192}
    assert starts.tolist() == list(range(257))


def test_a_row_per_call_says_where_it_comes_from(tmp_path, capsys):
    assert host.main(["--rounds", "3", "--out", str(tmp_path / "host.csv")]) == 0
    rows = records.read(tmp_path / "host.csv")
    assert [(row["who"], row["case"]) for row in rows] == [
        *CALLS, ("plan.run", "1x1:1"), ("write_kv", "8 tokens"),
    ]  # fmt: skip
    for row in rows:
        assert (row["status"], row["rounds"]) == ("ok", "3")
        assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        assert row["command"] == "python -m benchmarks.host --rounds 3 --out PATH"
        assert all(row[name] for name in ("date", "machine", "threads", "versions", "commit"))
    assert "write_kv" in capsys.readouterr().out


def test_what_computes_wrongly_is_not_timed_and_the_command_fails(monkeypatch, tmp_path):
    real = quire.AttentionPlan.run
    monkeypatch.setattr(quire.AttentionPlan, "run", lambda *args, **kw: real(*args, **kw).neg_())
    monkeypatch.setattr(quire, "write_kv", lambda *args: None)
    assert host.main(["--rounds", "2", "--out", str(tmp_path / "host.csv")]) == 1
    by_call = {row["who"]: row for row in records.read(tmp_path / "host.csv")}
    for who in ("plan.run", "write_kv"):
        assert (by_call[who]["status"], by_call[who]["median_us"]) == ("wrong", "")
    assert by_call["quire.plan"]["status"] == "ok"


def test_tokens_left_in_memory_by_an_earlier_run_do_not_pass_for_stored_ones(monkeypatch):
    same = quire.KVPool(host.SPEC, num_layers=1, num_pages=1024)
    monkeypatch.setattr(quire, "KVPool", lambda *args, **kw: same)
    torch.manual_seed(0)
    assert host.store_turn()
    monkeypatch.setattr(quire, "write_kv", lambda *args: None)
    torch.manual_seed(0)
    assert host.store_turn() is None
