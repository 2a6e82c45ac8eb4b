"""The end to end runner on a tiny model: rows of right engines have speeds, rows of wrong ones have none."""

from __future__ import annotations

import pytest

import quire
from benchmarks import engines, generation
from benchmarks.engines import Job
from benchmarks.generation_gate import TextGate
from benchmarks.progress import Progress
from benchmarks.requests import ModelShape, model_folder, parse_requests
from benchmarks.turns import Absent

SHAPE = ModelShape(layers=1, hidden=32, heads=2, kv_heads=1, intermediate=32, vocab=64, positions=64)
REQUESTS = parse_requests("2x3-7:4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(SHAPE, tmp_path_factory.mktemp("models"))


def job_on(folder) -> Job:
    return Job(str(SHAPE), folder, REQUESTS.prompts(SHAPE.vocab), REQUESTS.new_tokens, "float32")


def measure(folder, names):
    with Progress() as progress:
        return generation.measure(REQUESTS, job_on(folder), names, 2, progress)


def test_engines_that_are_right_get_a_speed(folder):
    ours, theirs = measure(folder, ["quire", "model.generate"])
    for row in (ours, theirs):
        assert row["status"] == "ok"
        assert float(row["p20_tokens_per_s"]) <= float(row["tokens_per_s"]) <= float(row["p80_tokens_per_s"])
        assert float(row["regret"]) <= float(row["allowed"])
    assert (ours["rounds"], ours["case"]) == ("2", "2x3-7:4")


def test_a_model_that_cannot_be_compiled_is_listed_with_the_reason(folder, monkeypatch):
    def refuse(*args, **options):
        raise quire.UnsupportedError("compile=True needs a C++ compiler")

    monkeypatch.setattr(quire, "LLM", refuse)
    with pytest.raises(Absent, match="needs a C\\+\\+ compiler"):
        engines.quire_compiled("quire, compiled", job_on(folder))


def test_an_engine_that_is_wrong_gets_none(folder, monkeypatch):
    def wrong(name, job):
        ready = engines.quire_engine(name, job)
        job.texts[name][0][1][2] ^= 1  # one token of the second text
        return ready

    monkeypatch.setitem(engines.ENGINES, "quire", wrong)
    [row] = measure(folder, ["quire"])
    assert row["status"] == "wrong"
    assert float(row["regret"]) > float(row["allowed"])
    assert row["tokens_per_s"] == row["seconds"] == ""


def test_an_engine_that_is_not_installed_is_listed_without_a_speed(folder):
    rows = measure(folder, ["quire", "vllm, compiled", "openvino-genai"])
    assert [row["status"] for row in rows] == ["ok", "unavailable", "unavailable"]
    assert rows[1]["tokens_per_s"] == ""


def test_a_run_without_foreign_pythons_has_no_rows_of_them_unless_asked_by_name():
    own = ["quire", "quire, compiled", "model.generate", "generate_batch"]
    assert generation.parse_args([], "bench").engines == own
    assert "vllm, eager" in generation.parse_args(["--vllm-python", "python"], "bench").engines
    for name in ("openvino-genai", "quire, batch-invariant"):
        assert generation.parse_args(["--engines", name], "bench").engines == [name]


def test_the_batch_invariant_engine_is_asked_to_be_one(folder):
    ready = engines.ENGINES["quire, batch-invariant"]("quire, batch-invariant", job_on(folder))
    assert ready.output == engines.ENGINES["quire"]("quire", job_on(folder)).output
    given = {}

    def note(name, job, **options):
        given.update(options)

    original, engines._quire = engines._quire, note
    try:
        engines.quire_batch_invariant("quire, batch-invariant", job_on(folder))
    finally:
        engines._quire = original
    assert given == {"batch_invariant": True}


def test_a_text_of_another_length_is_wrong(folder):
    gate = TextGate(folder, "float32")
    assert gate.judge([[5, 6]], [[[7, 8, 9]]], 4)[0] == float("inf")
    assert gate.judge([[5, 6], [5]], [[[7, 8, 9, 9]]], 4)[0] == float("inf")
