"""The GPU's edge cases, tried on the host: what runs there is judged, what needs a GPU says so."""

import pytest
import torch

from benchmarks.gpu import edges
from benchmarks.gpu.device import Host
from benchmarks.gpu.edges import EDGES, check_edge
from benchmarks.gpu.jobs import Setting

SETTING = Setting("cpu", "reference", seed=3, quick=True)
ON_THE_HOST = ("sinks of rows without keys", "given scales", "int8 pages at any byte")


@pytest.mark.parametrize("what", EDGES)
def test_each_edge_is_right_or_says_what_it_needs(what):
    [row] = check_edge(Host(), SETTING, what=what)
    assert row["status"] == ("ok" if what in ON_THE_HOST else "unavailable"), row["note"]


def test_a_lost_sink_is_noticed(monkeypatch):
    right = edges._attend

    def without_sinks(batch, setting, **rules):
        state = right(batch, setting, **rules)
        state.lse[0] = -torch.inf
        return state

    monkeypatch.setattr(edges, "_attend", without_sinks)
    [row] = check_edge(Host(), SETTING, what="sinks of rows without keys")
    assert row["status"] == "wrong"
    assert "lse is not the sink" in row["note"]
