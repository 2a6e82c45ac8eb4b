"""Where and with what a row was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def facts(command: str) -> dict[str, str]:
    """The columns that all rows of a run share.

    Args:
        command: what to type to measure the same again.
    """
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "threads": str(torch.get_num_threads()),
        "versions": versions("torch", "numba", "numpy", "quire", "transformers"),
        "commit": commit(),
        "command": command,
    }


def machine() -> str:
    """The processor by kind: its name for itself, its cores, and what of its instructions matters here."""
    extensions = [
        name for name in ("avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if name in _cpu_flags()
    ]
    return " ".join([f"{os.cpu_count()}-core {_cpu_name()}", *extensions])


def versions(*packages: str) -> str:
    """`python 3.11.7, torch 2.13.0, …` of those installed."""
    found = [f"python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it."""
    head = _git("rev-parse", "--short", "HEAD")
    return head + ("+" if head and _git("status", "--porcelain", "--untracked-files=no") else "") or "unknown"


def command_line(module: str, arguments: Sequence[str]) -> str:
    """What to type to measure again; where this user's files lie is left out."""
    words = [word.replace(f"{ROOT}/", "") for word in arguments]
    return shlex.join(["python", "-m", module, *("PATH" if word.startswith("/") else word for word in words)])


def cache_bytes() -> dict[str, int]:
    """Bytes of each data cache that this machine's cores have together, nearest first: L1, L2, L3."""
    total: dict[str, int] = {}
    seen = set()
    for index in sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*")):
        level, kind, size, shared = (
            (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
        )
        if kind != "Instruction" and (level, shared) not in seen:
            seen.add((level, shared))
            total[f"L{level}"] = total.get(f"L{level}", 0) + int(size.rstrip("K")) * 1024
    return dict(sorted(total.items()))


def level_of(nbytes: int) -> str:
    """The nearest memory that so many bytes fit into: L1, L2, L3 or memory; "unknown" where no one says.

    A virtual machine shares its L3 with strangers, and may get less of it than this says.
    """
    caches = cache_bytes()
    return next(
        (level for level, size in caches.items() if nbytes <= size), "memory" if caches else "unknown"
    )


def _cpu_name() -> str:
    lines = _cpu_lines("model name")
    return lines[0].replace("(R)", "") if lines else platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    lines = _cpu_lines("flags")
    return lines[0].split() if lines else []


def _cpu_lines(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return result.stdout.strip()
