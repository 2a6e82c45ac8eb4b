"""The serving table: its arrivals, percentiles, floors, rows and second calls."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys

import pytest
import torch

from benchmarks import records
from benchmarks.serving import (
    agreement,
    command,
    figures,
    floor,
    memory,
    plots,
    processes,
    profile,
    tables,
    worker,
)
from benchmarks.serving.cases import Asked, Case, chosen, make_cases, poisson_arrivals, spread
from benchmarks.serving.contestants import Room
from benchmarks.serving.shapes import LLAMA_2, Shape, make_model
from quire import cli

TINY = Shape("tiny", layers=2, heads=1, intermediate=64, vocab=256)


def case_of(*asked: Asked) -> Case:
    return Case("key", "a case", TINY, asked)


def test_arrivals_are_those_of_a_poisson_process_and_of_their_seed():
    arrivals = poisson_arrivals(4001, 0.25, seed=3)
    gaps = [later - at for at, later in itertools.pairwise(arrivals)]
    assert arrivals[0] == 0
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)  # of the exponential distribution: its mean
    assert poisson_arrivals(9, 0.25, seed=3) == arrivals[:9]
    assert poisson_arrivals(9, 0.25, seed=4) != arrivals[:9]


def test_lengths_are_spread_from_the_shortest_to_the_longest():
    lengths = spread(256, 8192, 8, seed=0)
    assert (min(lengths), max(lengths), len(set(lengths))) == (256, 8192, 8)
    assert spread(5, 9, 1, seed=0) == [5]


def test_shapes_count_the_weights_that_the_models_have():
    model = make_model(TINY, 32, torch.float32, "cpu")
    assert sum(weight.numel() for weight in model.parameters()) == TINY.parameters
    assert LLAMA_2["7B"].parameters == 6_738_415_616  # as Llama-2-7B has them
    assert LLAMA_2["13B"].parameters == 13_015_864_320
    again = make_model(TINY, 32, torch.float32, "cpu")
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)


def test_a_scale_divides_lengths_and_keeps_the_requests():
    full, small = make_cases(1), make_cases(16)
    for one, other in zip(full, small, strict=True):
        assert (one.key, len(one.asked)) == (other.key, len(other.asked))
    [case] = chosen(small, ["7b-8k-4"])
    assert case.asked == (Asked(0.0, 512, 8),) * 4
    with pytest.raises(ValueError, match="got 7b-9k"):
        chosen(small, ["7b-9k"])


def test_percentiles_are_values_that_occurred():
    assert [figures.percentile([3, 1, 2, 100], at) for at in (50, 75, 99)] == [2, 3, 100]
    assert figures.percentile([7], 99) == 7


def test_the_floor_is_bytes_read_by_the_rate_of_reading():
    case = case_of(Asked(0.0, 10, 4))
    # Layers: 4·128² + 3·128·64 + 2·128; the head 256·128, the last norm 128. A slot: 2 · 2 layers · 128.
    weights = 2 * (4 * 128**2 + 3 * 128 * 64 + 256) + 256 * 128 + 128
    assert floor.floor_seconds(case, 2, 100, 1e9) == pytest.approx((weights + 100 * 512) * 2 / 1e9)


def test_a_decode_step_is_taken_where_all_requests_decode():
    case = case_of(Asked(0.0, 10, 4), Asked(0.0, 20, 4))
    times = [[1.0, 2.0, 5.0, 6.0], [4.0, 5.0, 6.0, 7.0]]  # the second's prompt keeps the first from 2 to 5
    step = floor.decode_step(case, times)
    assert step is not None
    # From 4.0 to 6.0 all steps take one second; the first holds 10 + 2 slots then, the second 20.
    assert step == (1.0, pytest.approx(10 + 2 + 1 + 20 + 1.5))
    assert floor.decode_step(case, [[1.0, 2.0], [3.0, 4.0]]) is None


def test_speeds_count_waiting_from_the_arrival():
    case = case_of(Asked(0.0, 10, 3), Asked(2.0, 10, 3))
    result = {
        "times": [[1.0, 2.0, 3.0], [3.0, 4.0, 6.0]], "peak_bytes": 1 << 29, "filled_slots": 3, "allocated_slots": 4,
        "preemptions": 0, "ready_s": 1.0, "memory": [[0.0, 1 << 30]],
    }  # fmt: skip
    row = figures.speeds(case, result, 4, 1e9)
    assert row["first_token_p99_ms"] == "1000.000"  # not 3000: the second arrived at 2.0
    assert (row["between_p50_ms"], row["between_p99_ms"]) == ("1000.000", "2000.000")
    assert (row["tokens_per_s"], row["decode_tokens_per_s"]) == ("1.00", "0.67")
    assert (row["wasted"], row["peak_gib"], row["memory"]) == ("0.2500", "0.500", "0.000:1.0000")


def test_a_room_too_small_for_the_longest_request_is_out_of_memory():
    asked = [Asked(0.0, 30, 2), Asked(0.0, 60, 5)]
    assert Room(1000, asked).pages(16) == 2 + 5
    assert Room(95, asked).pages(16) == 5  # they take turns
    with pytest.raises(memory.NoRoom, match="the longest request needs 80"):
        Room(79, asked).pages(16)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (memory.NoRoom("the budget leaves 3"), True),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_out_of_memory_is_told_from_other_failures(error, is_it):
    assert memory.is_out_of_memory(error) == is_it


def test_the_judge_finds_the_greedy_text_right_and_any_other_wrong():
    model = make_model(TINY, 16, torch.float32, "cpu").double()
    prompt, text = [5, 6, 7], []
    with torch.inference_mode():
        for _ in range(4):
            text.append(int(model(torch.tensor([prompt + text])).logits[0, -1].argmax()))
    wrong = [*text[:2], text[2] ^ 1, *text[3:]]
    (regret, allowed), (other, other_allowed) = agreement.judge(
        TINY, 16, torch.float32, "cpu", [(prompt, text), (prompt, wrong)]
    )
    assert regret <= allowed
    assert other > other_allowed


def test_the_shortest_and_the_longest_text_are_judged():
    asked = [Asked(0.0, n, 1) for n in (50, 10, 40, 20, 30)]
    assert agreement.sample(asked, 3) == [1, 4, 0]
    assert agreement.sample(asked, 1) == [0]
    assert sorted(agreement.sample(asked, 9)) == [0, 1, 2, 3, 4]


def test_a_process_that_dies_or_hangs_is_a_row(tmp_path):
    def python(code: str) -> tuple[str, ...]:
        return (sys.executable, "-c", code)

    died = processes.run({}, 20, python("import sys; print('last words'); sys.exit(3)"))
    assert (died["status"], died["note"]) == ("failed", "the process died (3): last words")
    assert processes.run({}, 1, python("import time; time.sleep(60)"))["note"] == "no result within 1 s"
    writes = "import sys; open(sys.argv[2], 'w').write('{\"status\": \"ok\"}')"
    assert processes.run({}, 20, python(writes)) == {"status": "ok"}


class Stage:
    """Worker results without workers: who is out of memory from which number on, and a text's verdict."""

    def __init__(self, refused: dict[str, int] | None = None, regret: float = 0.0) -> None:
        self.refused, self.regret, self.tasks = refused or {}, regret, list[dict]()

    def __call__(self, task: dict, seconds: float) -> dict:
        self.tasks.append(task)
        if task["kind"] == "bandwidth":
            return {"status": "ok", "bytes_per_second": 1e9, "device": "CPU"}
        if task["kind"] == "judge":
            return {"status": "ok", "verdicts": [[self.regret, 0.5] for _ in task["texts"]]}
        [case] = chosen(make_cases(task["scale"]), [task["case"]])
        if len(case.asked) >= self.refused.get(task["who"], 1000):
            return {"status": "out of memory", "note": "RuntimeError: can't allocate memory"}
        times = [[each.arrival + 0.01 * (k + 1) for k in range(each.new_tokens)] for each in case.asked]
        return {
            "status": "ok", "tokens": [[3] * each.new_tokens for each in case.asked], "times": times,
            "peak_bytes": 1, "allocated_slots": 2, "filled_slots": 1, "preemptions": 0, "ready_s": 0.1,
            "memory": [[0.0, 1], [0.5, 2]],
        }  # fmt: skip

    @property
    def served(self) -> list[tuple[str, str]]:
        return [(task["case"], task["who"]) for task in self.tasks if task["kind"] == "serve"]


