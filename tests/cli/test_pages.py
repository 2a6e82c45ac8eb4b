"""`--trace` and `quire pages`: from a run to a picture of it, and to a page that plays it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from browser import dom
from engine.test_snapshot import busy_engine

from quire import cli
from quire.cli import demo, model, pages, serve
from quire.engine import trace as traces
from quire.engine.snapshot import Snapshot
from quire.engine.trace import read_snapshots

# One worker loads the model and compiles its kernels, not both.
pytestmark = pytest.mark.xdist_group("cli-demo-model")


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A trace with a snapshot after every step or two."""
    monkeypatch.setattr(traces, "_LEAST_SECONDS", 0)
    engine, path = busy_engine(), tmp_path / "trace.json"
    with engine.tracing(path):
        while engine.has_unfinished:
            engine.step()
    return path


def test_generate_writes_a_trace_of_its_steps(tmp_path, capsys):
    path = tmp_path / "trace.json"
    assert cli.run(["generate", "def f(", "--max-tokens", "5", "--num-pages", "8", "--trace", str(path)]) == 0
    steps = [event for event in json.loads(path.read_bytes()) if event["name"] == "step"]
    assert sum(step["args"]["generated"] for step in steps) == 5
    assert {"plan", "launch", "attention"} <= {event["name"] for event in json.loads(path.read_bytes())}
    assert read_snapshots(path)[-1].generated_tokens == 5


@pytest.mark.parametrize("command", ["generate x", "serve --port 0", "demo"])
def test_a_trace_in_no_folder_is_refused_before_the_model_is_loaded(monkeypatch, capsys, command):
    for module in (
        serve,
        demo,
        model,
    ):  # loaded by now: who imports `load` later would keep what is put in its place
        monkeypatch.setattr(module, "load", lambda *a, **o: pytest.fail("loaded"))
    assert cli.run([*command.split(), "--trace", "nowhere/at/all.json"]) == 2
    assert (
        "--trace must name a file in a folder that exists; got 'nowhere/at/all.json'"
        in capsys.readouterr().err
    )


def test_the_picture_is_of_the_fullest_moment(recorded, tmp_path, capsys):
    out = tmp_path / "fullest.svg"
    assert cli.run(["pages", str(recorded), str(out)]) == 0
    most = max(each.num_owned for each in read_snapshots(recorded))
    ElementTree.fromstring(out.read_text())
    assert f"{most} owned (" in out.read_text()
    assert "moments of 24 pages" in capsys.readouterr().out


def test_the_page_plays_the_trace_without_any_server(recorded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["pages", str(recorded)]) == 0
    out = tmp_path / "pages.html"
    [data] = re.findall(r'<script id="recorded" type="application/json">(.*?)</script>', out.read_text())
    moments = read_snapshots(recorded)
    assert [Snapshot.from_json(each) for each in json.loads(data)] == moments
    document = dom(out.as_uri(), tmp_path)
    fullest = max(moments, key=lambda each: each.num_owned)
    shown = dict(re.findall(r'<dd data-figure="([^"]*)">([^<]*)</dd>', document))
    assert (shown["owned"], shown["shared"]) == (f"{fullest.num_owned} of 24", str(fullest.num_shared))
    assert f"step {fullest.steps}</span>" in document
    assert f'max="{len(moments) - 1}"' in document


def test_a_long_trace_is_thinned_evenly(monkeypatch, recorded):
    moments = read_snapshots(recorded)
    monkeypatch.setattr(pages, "MOST_MOMENTS", 4)
    [data] = re.findall(r'application/json">(.*?)</script>', pages.page(moments))
    stride = -(-len(moments) // 4)
    assert [each["steps"] for each in json.loads(data)] == [each.steps for each in moments[::stride]]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["absent.json"], "must be a trace that Quire wrote"),
        (["{trace}", "pages.png"], "OUT must end in .svg, a picture, or .html, a page; got 'pages.png'"),
        (["{trace}", "no/such/pages.svg"], "OUT must be a file that can be written"),
    ],
)
def test_bad_input_is_one_sentence(recorded, capsys, typed, said):
    assert cli.run(["pages", *(each.format(trace=recorded) for each in typed)]) == 2
    assert said in capsys.readouterr().err
