"""Print what each backend serves, as the table in docs/features.md, by asking the backends' own checks.

Examples:
    python scripts/served_table.py            # print the table
    python scripts/served_table.py --write    # put it there

A GPU is not needed: the checks are asked for an H100, a chip that the tile table knows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from quire.errors import UnsupportedError
from quire.kernels import load_backend
from quire.spec import COMPUTE_DTYPES, QUANTIZED_DTYPES, AttentionSpec

PAGE = Path(__file__).parent.parent / "docs/features.md"
BEGIN, END = "<!-- served -->\n\n", "\n\n<!-- end -->"
BACKENDS = {
    "cpu": ("CPU (Numba)", torch.device("cpu")),
    "triton": ("GPU (Triton, by an H100's checks)", torch.device("cuda", 0)),
    "reference": ("reference (float64, any device)", torch.device("cpu")),
}
SIZES = (1, 2, 3, 16, 37, 64, 80, 127, 128, 129, 192, 255, 256, 257, 512, 1000)


@contextmanager
def _with_an_h100() -> Iterator[None]:
    from quire.kernels.triton import tune

    with patch.object(tune, "chip_of", lambda device: tune.known_chip("cuda", 90, 132)):
        yield


def table() -> str:
    """The table in Markdown."""
    rows: dict[str, Callable[[str], str]] = {
        "head_dim": lambda backend: _largest(backend, lambda n: {"head_dim": n}),
        "query heads to a KV head": lambda backend: _groups(backend),
        "page_size": lambda backend: _largest(backend, lambda n: {"page_size": n}),
        "queries and outputs": lambda backend: _dtypes(backend),
        "pages, beside the queries' dtype": lambda backend: _page_dtypes(backend),
        "values narrower than keys": lambda backend: _yes(backend, head_dim=64, value_dim=32),
        "batch_invariant": _batch_invariant,
    }
    with _with_an_h100():
        lines = [
            "| | " + " | ".join(title for title, _ in BACKENDS.values()) + " |",
            "| --- |" + " --- |" * len(BACKENDS),
            *(f"| {name} | " + " | ".join(map(ask, BACKENDS)) + " |" for name, ask in rows.items()),
        ]
    return "\n".join(lines)


def _serves(backend: str, **layer: Any) -> bool:
    group = layer.pop("group", 4)
    options = {"num_qo_heads": group, "num_kv_heads": 1, "head_dim": 64} | layer
    try:
        load_backend(backend, AttentionSpec(**options), BACKENDS[backend][1])
    except UnsupportedError:
        return False
    return True


def _yes(backend: str, **layer: Any) -> str:
    return "yes" if _serves(backend, **layer) else "refused"


def _largest(backend: str, layer: Callable[[int], dict[str, Any]], sizes: Sequence[int] = SIZES) -> str:
    served = [size for size in sizes if _serves(backend, **layer(size))]
    if served == list(sizes):
        return "any"
    assert served == [size for size in sizes if size <= served[-1]], "what is served must have one upper end"
    return f"up to {served[-1]}"


def _groups(backend: str) -> str:
    most = _largest(backend, lambda n: {"group": n})
    if most == "any":
        return most
    wide = {
        (str(dtype).removeprefix("torch."), head_dim): _largest(
            backend, lambda n, d=dtype, h=head_dim: {"group": n, "head_dim": h, "dtype": d}, range(1, 257)
        )
        for dtype in (torch.bfloat16, torch.float32)
        for head_dim in (128, 256)
    }
    fewer = [f"{dtype} of {dim}: {n.removeprefix('up to ')}" for (dtype, dim), n in wide.items() if n != most]
    return f"{most} ({', '.join(fewer)})" if fewer else most


def _dtypes(backend: str) -> str:
    served = [dtype for dtype in COMPUTE_DTYPES if _serves(backend, dtype=dtype)]
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in served)


def _page_dtypes(backend: str) -> str:
    return ", ".join(name for name in QUANTIZED_DTYPES if _serves(backend, kv_dtype=name))


def _batch_invariant(backend: str) -> str:
    _, device = BACKENDS[backend]
    spec = AttentionSpec(4, 1, 64)
    kernels = load_backend(backend, spec, device)
    try:
        kernels.tiling(spec, device, 1).batch_invariant(backend)
    except UnsupportedError:
        return "refused"
    return "yes"


def main() -> None:
    """Print the table, or write it between the page's marks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/features.md")
    if not parser.parse_args().write:
        print(table())
        return
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
