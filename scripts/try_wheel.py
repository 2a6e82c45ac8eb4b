"""Build the wheel, install it as a user would, and run what each extra promises. Minutes, as torch is installed anew.

    python scripts/try_wheel.py                       # with this Python
    python scripts/try_wheel.py --python python3.12 --python python3.13   # ... with others, one after the other
    python scripts/try_wheel.py --base                # the wheel alone, without its extras: a minute

One environment grows: the wheel alone, then with each extra. Before an extra is there, what needs it must say so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

BASE = """
import sys, torch, quire
assert "site-packages" in quire.__file__, quire.__file__
spec = quire.AttentionSpec(num_qo_heads=4, num_kv_heads=2, head_dim=32, page_size=16, dtype=torch.float32)
pool = quire.KVPool(spec, num_layers=1, num_pages=4)
k, v = torch.randn(2, 20, 2, 32)
quire.write_kv(k, v, *pool.layer(0), torch.arange(20))
q, table, lens = torch.randn(1, 4, 32), torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
got = quire.paged_attention(q, *pool.layer(0), table, lens)
wide = [x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v)]
expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), *wide).transpose(0, 1)
torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
try:
    quire.LLM
except quire.QuireError as error:
    assert "[hf]" in str(error), error
else:
    raise SystemExit("quire.LLM is there without transformers")
"""
HF = """
import quire
[output] = quire.LLM().generate("Once upon a time", quire.SamplingParams(max_tokens=8))
assert len(output.token_ids) == 8
"""
SERVE = """
import json, threading, time, urllib.request, quire
from quire.serve.app import create_app
from quire.serve.server import Server, bind, url_of
server, bound = Server(create_app(quire.LLM(), names=["demo"])), bind("127.0.0.1", 0)
thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
thread.start()
while not server.started:
    time.sleep(0.1)
body = json.dumps({"model": "demo", "prompt": "def area(", "max_tokens": 4}).encode()
request = urllib.request.Request(url_of(bound) + "/v1/completions", body, {"content-type": "application/json"})
with urllib.request.urlopen(request, timeout=60) as answer:
    assert json.load(answer)["usage"]["completion_tokens"] == 4
server.should_exit = True
thread.join(60)
"""
PROGRAMS = {"": BASE, "hf": HF, "serve": SERVE}
CONTENTS = ("quire/py.typed", "quire/assets/demo_model/model.safetensors", "quire/kernels/cpu/backend.py")
METADATA = (
    "Requires-Python: <3.14,>=3.10",
    "License-Expression: Apache-2.0",
    "License-File: LICENSE",
    "Description-Content-Type: text/markdown",
    "Classifier: Typing :: Typed",
    "Provides-Extra: hf",
    "Provides-Extra: serve",
)


def main() -> None:
    """Do it all; the first thing that is wrong ends it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", help="an interpreter to install for (default: this one)")
    parser.add_argument("--base", action="store_true", help="leave the extras out")
    args = parser.parse_args()
    for python in args.python or [sys.executable]:
        try_on(python, {"": BASE} if args.base else PROGRAMS)


def try_on(interpreter: str, programs: dict[str, str]) -> None:
    """Build with this interpreter, install into an environment of it, and run the program of each extra."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(interpreter, Path(folder))
        check_contents(wheel)
        environment = Path(folder) / "environment"
        run(interpreter, "-m", "venv", environment)
        python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
        install(python, "torch==2.13.0")  # as the Makefile does: other builds may bring CUDA's libraries
        for extra, program in programs.items():
            install(python, f"quire[{extra}] @ {wheel.as_uri()}" if extra else str(wheel))
            run(python, "-I", "-c", program, cwd=folder)
            print(f"{interpreter}: quire[{extra}]: ok" if extra else f"{interpreter}: quire: ok", flush=True)


def build(python: str, folder: Path) -> Path:
    """The wheel of this checkout."""
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT)
    [wheel] = folder.glob("*.whl")
    if not wheel.name.endswith("-py3-none-any.whl"):
        raise SystemExit(f"the wheel must be for any platform; got {wheel.name}")
    return wheel


def check_contents(wheel: Path) -> None:
    """All that belongs into it, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    missing = [name for name in CONTENTS if name not in names] + [
        line for line in METADATA if line not in text
    ]
    foreign = [name for name in names if not name.startswith(("quire/", "quire-"))]
    if missing or foreign:
        raise SystemExit(f"the wheel lacks {missing} and should not hold {foreign}")


def install(python: Path, requirement: str) -> None:
    """Into the environment, with versions that are known to work."""
    constraints = ROOT / "constraints.txt"
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        constraints,
        requirement,
    )


def run(*command: str | Path, cwd: str | None = None) -> None:
    """A command that must not fail."""
    subprocess.run([str(part) for part in command], check=True, cwd=cwd)


if __name__ == "__main__":
    main()
