"""The pool and the queue at a moment: who owns which pages, and how it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from quire.errors import ArgumentError

if TYPE_CHECKING:
    from quire.engine.core import Engine
    from quire.engine.request import Request

MAX_CELLS = 4096  # of a picture; a larger pool has several pages in a cell
MAX_REQUESTS = 200  # named in a snapshot; the others are counted
NOBODY = -1
STATES = ("running", "waiting", "preempted")
_LARGEST = 2**53 - 1  # JavaScript reads whole numbers up to this one
_Counts = npt.NDArray[np.int64]


class Cell(NamedTuple):
    """Neighbouring pages of the pool: one, or as many as `Snapshot.pages_per_cell`.

    owner: the request that alone holds most of them; -1 where none does.
    owned: pages that one sequence of the engine holds alone.
    shared: pages with several owners.
    others: pages with one owner that is no sequence of this engine: one of another engine on the model, or code that
        took them from the allocator.
    cached: pages without an owner whose content is kept. All that is left is free.
    unused: slots of the engine's pages that hold no token.
    """

    owner: int
    owned: int
    shared: int
    others: int
    cached: int
    unused: int


@dataclass(frozen=True)
class RequestPages:
    """A request at a moment.

    Attributes:
        state: "running", "waiting", or "preempted": it waits after it gave its pages up.
        pages: those that it holds, a page shared by its own sequences once.
        cached_tokens: tokens of its prompt that were found in pages.
        seconds: since its arrival.
    """

    request_id: int
    state: str
    prompt_tokens: int
    generated_tokens: int
    pages: int
    cached_tokens: int
    preemptions: int
    seconds: float


@dataclass(frozen=True)
class Snapshot:
    """The pool and the queue of an engine between two steps. `svg()` draws it; a notebook shows that.

    Each page is owned, cached or free: num_owned + num_cached + num_free == num_pages.

    Attributes:
        seconds: since the engine was made.
        num_shared: owned pages with several owners.
        num_others: owned pages with one owner, which is no sequence of this engine.
        group_pages: pages that the engine holds for each group of layers; most models have one.
        unused_slots: slots of the engine's pages that hold no token.
        num_swapped, num_host_pages: pages with a copy in host memory, and room for such copies.
        num_running, num_waiting: requests that hold pages, and those that do not.
        steps, generated_tokens, admitted_tokens, cached_tokens: as of EngineStats.
        tokens_per_second: tokens handed out in the last 5 seconds, by their time.
        first_token_seconds: median time from arrival to first token, of the last 128 requests that finished; None
            before the first.
        between_tokens_seconds: the same of the time between two tokens.
        requests: the running ones and then those that wait, at most 200 in all.
        pages_per_cell, cells: the pool in the order of its pages, at most 4096 cells.
    """

    seconds: float
    page_size: int
    bytes_per_page: int
    num_pages: int
    num_owned: int
    num_shared: int
    num_others: int
    num_cached: int
    num_free: int
    group_pages: tuple[int, ...]
    unused_slots: int
    num_swapped: int
    num_host_pages: int
    num_running: int
    num_waiting: int
    steps: int
    generated_tokens: int
    admitted_tokens: int
    cached_tokens: int
    tokens_per_second: float
    first_token_seconds: float | None
    between_tokens_seconds: float | None
    requests: tuple[RequestPages, ...]
    pages_per_cell: int
    cells: tuple[Cell, ...]

    @property
    def hit_rate(self) -> float:
        """The share of admitted tokens that was found in pages; 0.0 before the first."""
        return self.cached_tokens / self.admitted_tokens if self.admitted_tokens else 0.0

    @property
    def held_slots(self) -> int:
        """Slots of the pages that the engine holds, those that hold no token included."""
        return sum(self.group_pages) * self.page_size

    def as_json(self) -> dict[str, Any]:
        """The same in plain values for `json.dumps`: equal cells in a row are one, with their number at its end."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["requests"] = [vars(request) for request in self.requests]
        plain["group_pages"] = list(self.group_pages)
        runs: list[list[int]] = []
        last: Cell | None = None
        for cell in self.cells:
            if cell == last:
                runs[-1][-1] += 1
            else:
                runs.append([*cell, 1])
                last = cell
        plain["cells"] = runs
        return plain

    @classmethod
    def from_json(cls, plain: object) -> Snapshot:
        """What `as_json` made.

        Raises:
            ArgumentError: something else; every value is checked.
        """
        try:
            return _from_json(plain)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ArgumentError(
                f"a snapshot must be what Snapshot.as_json made; got {type(error).__name__}: {error!s:.200}. "
                "Fix: a trace written by this version of Quire"
            ) from error

    def svg(self) -> str:
        """A picture of the pool, 830 units wide, legible on light and dark pages. It holds numbers alone, no text."""
        from quire.engine.picture import draw

        return draw(self)

    def _repr_svg_(self) -> str:
        return self.svg()

    def __str__(self) -> str:
        return (
            f"{self.num_pages} pages of {self.page_size} tokens: {self.num_owned} owned ({self.num_shared} shared), "
            f"{self.num_cached} cached, {self.num_free} free; {self.unused_slots} of {self.held_slots} slots unused; "
            f"{self.num_running} requests running, {self.num_waiting} waiting"
        )