def arguments(*more: str) -> argparse.Namespace:
    return command.parse_args(["--scale", "16", "--device", "cpu", *more], "bench")


def call_of(stage: Stage, *more: str) -> command.Call:
    call = command.Call(
        arguments(*more), {"machine": "m", "commit": "c", "date": "d", "busy": ""}, lambda text: None, stage
    )
    call.measure()
    return call


LADDER = (
    "--only",
    "13b-32k-1",
    "13b-32k-2",
    "13b-32k-4",
    "--contestants",
    "generate, dynamic cache",
    "quire",
)


def test_who_is_out_of_memory_says_at_how_many_requests_and_climbs_no_further():
    stage = Stage({"generate, dynamic cache": 2})
    rows = {(row["key"], row["who"]): row for row in call_of(stage, *LADDER).rows}
    second, third = (rows[key, "generate, dynamic cache"] for key in ("13b-32k-2", "13b-32k-4"))
    assert second["status"] == third["status"] == "out of memory"
    assert second["note"].startswith("out of memory at 2 requests: ")
    assert third["note"] == "out of memory at 2 requests already"
    assert ("13b-32k-4", "generate, dynamic cache") not in stage.served
    assert second["tokens_per_s"] == ""
    assert all(rows[key, "quire"]["status"] == "ok" for key in ("13b-32k-1", "13b-32k-2", "13b-32k-4"))
    text = tables.markdown(list(rows.values()))
    assert "| 13B, 32k | out of memory | runs | serves 1, out of memory at 2 | serves 4 |" in text


