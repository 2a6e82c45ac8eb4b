"""Machine code on disk: never that of other sources, one entry for each signature and CPU, and no files elsewhere."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest
import torch
from processes import run_python

import quire
from quire.kernels import compile as compiler

PACKAGE = Path(quire.__file__).parent
COMPILES = re.compile(r"from quire\.kernels\.compile import .*\b(compiled|part)\b")


@pytest.fixture
def in_folder(monkeypatch):
    """Says in which folder NUMBA_CACHE_DIR keeps machine code from now on; returns that of these sources."""

    def use(folder):
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
        compiler.cache_folder.cache_clear()
        return compiler.cache_folder()

    yield use
    compiler.cache_folder.cache_clear()


def function_of_the_package(body="x + 1", line=1):
    """As if it stood in a file of the package, and as another process would find it: not compiled yet."""
    names = {}
    source = "\n" * (line - 1) + f"def add(x): return {body}"
    code = compile(source, str(PACKAGE / "kernels" / "added.py"), "exec")
    exec(code, {"__name__": "quire.kernels.added"}, names)
    return compiler.compiled(names["add"])


def hits(function):
    return sum(function.stats.cache_hits.values())


# --- the digest ------------------------------------------------------------------------------------------


def test_every_file_that_compiles_is_in_the_digest():
    """Those files import nothing else of Quire but floor 0, as tests/test_architecture.py shows."""
    compiling = [
        path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if COMPILES.search(path.read_text())
    ]
    assert len(compiling) > 10
    assert {path.parts[0] for path in compiling} <= set(compiler.ROOMS)


def test_the_digest_changes_with_every_file_it_is_of_and_with_no_other(tmp_path):
    copy = tmp_path / "quire"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    first = compiler.digest_of(copy)
    assert first == compiler.SOURCES
    rooms = (*compiler.ROOMS, "spec.py")
    for path in (p for p in copy.rglob("*.py") if p.relative_to(copy).parts[0] in rooms):
        content = path.read_bytes()
        path.write_bytes(content + b"#")
        assert compiler.digest_of(copy) != first, f"{path} is not in it"
        path.write_bytes(content)
    (copy / "engine" / "core.py").write_text("")
    assert compiler.digest_of(copy) == first
    added = copy / "kernels" / "added.py"
    added.write_text("")
    assert compiler.digest_of(copy) != first


def test_without_sources_nothing_is_kept(monkeypatch, tmp_path, in_folder):
    assert compiler.digest_of(tmp_path) is None
    monkeypatch.setattr(compiler, "SOURCES", None)
    assert in_folder(tmp_path) is None
    assert function_of_the_package()(1) == 2
    assert list(tmp_path.iterdir()) == []


RUN = """
import json
from numba.core import compiler
compiled = []
original = compiler.compile_extra
def counted(typingctx, targetctx, func, *rest, **named):
    compiled.append(func.__name__)
    return original(typingctx, targetctx, func, *rest, **named)
compiler.compile_extra = counted
"""
DEAL = (
    RUN
    + """