def take(engine: Engine, *, max_cells: int = MAX_CELLS) -> Snapshot:
    """The engine as it is now, in a turn.

    Cost: O(num_pages + pages held) in NumPy, and a few microseconds per sequence.
    """
    allocator, table, stats, swap = engine.model.allocator, engine.table, engine.stats, engine.model.swap
    now = time.perf_counter()
    with engine._news:  # so that none is added meanwhile
        live = list(engine.requests.values())
        running = list(engine._scheduler.running)
    holds = {request.request_id for request in running}
    waiting = [request for request in live if request.request_id not in holds]
    pages = _Pages(engine, running)
    cells, pages_per_cell = pages.cells(max_cells)
    listed = [*running, *waiting][:MAX_REQUESTS]
    return Snapshot(
        seconds=now - engine._made_at,
        page_size=table.page_size,
        bytes_per_page=engine.model.bytes_per_page,
        num_pages=allocator.num_pages,
        num_owned=int(np.count_nonzero(pages.refcounts)),
        num_shared=int(pages.shared.sum()),
        num_others=int(pages.others.sum()),
        num_cached=int(pages.cached.sum()),
        num_free=allocator.num_pages - int(np.count_nonzero(pages.refcounts)) - int(pages.cached.sum()),
        group_pages=pages.by_group,
        unused_slots=int(pages.unused.sum()),
        num_swapped=0 if swap is None else swap.num_swapped,
        num_host_pages=0 if swap is None else swap.allocator.num_pages,
        num_running=len(running),
        num_waiting=len(waiting),
        steps=stats.steps,
        generated_tokens=stats.generated_tokens,
        admitted_tokens=stats.admitted_tokens,
        cached_tokens=stats.cached_tokens,
        tokens_per_second=engine._rates.tokens_per_second(now),
        first_token_seconds=engine._rates.first_token_seconds(),
        between_tokens_seconds=engine._rates.between_tokens_seconds(),
        requests=tuple(
            _request(each, each.request_id in holds, pages.held.get(each.request_id, 0), now)
            for each in listed
        ),
        pages_per_cell=pages_per_cell,
        cells=cells,
    )


