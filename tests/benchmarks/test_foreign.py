"""Peers in other environments: asked in lines, stopped between turns, ended with us."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import foreign
from benchmarks.foreign import Worker
from benchmarks.turns import Absent

SCRIPT = """
import sys
sys.path.insert(0, {wire!r})
from wire import serve

def load(request):
    print("chatter that is no answer")
    if request.get("missing"):
        import no_such_module
    if request.get("wrong"):
        raise ValueError("no\\nsuch   page size")
    if request.get("dies"):
        sys.exit("out of memory")
    return {{"twice": request["number"] * 2}}, lambda: {{"seconds": request["number"]}}

serve(load)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "fake_attention.py").write_text(SCRIPT.format(wire=str(foreign.WORKERS)))
    monkeypatch.setattr(foreign, "WORKERS", tmp_path)
    worker = Worker(Path(sys.executable), "fake_attention.py")
    yield worker
    worker.close()


def comes_to(pid: int, states: str) -> bool:
    """Whether a process reaches one of these states within ten seconds; one that is gone is X."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            state = "X"
        if state in states:
            return True
        time.sleep(0.05)
    return False


def test_a_worker_loads_by_name_and_takes_turns(worker):
    assert worker.load("a", {"number": 3}) == {"twice": 6}
    assert worker.load("b", {"number": 5}) == {"twice": 10}
    assert [worker.turn(name)["seconds"] for name in "aba"] == [3, 5, 3]
    worker.load("a", {"number": 7})
    assert worker.turn("a")["seconds"] == 7


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads process states from /proc")
def test_a_worker_is_stopped_between_its_turns(worker):
    worker.load("a", {"number": 3})
    assert comes_to(worker._process.pid, "T")
    worker.turn("a")
    assert comes_to(worker._process.pid, "T")


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        ({"missing": 1}, "unavailable", "not installed: No module named 'no_such_module'"),
        ({"wrong": 1}, "failed", "ValueError: no such page size"),
        ({"dies": 1}, "failed", "ended without an answer; out of memory"),
    ],
)
def test_what_kept_a_worker_from_it_is_said(worker, request_, status, reason):
    with pytest.raises(Absent) as caught:
        worker.load("a", request_)
    assert caught.value.columns == {"status": status, "note": reason}


def test_no_interpreter_is_not_installed(tmp_path):
    with pytest.raises(Absent, match="not installed: give the Python of its environment, --vllm-python PATH"):
        Worker(None, "vllm_attention.py")
    with pytest.raises(Absent, match="is no program"):
        Worker(tmp_path / "python", "vllm_attention.py")


def test_peers_whose_environment_nobody_gave_are_left_out_with_a_hint(capsys):
    peers = ["quire", "vllm", "vllm, page 128", "openvino-genai"]
    pythons = {"vllm": None, "openvino": Path("python")}
    assert foreign.without_absent_environments(peers, pythons) == ["quire", "openvino-genai"]
    [hint] = capsys.readouterr().err.splitlines()
    assert hint.startswith(
        "left out: vllm; vllm, page 128. To measure: --vllm-python PATH, or VLLM_PYTHON=PATH"
    )
    assert foreign.without_absent_environments(peers, dict.fromkeys(pythons, Path("python"))) == peers
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads process states from /proc")
def test_a_stopped_worker_ends_when_we_die(tmp_path):
    """Even by a signal that no one can catch."""
    (tmp_path / "fake_attention.py").write_text(SCRIPT.format(wire=str(foreign.WORKERS)))
    parent = f"""
import sys, time
from pathlib import Path
from benchmarks import foreign
foreign.WORKERS = Path({str(tmp_path)!r})
worker = foreign.Worker(Path(sys.executable), "fake_attention.py")
worker.load("a", {{"number": 1}})
print(worker._process.pid, flush=True)
time.sleep(60)
"""
    root = str(foreign.ROOT)
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, root + "/src"])},
    )  # fmt: skip
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert comes_to(pid, "T")
    process.kill()
    process.wait()
    process.stdout.close()
    assert comes_to(pid, "ZX")