import numpy as np
from quire.planning.stream_k import copy_ints, is_step
numbers, target = np.array([-7, 5], np.int32), np.zeros(2, np.int64)
copy_ints(numbers.ctypes.data, 4, target)
print(json.dumps({"compiled": compiled, "numbers": target.tolist()}))
"""
)


def test_an_edit_in_another_file_than_the_compiled_functions_is_seen(tmp_path):
    """``planning.stream_k.copy_ints`` inlines ``kernels.compile.load_i32``, which the copy reads without a sign."""
    copy, cache = tmp_path / "copy" / "quire", tmp_path / "cache"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def run():
        return run_python(
            DEAL,
            PYTHONPATH=os.pathsep.join([str(copy.parent), str(Path(__file__).parents[1])]),
            XDG_CACHE_HOME=str(cache),
            NUMBA_CACHE_DIR="",
        )

    first = run()
    assert first == {"compiled": first["compiled"], "numbers": [-7, 5]}
    assert "copy_ints" in first["compiled"]
    assert list(cache.rglob("copy_ints-*.nbc")), "without an edit a later process would find it"
    source = copy / "kernels" / "compile.py"
    edited = source.read_text().replace("builder.sext(value, _i64)", "builder.zext(value, _i64)")
    assert edited != source.read_text()
    source.write_text(edited)
    assert run()["numbers"] == [2**32 - 7, 5]
    assert [path.name for path in cache.iterdir()] == ["quire"]
    beside = [path for path in copy.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert beside == [], "machine code lies in the user's cache folder alone"


# --- entries ---------------------------------------------------------------------------------------------


def test_each_signature_and_function_has_an_entry(tmp_path, in_folder):
    folder = in_folder(tmp_path)
    first = function_of_the_package()
    assert (first(1), first(1.5), hits(first)) == (2, 2.5, 0)
    other = function_of_the_package("x + 2", line=2)
    assert (other(1), hits(other)) == (3, 0)
    assert len(list(folder.iterdir())) == 3
    again = function_of_the_package()
    assert (again(1.5), again(1), hits(again)) == (2.5, 2, 2)


def test_an_entry_that_was_cut_short_is_compiled_anew(tmp_path, in_folder):
    folder = in_folder(tmp_path)
    function_of_the_package()(1)
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    for size in (0, 10, len(whole) // 2):
        entry.write_bytes(whole[:size])
        again = function_of_the_package()
        assert (again(1), hits(again)) == (2, 0)
        assert len(entry.read_bytes()) == len(whole)


@pytest.mark.parametrize("place", [0, 40, 0.5, -1])
def test_a_damaged_entry_is_compiled_anew(place, tmp_path, in_folder):
    folder = in_folder(tmp_path)
    function_of_the_package()(1)
    (entry,) = folder.iterdir()
    content = bytearray(entry.read_bytes())
    content[int(len(content) * place) if place == 0.5 else place] ^= 0x55
    entry.write_bytes(content)
    anew, found = function_of_the_package(), function_of_the_package()
    assert (anew(1), hits(anew)) == (2, 0)
    assert (found(1), hits(found)) == (2, 1), "it was not written again"


def test_a_file_that_was_never_finished_is_removed_once_it_is_old(tmp_path, in_folder):
    folder = in_folder(tmp_path)
    function_of_the_package()(1)
    (entry,) = folder.iterdir()
    old, young = entry.with_name(f"{entry.name}.old"), entry.with_name(f"{entry.name}.young")
    for path in (old, young):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    entry.unlink()
    function_of_the_package()(1)
    assert set(folder.iterdir()) == {entry, young}


def test_functions_of_other_packages_are_not_kept(tmp_path, in_folder):
    folder = in_folder(tmp_path)

    def add_one(x):
        return x + 1

    names = {}
    exec("def add_two(x): return x + 2", names)  # code from no file
    assert compiler.compiled(add_one)(1) == 2
    assert compiler.compiled(names["add_two"])(1) == 3
    assert not folder.exists()


def test_a_place_that_cannot_be_written_is_done_without(tmp_path, in_folder):
    (tmp_path / "file").write_text("")
    folder = in_folder(tmp_path / "file")
    assert folder is not None
    assert function_of_the_package()(1) == 2


# Where the home is no folder nothing can be written, as in the test above.
@pytest.mark.parametrize(
    "home", ["", pytest.param("file", marks=pytest.mark.exhaustive)], ids=["none", "no folder"]
)
def test_a_user_without_a_home_computes_all_the_same(home, tmp_path):
    (tmp_path / "file").write_text("")
    code = """
        import json, os
        from quire.kernels import compile as compiler
        from quire.planning.stream_k import part_end
        print(json.dumps([int(part_end(0, 70, 64)), os.listdir()]))
        """
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"},
            "HOME": home and str(tmp_path / home),
            "XDG_CACHE_HOME": home and str(tmp_path / home),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [64, ["file"]]


def test_a_new_folder_removes_all_but_those_used_last(tmp_path, in_folder):
    folder = in_folder(tmp_path)
    for age in range(compiler.KEPT_FOLDERS + 2):
        old = folder.with_name(f"old{age}")
        old.mkdir(parents=True)
        (old / "entry.nbc").write_text("")
        os.utime(old, (10**9 - age, 10**9 - age))
    function_of_the_package()(1)
    kept = {path.name for path in folder.parent.iterdir()}
    assert kept == {folder.name, *(f"old{age}" for age in range(compiler.KEPT_FOLDERS - 1))}
    os.utime(folder, (0, 0))
    in_folder(tmp_path)
    assert folder.stat().st_mtime > 10**9, "a process that begins to use a folder marks it"


def test_cpus_have_entries_of_their_own_and_processes_that_write_at_once_lose_none(tmp_path):
    """Six signatures of one function, by two processes at once; then all are found, but not on another CPU."""
    code = (
        RUN
        + """
