"""Spans are those of the thread that records, and of the time in which it does."""

from __future__ import annotations

import threading

import pytest

from quire.spans import is_recording, recording, span


def test_blocks_are_taken_down_as_they_end_with_those_within():
    with recording() as taken:
        with span("outer"), span("inner"):
            pass
        with pytest.raises(ZeroDivisionError), span("fails"):
            _ = 1 / 0
    with span("later"):
        pass
    assert [each.name for each in taken] == ["inner", "outer", "fails"]
    inner, outer, _ = taken
    assert outer.begin <= inner.begin <= inner.end <= outer.end


def test_other_threads_are_not_seen_and_a_block_within_has_its_own():
    def other():
        with span("other"):
            seen.append(is_recording())

    seen = []
    with recording() as taken:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with recording() as within, span("b"):
            pass
        with span("a"):
            pass
    assert seen == [False]
    assert ([each.name for each in taken], [each.name for each in within]) == (["a"], ["b"])
    assert not is_recording()
