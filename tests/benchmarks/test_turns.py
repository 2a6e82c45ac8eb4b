"""Turns: everyone in every round, medians with their spread, and no figure from who dropped out."""

from __future__ import annotations

import pytest

from benchmarks.turns import Absent, Spread, stopwatch, time_in_turns


def test_everyone_takes_a_turn_in_every_round():
    order = []
    ticks = []

    def turn(name: str, seconds: float):
        return lambda: order.append(name) or seconds * len(order)

    spreads, gone = time_in_turns({"a": turn("a", 1), "b": turn("b", 10)}, 3, lambda: ticks.append(1))
    assert order == ["a", "b"] * 3
    assert spreads["a"].median == 3  # of 1, 3 and 5
    assert spreads["b"].median == 40  # of 20, 40 and 60
    assert gone == {}
    assert len(ticks) == 6


def test_who_drops_out_has_no_figure_left():
    seconds = iter([1.0, 1.0])

    def dies():
        try:
            return next(seconds)
        except StopIteration:
            raise Absent("out of memory", "failed") from None

    spreads, gone = time_in_turns({"a": lambda: 1.0, "b": dies}, 4)
    assert gone["b"].columns == {"status": "failed", "note": "out of memory"}
    assert list(spreads) == ["a"]


def test_a_spread_holds_the_middle_of_the_rounds():
    spread = Spread.of([float(i) for i in range(11)])
    assert spread == Spread(5.0, 2.0, 8.0)


@pytest.mark.parametrize(("warm", "calls"), [(True, 2), (False, 1)])
def test_a_stopwatch_times_one_call_and_may_warm_it_first(warm, calls):
    called = []
    assert stopwatch(lambda: called.append(1), warm=warm)() >= 0
    assert len(called) == calls