class _Pages:
    """Every page of the pool, in arrays."""

    def __init__(self, engine: Engine, running: Sequence[Request]) -> None:
        table, allocator = engine.table, engine.model.allocator
        size = table.page_size
        self.refcounts = np.frombuffer(allocator.refcounts(), dtype=np.int32)
        kept = np.frombuffer(allocator.kept(), dtype=np.uint8) != 0
        self.owner = np.full(allocator.num_pages, NOBODY, dtype=np.int64)
        used = np.zeros(allocator.num_pages, dtype=np.int64)
        in_groups = [np.zeros(allocator.num_pages, dtype=np.bool_) for _ in table.groups]
        request_of = {each.seq_id: request.request_id for request in running for each in request.sequences}
        of_requests: dict[int, list[npt.NDArray[np.int64]]] = {}
        for seq_id in table.seq_ids:
            request_id = request_of.get(seq_id, NOBODY)  # type: ignore[call-overload]
            for group, in_group in enumerate(in_groups):
                pages = np.asarray(table.pages(seq_id, 0, group), dtype=np.int64)
                if not len(pages):
                    continue
                last_tokens = (table.length(seq_id) - 1) % size + 1
                used[pages[:-1]] = size
                used[pages[-1]] = max(used[pages[-1]], last_tokens)
                in_group[pages] = True
                self.owner[pages] = request_id
                of_requests.setdefault(request_id, []).append(pages)
        held = np.logical_or.reduce(in_groups)
        self.unused = np.where(held, size - used, 0)
        self.shared = self.refcounts > 1
        self.owned = (self.refcounts == 1) & held
        self.others = (self.refcounts == 1) & ~held
        self.cached = (self.refcounts == 0) & kept
        self.by_group = tuple(int(in_group.sum()) for in_group in in_groups)
        self.held = {
            request_id: len(np.unique(np.concatenate(pages))) for request_id, pages in of_requests.items()
        }

    def cells(self, max_cells: int) -> tuple[tuple[Cell, ...], int]:
        """The pages in at most so many cells, and how many are in each; the last may have fewer."""
        num_pages = len(self.owner)
        per_cell = -(-num_pages // max_cells)
        count = -(-num_pages // per_cell)

        def sums(values: npt.NDArray[Any]) -> _Counts:
            padded = np.zeros(count * per_cell, dtype=np.int64)
            padded[:num_pages] = values
            total: _Counts = padded.reshape(count, per_cell).sum(axis=1)
            return total

        columns = [self._main_owners(count, per_cell)]
        columns += [sums(each) for each in (self.owned, self.shared, self.others, self.cached, self.unused)]
        return tuple(Cell(*row) for row in np.stack(columns, axis=1).tolist()), per_cell

    def _main_owners(self, count: int, per_cell: int) -> _Counts:
        """In each cell the request that alone holds most of its pages."""
        main = np.full(count, NOBODY, dtype=np.int64)
        pages = np.flatnonzero(self.owned & (self.owner != NOBODY))
        if len(pages):
            ids, place = np.unique(self.owner[pages], return_inverse=True)
            pairs, times = np.unique(pages // per_cell * len(ids) + place, return_counts=True)
            order = np.argsort(times, kind="stable")  # of a cell's requests the last one is written last
            main[pairs[order] // len(ids)] = ids[pairs[order] % len(ids)]
        return main


def _request(request: Request, holds_pages: bool, pages: int, now: float) -> RequestPages:
    sequences = list(request.sequences)
    prompt_tokens = sequences[0].num_prompt_tokens
    return RequestPages(
        request_id=request.request_id,
        state="running" if holds_pages else "preempted" if request.preemptions else "waiting",
        prompt_tokens=prompt_tokens,
        generated_tokens=sum(each.num_generated for each in sequences),
        pages=pages,
        cached_tokens=request.num_cached_tokens,
        preemptions=request.preemptions,
        seconds=now - request.arrived,
    )


def _from_json(plain: object) -> Snapshot:
    if not isinstance(plain, Mapping):
        raise TypeError("no object")
    values: dict[str, Any] = {}
    for field in fields(Snapshot):
        value = plain[field.name]
        if field.name == "requests":
            _check_list(value, MAX_REQUESTS)
            values[field.name] = tuple(_request_from_json(each) for each in value)
        elif field.name == "cells":
            values[field.name] = _cells_from_json(value)
        elif field.name == "group_pages":
            _check_list(value, 1000)
            values[field.name] = tuple(_whole(each) for each in value)
        else:
            values[field.name] = _number(value, str(field.type))
    snapshot = Snapshot(**values)
    per_cell = snapshot.pages_per_cell
    if per_cell < 1 or len(snapshot.cells) != -(-snapshot.num_pages // per_cell):
        raise ValueError(f"{len(snapshot.cells)} cells of {per_cell} pages for {snapshot.num_pages} pages")
    for cell in snapshot.cells:
        if sum(cell[1:5]) > per_cell or cell.unused > per_cell * snapshot.page_size:
            raise ValueError(f"{cell} in a cell of {per_cell} pages")
    return snapshot


def _request_from_json(plain: object) -> RequestPages:
    if not isinstance(plain, Mapping):
        raise TypeError("a request that is no object")
    if plain["state"] not in STATES:
        raise ValueError(f"the state {plain['state']!r:.50}")
    numbers = {
        field.name: _number(plain[field.name], str(field.type))
        for field in fields(RequestPages)
        if field.name != "state"
    }
    return RequestPages(state=plain["state"], **numbers)


def _cells_from_json(plain: object) -> tuple[Cell, ...]:
    _check_list(plain, MAX_CELLS)
    assert isinstance(plain, list)
    cells: list[Cell] = []
    for run in plain:
        owner, *counts = run
        *counts, times = (_whole(each) for each in counts)
        if isinstance(owner, bool) or not isinstance(owner, int) or not NOBODY <= owner <= _LARGEST:
            raise ValueError(f"the owner {owner!r:.50}")
        if len(cells) + times > MAX_CELLS:
            raise ValueError(f"more than {MAX_CELLS} cells")
        cells += [Cell(owner, *counts)] * times
    return tuple(cells)


def _check_list(value: object, longest: int) -> None:
    if not isinstance(value, list) or len(value) > longest:
        raise TypeError(f"no list of at most {longest}")


def _number(value: Any, kind: str) -> Any:
    if kind == "int":
        return _whole(value)
    if value is None and kind.endswith("None"):
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise ValueError(f"the number {value!r:.50}")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise ValueError(f"the whole number {value!r:.50}")
    return value