def test_no_speed_is_reported_of_wrong_or_short_texts():
    [row, _] = call_of(Stage(regret=0.6), *LADDER[:2], *LADDER[4:]).rows
    assert (row["status"], row["tokens_per_s"], row["regret"], row["allowed"]) == ("wrong", "", "0.6", "0.5")
    case = case_of(Asked(0.0, 3, 2))
    assert not figures.is_complete(case, {"tokens": [[1]], "times": [[0.1]]})
    assert figures.is_complete(case, {"tokens": [[1, 2]], "times": [[0.1, 0.2]]})


def test_a_second_call_does_what_the_first_had_no_time_for(tmp_path, capsys):
    path = str(tmp_path / "serving.csv")
    first = call_of(Stage(), *LADDER, "--seconds", "1", "--out", path)
    assert {row["status"] for row in first.rows} == {figures.SKIPPED}
    partly = call_of(Stage(), *LADDER[:2], *LADDER[4:], "--resume", path)
    assert [row["key"] for row in partly.rows] == ["13b-32k-1"] * 2
    stage = Stage()
    whole = call_of(stage, *LADDER, "--resume", path)
    assert ("13b-32k-1", "quire") not in stage.served
    assert [row["key"] for row in whole.rows] == [f"13b-32k-{n}" for n in (1, 1, 2, 2, 4, 4)]
    assert records.read(tmp_path / "serving.csv") == whole.rows
    assert call_of(again := Stage(), *LADDER, "--resume", path).rows == whole.rows
    assert again.tasks == []
    with pytest.raises(SystemExit):
        arguments("--resume", path, "--dtype", "bfloat16")
    assert "same --dtype, bfloat16; got float32" in capsys.readouterr().err


def test_plots_name_contestants_in_words(tmp_path):
    path = tmp_path / "serving.csv"
    keys = ("--only", "7b-8k-4", "7b-mixed-8", "13b-32k-1", *LADDER[4:])
    call_of(Stage({"generate, dynamic cache": 1000}), *keys, "--out", str(path))
    for drawn in plots.draw(path):
        assert "Quire" in drawn.read_text()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--device", "cpu"], "--scale must be given on a CPU"),
        (["--scale", "0", "--device", "cpu"], "--scale must be at least 1; got 0"),
        (["--scale", "8", "--only", "nine"], "got nine"),
        (["--device", "moon"], "--device must be cuda or cpu; got moon"),
        (["--resume", "absent.csv"], "--resume must be a file"),
    ],
)
def test_bad_input_is_one_sentence_with_its_fix(capsys, typed, said):
    with pytest.raises(SystemExit) as ended:
        cli.run(["bench", "serving", *typed])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Fix: see quire bench serving --help" in err


def test_parts_of_a_step_leave_kernels_out_of_launch_on_a_cpu():
    parts = {"schedule": 1e-6, "launch": 9e-6, "sample": 2e-6}
    assert profile.split_kernels(parts, 6e-6, on_host=True)["launch"] == pytest.approx(3)
    assert profile.split_kernels(parts, 6e-6, on_host=False)["launch"] == pytest.approx(9)
    assert list(profile.split_kernels(parts, 6e-6, on_host=True)) == list(profile.PARTS)


@pytest.mark.exhaustive  # two processes that load torch: 20 to 30 s
def test_a_tiny_call_serves_judges_and_writes_rows(tmp_path):
    def do(
        task: dict, seconds: float
    ) -> dict:  # what needs no process of its own has none here: it loads torch
        return processes.run(task, seconds) if task["kind"] == "serve" else worker.KINDS[task["kind"]](task)

    path = tmp_path / "serving.csv"
    typed = ["--scale", "64", "--device", "cpu", "--only", "7b-8k-4", "--judged", "2", "--out", str(path)]
    who = ["--contestants", "generate, dynamic cache", "quire", "--seconds", "200"]
    call = command.Call(command.parse_args([*typed, *who], "bench"), {"busy": ""}, lambda text: None, do)
    call.measure()
    assert tables.of_rows(call.rows).row_count == 2
    rows = records.read(path)
    assert [(row["who"], row["status"]) for row in rows] == [
        ("generate, dynamic cache", "ok"),
        ("quire", "ok"),
    ]
    for row in rows:
        assert float(row["regret"]) <= float(row["allowed"])
        assert float(row["first_token_p50_ms"]) <= float(row["first_token_p99_ms"])
        assert float(row["between_p50_ms"]) <= float(row["between_p99_ms"])
        assert float(row["tokens_per_s"]) > 0
        assert 0 <= float(row["wasted"]) < 1
        assert float(row["floor_ms"]) > 0


def test_a_profile_of_a_step_has_every_part():
    [case] = chosen(make_cases(64), ["7b-mixed-8"])
    found = profile.measure(case, {"dtype": "float32", "device": "cpu", "seed": 0, "steps": 4})
    assert json.loads(json.dumps(found))["requests"] == 8
    for part in ("schedule", "pack", "plan", "kernels", "sample", "hand out"):
        assert found["parts_us"][part] > 0
    assert found["parts_us"]["wait"] == 0  # the host itself computes