from numba import types
from quire.planning.stream_k import part_end
signatures = [types.int8, types.int16, types.int32, types.uint8, types.uint16, types.uint32]
for kind in signatures[{first}:{last}]:
    part_end.compile((kind, kind, kind))
print(json.dumps(compiled))
"""
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_FEATURES": ""}

    def start(cpu, first, last):
        return subprocess.Popen(
            [sys.executable, "-c", code.format(first=first, last=last)],
            env={**environment, "NUMBA_CPU_NAME": cpu},
            stdout=subprocess.PIPE,
            text=True,
        )

    def outputs(processes):
        with contextlib.ExitStack() as stack:
            for process in processes:
                stack.enter_context(process)
            return [json.loads(process.communicate()[0]) for process in processes]

    first = outputs([start("generic", 0, 4), start("generic", 1, 6)])
    assert 6 <= sum(names.count("part_end") for names in first) <= 9
    assert outputs([start("generic", 0, 6)]) == [[]]
    other = "x86-64" if os.uname().machine == "x86_64" else "cortex-a72"
    assert "part_end" in outputs([start(other, 0, 1)])[0]


@pytest.mark.xdist_group("decode-float32-same-d16-g3")
def test_later_processes_find_every_kernel_on_disk_with_openmp_or_without():
    """Machine code is linked against nothing that it calls: without OpenMP the same runs on one thread.

    The kernels are those of other tests, in the folder where they look for them: the first process compiles those that
    none of them has compiled.
    """
    code = (
        RUN
        + """
import ctypes, torch, numba
if hidden:
    class Hidden:
        def __init__(self, name): raise OSError("no OpenMP here")
    ctypes.CDLL = Hidden
import quire
from quire.kernels.cpu import threads, wake
from quire.kernels.cpu.attend.decode import decode
from quire.kernels.cpu.attend.merge import merge
from quire.kernels.cpu.attend.prefill import prefill
from quire.kernels.cpu.store import write

wake.PAYS = 0  # so that even this step is shared, and merged
torch.set_num_threads(2)
torch.manual_seed(0)
k, v = torch.empty(1, 80, 16, 16), torch.empty(1, 80, 16, 16)
quire.write_kv(torch.randn(1280, 1, 16), torch.randn(1280, 1, 16), k, v, torch.arange(1280))
table = torch.arange(80, dtype=torch.int32).view(2, 40)
lens, starts = torch.tensor([640, 600], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
out = quire.paged_attention(torch.randn(3, 3, 16), k, v, table, lens, starts)
num_threads = threads.num_threads()
torch.set_num_threads(3)
quire.paged_attention(torch.randn(3, 3, 16), k, v, table, lens, starts)
kernels = {"decode": decode, "prefill": prefill, "merge": merge, "write": write}
hits = {name: sum(kernel.stats.cache_hits.values()) for name, kernel in kernels.items()}
print(json.dumps({"compiled": compiled, "hits": hits, "threads": num_threads, "out": out.tolist()}))
"""
    )
    first, second, without = (
        run_python(f"hidden = {hidden}\n{code}", timeout=1800) for hidden in (False, False, True)
    )
    for name, hits in first["hits"].items():
        assert hits or name in first["compiled"], f"{name} has not run"
    for later in (second, without):
        assert later["compiled"] == []
    assert min(second["hits"].values()) >= 1
    assert min(without["hits"][name] for name in ("decode", "prefill", "write")) >= 1
    assert without["hits"]["merge"] == 0, "one worker splits nothing"
    assert (first["threads"], second["threads"], without["threads"]) == (2, 2, 1)
    assert second["out"] == first["out"]
    torch.testing.assert_close(torch.tensor(without["out"]), torch.tensor(first["out"]), atol=1e-6, rtol=0)
