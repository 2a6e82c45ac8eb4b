"""The picture of who owns which pages: a cell per page, a colour and a letter per request."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from quire.cli.console import visible
from quire.engine import Engine
from quire.engine.request import Request

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Neighbours differ in lightness too, for eyes that see fewer hues; all are light enough for black ground.
COLOURS = ("#f2a33a", "#56b4e9", "#2fbf71", "#f7e04b", "#a58bf0", "#ef5b4c", "#e58fb8", "#c9c2b8")
SHARED_COLOUR = "#ffffff"
FULL, PARTIAL, SHARED, CACHED, FREE = "■", "▄", "◆", "□", "·"
PLAIN_SHARED, PLAIN_CACHED, PLAIN_FREE = "*", "-", "."


def colour_of(index: int) -> str:
    """The colour of the index-th request."""
    return COLOURS[index % len(COLOURS)]


def draw(engine: Engine, requests: Sequence[Request], *, step: int, width: int) -> RenderableType:
    """The pages and the requests as they are now; later steps do not change the picture.

    Args:
        requests: those watched, A, B, C, …; requests of the engine beside these are left out.
        step: number shown in the title.
        width: columns of the terminal.
    """
    legend = Text.assemble(
        (FULL, "bold"), " full  ", (PARTIAL, "bold"), " partly filled  ",
        (SHARED, SHARED_COLOUR), " shared  ", (CACHED, "dim"), " cached  ", (FREE, "dim"), " free",
    )  # fmt: skip
    pages = Panel(
        _cells(engine, requests, columns=max(1, (width - 6) // 2)),
        title=f"[bold]who owns which page[/bold] · after step {step}",
        title_align="left",
        subtitle=legend,
        subtitle_align="right",
        border_style="grey50",
        padding=(0, 2),
        box=box.ROUNDED,
        width=width,
    )
    return Group(pages, _rows(engine, requests, width), _totals(engine))


def plain(engine: Engine, requests: Sequence[Request], *, step: int, columns: int = 64) -> str:
    """The page map in letters, for pipes and files: A, B, C, … own a page, * is shared, - cached, . free."""
    letters = _by_sequence(requests, lambda i: LETTERS[i % 26])
    unowned = [
        PLAIN_CACHED if engine.table.allocator.is_cached(page) else PLAIN_FREE
        for page in range(engine.table.allocator.num_pages)
    ]
    cells = [
        PLAIN_SHARED if len(owners) > 1 else letters.get(owners[0], "?") if owners else sign
        for owners, sign in zip(engine.table.page_owners(), unowned, strict=True)
    ]
    rows = ["".join(cells[start : start + columns]) for start in range(0, len(cells), columns)]
    return "\n".join([f"after step {step}: {_totals(engine).plain}", *rows])


def _by_sequence(requests: Sequence[Request], sign: Callable[[int], str]) -> dict[Hashable, str]:
    """The sign of each request, by the seq_id of its sequences: what the page table knows them by."""
    return {s.seq_id: sign(i) for i, request in enumerate(requests) for s in request.sequences}


def _cells(engine: Engine, requests: Sequence[Request], columns: int) -> Text:
    table = engine.table
    colours = _by_sequence(requests, colour_of)
    partial = {
        table.pages(seq_id, 0, group)[-1]
        for seq_id in table.seq_ids
        if table.length(seq_id) % table.page_size
        for group in range(len(table.groups))
    }
    text = Text()
    for page, owners in enumerate(table.page_owners()):
        if page and page % columns == 0:
            text.append("\n")
        if not owners:
            text.append((CACHED if table.allocator.is_cached(page) else FREE) + " ", "grey42")
        elif len(owners) > 1:
            text.append(SHARED + " ", SHARED_COLOUR)
        else:
            text.append((PARTIAL if page in partial else FULL) + " ", colours.get(owners[0], "default"))
    return text


def _rows(engine: Engine, requests: Sequence[Request], width: int) -> Table:
    rows = Table(box=None, padding=(0, 1), width=width, header_style="grey62")
    rows.add_column("")
    rows.add_column("state", no_wrap=True, width=10)
    for name in ("prompt", "new", "pages"):
        rows.add_column(name, justify="right", no_wrap=True)
    rows.add_column("text", no_wrap=True, ratio=1, overflow="crop")
    for i, request in enumerate(requests):
        colour = colour_of(i)
        live = [s.seq_id for s in request.sequences if s.seq_id in engine.table]
        held = len({page for seq_id in live for page in engine.table.all_pages(seq_id)})
        prompt = request.sequences[0].num_prompt_tokens
        rows.add_row(
            Text(f"{FULL} {LETTERS[i % 26]}", colour),
            _state(request, bool(live)),
            str(prompt),
            str(sum(len(s.tokens) - prompt for s in request.sequences)),
            str(held) if held else Text("–", "grey42"),
            _tail(request, max(8, width - 43)),
        )
    return rows


def _state(request: Request, holds_pages: bool) -> Text:
    if request.finished:
        return Text("done", "grey62")
    if not holds_pages:
        return Text(
            "gave pages" if request.preemptions else "waiting",
            "bold red" if request.preemptions else "grey62",
        )
    if any(s.num_computed < s.num_prompt_tokens for s in request.sequences):
        return Text("reading", "cyan")
    return Text("writing", "bold green")


def _tail(request: Request, size: int) -> Text:
    """The end of the prompt, dim, and of what was generated first, on one line."""
    written = _one_line(request.sequences[0].text)[-size:]
    prompt = _one_line(request.prompt or "")
    return Text.assemble((prompt[max(0, len(prompt) + len(written) - size) :], "grey50"), written)


def _one_line(text: str) -> str:
    return visible(re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", " ⏎ ", text)))


def _totals(engine: Engine) -> Text:
    used, filled = engine.table.occupancy()
    slots = used * engine.table.page_size
    empty = f"{100 * (slots - filled) / slots:.1f} % of their slots empty" if slots else "no slot in use"
    return Text(
        f"{used} of {engine.table.allocator.num_pages} pages in use, "
        f"{used * engine.model.bytes_per_page / 1e6:.1f} MB, {empty}"
    )
