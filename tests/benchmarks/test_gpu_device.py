"""Times per call from a clock that is told what to show."""

from __future__ import annotations

import torch

from benchmarks.gpu.device import MAX_ROUNDS, Host, measure


class Scripted(Host):
    """Each call of ``play`` takes as many microseconds as calls were made in it, ten times as many plainly."""

    def __init__(self, graphs: bool = True) -> None:
        super().__init__()
        self.graphs, self.calls, self.replaying = graphs, 0, False

    def rounds(self, play, count):
        times = []
        for _ in range(count):
            before = self.calls
            play()
            times.append((self.calls - before) * (1.0 if self.replaying else 10.0))
        return times

    def capture(self, calls):
        if not self.graphs:
            raise RuntimeError("capture refused")
        self.replaying = True
        return super().capture(calls)

    def call(self):
        self.calls += 1


def test_graph_and_plain_launches_are_told_apart_and_counted_per_call():
    device = Scripted()
    row = measure(device, [device.call] * 4)
    assert (row["median_us"], row["launched_us"], row["by"], row["layers"]) == (1.0, 10.0, "graph", 4)
    assert row["repeats"] == MAX_ROUNDS


def test_without_a_graph_the_row_says_so_and_holds_plain_launches():
    device = Scripted(graphs=False)
    row = measure(device, [device.call] * 4)
    assert (row["median_us"], row["by"]) == (10.0, "launches")
    assert "capture refused" in row["note"]


def test_the_hosts_clock_counts_microseconds():
    big = torch.ones(1 << 16)
    row = measure(Host(), [big.sum], seconds=0.01)
    assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
