"""A trace says what steps did, is a whole JSON file at any time, and never grows past its bound."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest

from quire.engine import Engine, SamplingParams
from quire.engine import trace as traces
from quire.engine.trace import LEAST_BYTES, Trace, read_snapshots
from quire.errors import ArgumentError, UnsupportedError
from quire.spans import is_recording

from .fakes import FakeModel
from .test_snapshot import busy_engine
from .test_threads import HANGS

FIVE = SamplingParams(max_tokens=5)


def slices(path: Path, name: str) -> list[dict]:
    return [event for event in json.loads(path.read_bytes()) if event["ph"] == "X" and event["name"] == name]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def test_every_step_is_there_by_its_parts_with_its_requests_and_tokens(path):
    engine = Engine(FakeModel(), max_batch_tokens=8)
    with engine.tracing(path):
        engine.generate([[1] * 11, [2] * 3], FIVE)
    steps = slices(path, "step")
    assert [step["args"]["tokens"] for step in steps] == engine.model.step_sizes
    assert steps[0]["args"] == {"requests": 1, "tokens": 8, "generated": 0}
    assert steps[1]["args"] == {"requests": 2, "tokens": 6, "generated": 2}
    assert sum(step["args"]["generated"] for step in steps) == 10
    for part in ("schedule", "pack", "launch", "sample", "hand out"):
        found = slices(path, part)
        assert len([each for each in found if _within(each, steps)]) == len(found) == len(steps)
    assert all(_within(each, slices(path, "hand out")) for each in slices(path, "sample"))


def _within(inner: dict, outer: list[dict]) -> bool:
    begin, end = inner["ts"], inner["ts"] + inner["dur"]
    return any(each["ts"] <= begin and end <= each["ts"] + each["dur"] + 1e-3 for each in outer)


def test_counters_follow_the_pool_and_are_told_when_they_change(path):
    engine = busy_engine()
    told = []
    with engine.tracing(path):
        while engine.has_unfinished:
            engine.step()
            allocator = engine.model.allocator
            told.append(
                {"owned": allocator.num_owned, "cached": allocator.num_cached, "free": allocator.num_free}
            )
    found = [e["args"] for e in json.loads(path.read_bytes()) if e["ph"] == "C" and e["name"] == "pages"]
    assert found == [each for i, each in enumerate(told) if not i or each != told[i - 1]]
    names = {event["name"] for event in json.loads(path.read_bytes()) if event["ph"] == "C"}
    assert names == {"pages", "requests", "unused slots"}


def test_a_plan_and_the_attention_of_each_layer_are_parts_of_the_launch(path, model):
    from quire.engine import LLM

    llm = LLM(model, page_size=4, num_pages=20, backend="reference")
    with llm.tracing(path):
        llm.generate([[1, 2, 3]], FIVE)
    steps = len(slices(path, "step"))
    assert (len(slices(path, "plan")), len(slices(path, "attention"))) == (steps, 2 * steps)
    for part in ("plan", "attention"):
        assert all(_within(each, slices(path, "launch")) for each in slices(path, part))


def test_snapshots_come_back_as_they_were(path, monkeypatch):
    monkeypatch.setattr(traces, "_LEAST_SECONDS", 0)
    engine, taken = busy_engine(), []
    with engine.tracing(path):
        while engine.has_unfinished:
            engine.step()
            taken.append(engine.snapshot())
    found = read_snapshots(path)
    assert 2 <= len(found) <= len(taken)
    cells = [each.cells for each in taken]
    assert all(each.cells in cells for each in found)
    assert found[-1].cells == taken[-1].cells, "the last step leaves nothing to do"
    assert (found[-1].num_owned, found[-1].generated_tokens) == (0, engine.stats.generated_tokens)
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)


def test_the_file_is_whole_after_each_step_as_if_the_process_were_killed_there(path):
    engine = busy_engine()
    count = 0
    with engine.tracing(path):
        json.loads(path.read_bytes())
        while engine.has_unfinished:
            engine.step()
            events = json.loads(path.read_bytes())
            assert len(events) > count
            count = len(events)
    assert count == len(json.loads(path.read_bytes()))


def test_a_trace_ends_at_its_bound_and_the_steps_go_on(path, caplog):
    engine = Engine(FakeModel())
    with caplog.at_level(logging.WARNING, logger="quire"), engine.tracing(path, max_bytes=LEAST_BYTES):
        for _ in range(60):
            engine.generate([[1, 2, 3]], FIVE)
            assert path.stat().st_size <= LEAST_BYTES
    assert path.stat().st_size > LEAST_BYTES * 0.8
    assert 0 < len(slices(path, "step")) < engine.stats.steps
    assert [record.message for record in caplog.records] == [
        f"the trace {path} ends here, as it has the {LEAST_BYTES} bytes that it may have"
    ]


@pytest.mark.parametrize("bytes_that_fit", [0, 1, 700])
def test_a_full_disk_ends_the_trace_and_no_step(path, caplog, monkeypatch, bytes_that_fit):
    engine, write, room = Engine(FakeModel()), os.pwrite, [bytes_that_fit]

    def full(file, data, at):
        if len(data) > room[0] and len(data) > 10:
            if not room[0]:
                raise OSError(28, "No space left on device")
            data = data[: room[0]]
            room[0] = 0
        return write(file, data, at)

    with engine.tracing(path):
        engine.generate([[1, 2, 3]], FIVE)
        before = json.loads(path.read_bytes())
        monkeypatch.setattr(os, "pwrite", full)
        assert engine.generate([[1, 2, 4]], FIVE)[0].token_ids == engine.model.continuation([1, 2, 4], 5)
        monkeypatch.undo()
        engine.generate([[1, 2, 4]], FIVE)
    assert json.loads(path.read_bytes()) == before
    [record] = caplog.records
    assert "ends here, as it cannot be written: [Errno 28]" in record.message


def test_a_step_that_fails_is_taken_down_and_the_next_one_too(path):
    engine = Engine(FakeModel())
    forward = engine.model.forward

    def fails(step):
        raise RuntimeError("no")

    with engine.tracing(path):
        engine.model.forward = fails
        with pytest.raises(RuntimeError, match="no"):
            engine.generate([[1, 2]], FIVE)
        engine.model.forward = forward
        engine.generate([[1, 2]], FIVE)
    steps = slices(path, "step")
    assert [step["args"]["generated"] for step in steps] == [0, 1, 1, 1, 1, 1]
    assert len(slices(path, "launch")) == 6
    assert len(slices(path, "hand out")) == 5


def test_without_a_trace_nothing_is_recorded_and_nothing_written(path):
    engine, seen = Engine(FakeModel()), []
    forward = engine.model.forward

    def look(step):
        seen.append(is_recording())
        return forward(step)

    engine.model.forward = look
    engine.generate([[1]], SamplingParams(max_tokens=1))
    with engine.tracing(path):
        engine.generate([[1]], SamplingParams(max_tokens=1))
    size = path.stat().st_size
    engine.generate([[1]], SamplingParams(max_tokens=1))
    assert seen == [False, True, False]
    assert path.stat().st_size == size


def test_a_block_that_ends_in_the_middle_of_a_step_of_another_thread_disturbs_nobody(path):
    from .test_threads import Gate

    engine = Engine(FakeModel())
    gate, outputs = Gate(engine.model, at=2), []
    with engine.tracing(path):
        thread = threading.Thread(target=lambda: outputs.extend(engine.generate([[1, 2]], FIVE)))
        thread.start()
        assert gate.reached.wait(HANGS)
    gate.opened.set()
    thread.join(HANGS)
    assert outputs[0].token_ids == engine.model.continuation([1, 2], 5)
    assert len(slices(path, "step")) == 1


def test_an_engine_writes_one_trace_at_a_time_and_a_file_belongs_to_one(path, tmp_path):
    model = FakeModel()
    one, other = Engine(model), Engine(model)
    with one.tracing(path):
        with pytest.raises(UnsupportedError, match="one trace at a time"), one.tracing(tmp_path / "second"):
            pass
        with pytest.raises(ArgumentError, match="another trace is written to"), other.tracing(path):
            pass
        one.generate([[1]], FIVE)
        with other.tracing(tmp_path / "other"):
            other.generate([[1]], FIVE)
            one.generate([[1]], FIVE)
    assert len(slices(path, "step")) == 2 * len(slices(tmp_path / "other", "step")) == 10
    with one.tracing(path):
        pass
    assert slices(path, "step") == [], "an old trace is overwritten"


@pytest.mark.parametrize("kind", ["folder", "nowhere", "device", "pipe", "null"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    wanted = {
        "folder": tmp_path, "nowhere": tmp_path / "no" / "trace", "device": "/dev/null", "pipe": tmp_path / "pipe",
        "null": "a\0b",
    }[kind]  # fmt: skip
    if kind == "pipe":
        os.mkfifo(wanted)
    engine = Engine(FakeModel())
    with pytest.raises(ArgumentError, match="must be written to a file"), engine.tracing(wanted):
        pass
    assert engine._trace is None


def test_a_bound_too_small_for_a_step_is_refused(path):
    with pytest.raises(ArgumentError, match=f"max_bytes must be at least {LEAST_BYTES}"):
        Trace(path, max_bytes=LEAST_BYTES - 1)
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        (b"", "JSONDecodeError"),
        (b"\xff\xfe", "Error"),
        (b"[" * 100_000, "RecursionError"),
        (b"{}", "dict where its events"),
        (b"[]", "no snapshot in it"),
        (b'[1, null, {"name": "snapshot"}]', "no snapshot in it"),
        (
            b'[{"name": "snapshot", "ph": "i", "args": {"num_pages": 1}}]',
            "must be what Snapshot.as_json made",
        ),
        (b"9" * 10_000, "Error"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(path, text, said):
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ArgumentError, match=said):
        read_snapshots(path)


def test_a_file_of_any_size_is_not_read_whole(path, monkeypatch):
    monkeypatch.setattr(traces, "MOST_READ_BYTES", 100)
    path.write_bytes(b" " * 101)
    with pytest.raises(ArgumentError, match="more than 100 bytes"):
        read_snapshots(path)
