"""What prefix caching saves: no time without the same tokens and every hit that full pages allow."""

from __future__ import annotations

import pytest

from benchmarks import prefix, records
from quire import LLM


@pytest.fixture(autouse=True)
def small_traces(monkeypatch):
    sizes = {
        "CONVERSATIONS": 2,
        "TURNS": 3,
        "SAID": 21,
        "ANSWERED": 4,
        "COMMON": 40,
        "OWN": 3,
        "QUESTIONS": 3,
    }
    for name, size in {**sizes, "REPLIED": 3, "LONG": 64, "VOCAB": 97, "LAYERS": 1}.items():
        monkeypatch.setattr(prefix, name, size)
    monkeypatch.setattr(
        prefix,
        "engines",
        lambda: {
            who: LLM(
                prefix.model(),
                page_size=16,
                num_pages=64,
                backend="reference",
                enable_prefix_caching=who == "with",
            )
            for who in ("with", "without")
        },
    )


def test_hits_are_those_that_full_pages_allow_and_rows_say_where_they_come_from(tmp_path, capsys):
    assert prefix.main(["--rounds", "2", "--out", str(tmp_path / "prefix.csv")]) == 0
    rows = {(row["case"], row["who"]): row for row in records.read(tmp_path / "prefix.csv")}
    assert len(rows) == 6
    rates = {case: float(row["hit_rate"]) for (case, who), row in rows.items() if who.startswith("with ")}
    # Turns of 21, 46 and 71 tokens, of which 24 and 49 were computed before; 40 of 43; 63 of 64.
    assert rates == pytest.approx({"turns": (16 + 48) / 138, "examples": 32 / 43, "again": 63 / 64}, abs=1e-4)
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["command"] == "python -m benchmarks.prefix --rounds 2 --out PATH"
        for name in ("trace", "first_token"):
            assert (
                0
                < float(row[f"{name}_p20_ms"])
                <= float(row[f"{name}_median_ms"])
                <= float(row[f"{name}_p80_ms"])
            )
    assert all(float(row["hit_rate"]) == 0 for (_, who), row in rows.items() if who.startswith("without"))
    assert "full pages allow" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["tokens", "hits"])
def test_what_is_wrong_is_not_timed_and_the_command_fails(wrong, monkeypatch, tmp_path):
    real = prefix.repeat

    def broken(llm, prompt):
        outputs = real(llm, prompt)
        if wrong == "tokens" and llm._scheduler.hits.cache is not None:
            outputs[0].outputs[0].token_ids[0] += 1
        return outputs

    if wrong == "hits":
        monkeypatch.setattr(prefix, "PAGE", 8)  # pages of 16 hold fewer of the tokens
    monkeypatch.setattr(prefix, "repeat", broken)
    assert prefix.main(["--rounds", "1", "--out", str(tmp_path / "prefix.csv")]) == 1
    rows = {(row["case"], row["who"]): row for row in records.read(tmp_path / "prefix.csv")}
    bad = rows[("again" if wrong == "tokens" else "turns", "with prefix caching")]
    assert (bad["status"], bad["trace_median_ms"], bad["first_token_median_ms"]) == ("wrong", "", "")
