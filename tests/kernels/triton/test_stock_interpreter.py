"""Under TRITON_INTERPRET=1 as anyone may set it, without this folder's interpreter: right, or refused with a fix."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parents[2]
CASES = [  # each dtype of pages under two dtypes of queries, one of which is refused
    ("float32", None),
    ("float16", "int8"),
    ("float32", "fp8_e4m3"),
    ("float16", "fp8_e5m2"),
    *itertools.product(["bfloat16"], [None, "int8", "fp8_e4m3", "fp8_e5m2"]),
]

PROGRAM = """
import json, sys
import torch
from accuracy import assert_accurate, exact, plain
from support import Shape, attend, make_batch
import quire
from quire.kernels import reference

def verdicts(shape):
    batch = make_batch(shape, [70, 9, 0], [1, 9, 1], page_size=16)
    state = attend(batch, backend="triton")
    assert_accurate(state, exact(batch), plain(batch), batch.largest_value)
    rows = torch.randn(2, 6, shape.num_kv_heads, shape.head_dim).to(shape.dtype)
    pages, slots = [], torch.tensor([3, 40, -1, 0, 17, 31])
    for write in (reference.write_kv, quire.write_kv):
        pages.append([torch.zeros(batch.k_pages.shape).to(batch.k_pages.dtype) for _ in range(2)])
        scales = {name: torch.zeros_like(scale) for name, scale in batch.scales.items()}
        if write is quire.write_kv:
            write(*rows, *pages[-1], slots, **scales, backend="triton")
        else:
            write(*rows, *pages[-1], slots, scales.get("k_scale"), scales.get("v_scale"))
    for wanted, got in zip(*pages):
        assert torch.equal(wanted.view(torch.uint8), got.view(torch.uint8)), "write_kv differs"

for dtype, kv_dtype in json.loads(sys.argv[1]):
    try:
        verdicts(Shape(getattr(torch, dtype), 16, 2, kv_dtype))
        said = "right"
    except quire.UnsupportedError as refused:
        said = f"refused: {refused}"
    except AssertionError as wrong:
        said = f"wrong: {wrong}"
    print(json.dumps([dtype, kv_dtype, said]))
"""


@pytest.fixture(scope="module")
def said():
    """What the other process says of each case."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {(dtype, kv_dtype): words for dtype, kv_dtype, words in lines}


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="Triton 3.6 needs an older NumPy")
@pytest.mark.parametrize(("dtype", "kv_dtype"), CASES)
def test_each_dtype_is_right_or_refused(dtype, kv_dtype, said):
    words = said[dtype, kv_dtype]
    if dtype == "bfloat16":
        assert words.startswith("refused: ")
        assert "Fix: a GPU, dtype float16 or float32, or backend=" in words
    else:
        assert words == "right"


@pytest.mark.interpreted
def test_this_folders_interpreter_is_taken_for_what_it_is():
    from quire.kernels.triton.interpreted import rounds_as_a_gpu

    assert rounds_as_a_gpu()
