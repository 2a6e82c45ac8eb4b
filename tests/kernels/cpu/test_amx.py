"""AMX's tile registers: used when asked for alone, right on an emulation of them, and made of few instructions."""

import errno
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from other_cpus import ON_X86, found_on

import quire
from quire.cli import doctor
from quire.errors import ArgumentError, UnsupportedError
from quire.kernels.cpu import amx, backend
from quire.kernels.cpu.simd import amx as words
from quire.kernels.cpu.simd.llvm import LANES

HERE = Path(__file__).parent
SPEC = quire.AttentionSpec(8, 2, 64)


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    """Forget what was asked and answered before and after each test."""
    caches = amx.is_asked_for, amx.lacks, amx.why_not, backend._kernels
    monkeypatch.delenv(amx.VARIABLE, raising=False)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def prefill_config():
    return backend._kernels(SPEC)[1].config


@pytest.mark.parametrize("value", [None, "", "0"])
def test_tiles_are_off_unless_asked_for_and_linux_is_not_asked(monkeypatch, value):
    monkeypatch.setattr(amx, "why_not", lambda: pytest.fail("asked Linux for tiles"))
    if value is not None:
        monkeypatch.setenv(amx.VARIABLE, value)
    assert not amx.in_use()
    assert prefill_config().amx == 0


@pytest.mark.parametrize("value", ["yes", "2", " 1"])
def test_another_value_is_refused(monkeypatch, value):
    monkeypatch.setenv(amx.VARIABLE, value)
    with pytest.raises(ArgumentError, match=r"QUIRE_AMX must be 0 or 1; got '.*'\. Fix: unset it"):
        amx.in_use()


def test_asked_for_where_there_are_none_they_are_an_error_and_no_slower_kernel(monkeypatch):
    monkeypatch.setenv(amx.VARIABLE, "1")
    monkeypatch.setattr(amx, "why_not", lambda: "this CPU has no amx-tile")
    with pytest.raises(UnsupportedError, match="QUIRE_AMX=1 needs AMX; got a process where this CPU has no"):
        amx.in_use()
    [row] = doctor._tiles()
    assert "this CPU has no amx-tile. Fix: unset QUIRE_AMX" in row[2]


@pytest.mark.skipif(LANES != 16, reason="tile registers come with vectors of 512 bits")
def test_asked_for_and_permitted_bfloat16_prompts_use_them_and_nothing_else_does(monkeypatch):
    monkeypatch.setenv(amx.VARIABLE, "1")
    monkeypatch.setattr(amx, "why_not", lambda: None)
    decode, prefill = backend._kernels(SPEC)
    assert (decode.config.amx, prefill.config.amx) == (0, 1)
    jobs = backend.compile_jobs(SPEC)
    others = [job.arguments[0] for job in jobs if job.function in ("decode", "merge", "write")]
    assert len(others) == 3
    assert not any(config.amx for config in others)
    assert "use its tile registers" in doctor._tiles()[0][2]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (0, None),
        (errno.ENOSPC, "alternate signal stack is too small"),
        (errno.EOPNOTSUPP, "Linux does not permit the tile registers: Operation not supported"),
    ],
)
def test_what_linux_answers_is_said(monkeypatch, error, said):
    asked = []
    monkeypatch.setattr(amx, "lacks", lambda: None)
    monkeypatch.setattr(amx, "_request_permission", lambda: asked.append(error) or error)
    features = ",".join(f"+{name}" for name in amx.FEATURES)
    monkeypatch.setattr(amx.cpu_target.target_context.codegen(), "_tm_features", features)
    for _ in range(3):
        reason = amx.why_not()
        assert reason is None if said is None else said in reason
    assert asked == [error], "once per process"


@pytest.mark.skipif(sys.platform != "linux" or not ON_X86, reason="a system call of Linux on x86")
def test_the_system_call_is_answered_and_not_unknown():
    """0 where the machine has tiles; where it has none Linux knows the request and refuses it."""
    assert amx._request_permission() in (0, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC)


def test_the_configuration_is_palette_1_with_eight_tiles_of_full_size():
    raw = np.array(words.CONFIG, np.int64).tobytes()
    palette, start_row, *rest = struct.unpack("<BB14x16H16B", raw)
    assert (palette, start_row) == (1, 0)
    assert rest[:16] == [64] * 8 + [0] * 8
    assert rest[16:] == [16] * 8 + [0] * 8


@pytest.mark.skipif(LANES != 16, reason="the emulation computes in vectors of 512 bits")
@pytest.mark.parametrize(
    "chosen",
    [
        "shapes_are or d32 and (page and 3 or every_square and (33 or 97) or feature) or say_so or no_number",
        pytest.param("test_", marks=pytest.mark.exhaustive),
    ],
    ids=["one shape", "every shape"],
)
def test_prefill_is_right_on_emulated_registers(chosen, tmp_path):
    """In a process of its own, where the words are replaced; on one thread, for there is one set of registers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "PYTEST_"))}
    plain = [
        "-p",
        "amx_machine",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "addopts=--import-mode=importlib",
    ]
    path = os.pathsep.join([str(HERE), *sys.path])
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-k",
            chosen,
            *plain,
            str(HERE / "attend/test_tile_products.py"),
        ],
        env={**kept, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout
    assert "skipped" not in result.stdout, "the registers were emulated"


def test_the_products_are_tile_instructions_and_no_register_is_moved_to_the_stack(tmp_path):
    """Compiled for a machine that has them, not run."""
    case = "amx-bfloat16-same-d128-g4"
    code = found_on("sapphirerapids", tmp_path, "cross", "x86_64-unknown-linux-gnu", case)[case]
    tiles = code["tiles"]
    count = Counter(line.split()[0] for line in tiles)
    assert count["ldtilecfg"] == 1, "once a share, not once a block"
    assert count["tilerelease"] == 1
    products = [re.findall(r"tmm(\d)", line)[::-1] for line in tiles if line.startswith("tdpbf16ps")]
    squares = len(products) // 4
    assert squares >= 2, "scores and values"
    assert products == [["0", "4", "6"], ["1", "4", "7"], ["2", "5", "6"], ["3", "5", "7"]] * squares
    sums_loaded = (
        count["tilestored"] - count["tilezero"]
    )  # sums that are stored were loaded or began with zero
    assert count["tileloadd"] == len(products) + sums_loaded, "four loads serve four products"
    assert not any("%rsp" in line or "%rbp" in line for line in tiles if line.startswith("tile")), "no spill"
    assert code["pair_products"] == 0
