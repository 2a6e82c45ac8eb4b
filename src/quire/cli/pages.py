"""`quire pages`: the pool of a recorded trace, as a picture or a page to play it on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from quire.assets import PAGES_PAGE
from quire.engine.snapshot import Snapshot
from quire.engine.trace import read_snapshots
from quire.errors import ArgumentError

MOST_MOMENTS = 1000  # of a page; of a longer trace some are left out, evenly


def run(trace: Path, out: Path) -> None:
    """Write what a trace recorded.

    Args:
        trace: a file of `--trace`; may still be written.
        out: .svg for the moment at which most pages were owned, .html for all moments.
    Raises:
        ArgumentError: no such trace, or a file that cannot be written.
    """
    if out.suffix not in (".svg", ".html"):
        raise ArgumentError(
            f"OUT must end in .svg, a picture, or .html, a page; got {str(out)!r}. Fix: pages.html"
        )
    snapshots = read_snapshots(trace)
    text = picture(snapshots) if out.suffix == ".svg" else page(snapshots)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            f"OUT must be a file that can be written; got {str(out)!r}: {error}. Fix: a folder that exists"
        ) from error
    print(f"{out}: {len(snapshots)} moments of {snapshots[0].num_pages} pages")


def picture(snapshots: Sequence[Snapshot]) -> str:
    """The moment at which most pages were owned, as SVG."""
    return max(snapshots, key=lambda each: each.num_owned).svg()


def page(snapshots: Sequence[Snapshot]) -> str:
    """The server's page, with these moments to play instead of a server to ask; whole in one file."""
    stride = -(-len(snapshots) // MOST_MOMENTS)
    plain = [each.as_json() for each in snapshots[::stride]]
    # In HTML a script's text ends at "</", wherever that comes.
    data = json.dumps(plain, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, after = PAGES_PAGE.read_text(encoding="utf-8").split("<!--RECORDED-->")
    return f'{before}<script id="recorded" type="application/json">{data}</script>{after}'
