"""A trace of an engine's steps, in the format of Chrome and Perfetto."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from quire.engine.snapshot import Snapshot, take
from quire.errors import ArgumentError
from quire.spans import Span, recording
from quire.spec import check_size

if TYPE_CHECKING:
    from quire.engine.core import Engine
    from quire.engine.scheduler import Chunk

DEFAULT_MAX_TRACE_BYTES = 256 << 20
LEAST_BYTES = 1 << 16  # of max_bytes: a step and a snapshot
MOST_READ_BYTES = 1 << 30
SNAPSHOT = "snapshot"  # the name of events that hold one
_CELLS = 1024  # of a snapshot in a trace
_LEAST_SECONDS = 0.1  # between two snapshots; a long trace has one after each hundredth of its time
_PROCESS, _THREAD = 1, 1  # one track: steps of an engine never overlap
_END = b"\n]\n"

logger = logging.getLogger("quire")
Event = dict[str, Any]


class Trace:
    """Writes what steps take to a file, each step with one write.

    The file is a JSON array. Each write puts its events over the closing bracket and closes the array again, so that
    the file is whole between writes, however the process ends. A write that fails ends the trace with a warning, and
    no step.

    Args:
        path: a regular file, made or overwritten.
        max_bytes: the file never has more.
    Raises:
        ArgumentError: as `Engine.tracing`.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_TRACE_BYTES) -> None:
        check_size("max_bytes", max_bytes)
        if max_bytes < LEAST_BYTES:
            raise ArgumentError(
                f"max_bytes must be at least {LEAST_BYTES}, for a step and a snapshot; got {max_bytes}. "
                f"Fix: leave it out for {DEFAULT_MAX_TRACE_BYTES}"
            )
        self.path = os.fspath(path)
        self._max_bytes = max_bytes
        self._file: int | None = _open(self.path)
        self._lock = threading.Lock()  # the last step may still write while another thread closes
        self._made_at = time.perf_counter_ns()
        self._next_snapshot = 0.0
        self._chosen: dict[str, int] = {}
        self._counted: dict[str, dict[str, int]] = {}
        self._write([_named("process_name", "Quire"), _named("thread_name", "steps")])

    @contextmanager
    def step(self, engine: Engine) -> Iterator[None]:
        """Take down a step of an engine, in its turn; one that fails too, and none that found nothing to run."""
        self._chosen = {}
        generated = engine.stats.generated_tokens
        begin = time.perf_counter_ns()
        with recording() as spans:
            try:
                yield
            finally:
                end = time.perf_counter_ns()
                if self._chosen and self._file is not None:
                    numbers = {**self._chosen, "generated": engine.stats.generated_tokens - generated}
                    self._take_down(engine, [*spans, Span("step", begin, end)], numbers)

    def note(self, chunks: Sequence[Chunk]) -> None:
        """What the step runs."""
        self._chosen = {
            "requests": len({chunk.request.request_id for chunk in chunks}),
            "tokens": sum(chunk.num_tokens for chunk in chunks),
        }

    def close(self) -> None:
        """Write no more."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _take_down(self, engine: Engine, spans: list[Span], numbers: dict[str, int]) -> None:
        events = [self._slice(each) for each in reversed(spans)]  # what encloses others comes before them
        events[0]["args"] = numbers
        now = self._microseconds(spans[-1].end)
        events += self._counters(engine, now)
        if now >= self._next_snapshot or not engine.requests:
            events.append(
                {
                    "name": SNAPSHOT, "ph": "i", "s": "p", "pid": _PROCESS, "tid": _THREAD, "ts": now,
                    "args": take(engine, max_cells=_CELLS).as_json(),
                }
            )  # fmt: skip
            self._next_snapshot = now + max(_LEAST_SECONDS * 1e6, now / 100)
        self._write(events)

    def _slice(self, span: Span) -> Event:
        return {
            "name": span.name, "ph": "X", "pid": _PROCESS, "tid": _THREAD,
            "ts": self._microseconds(span.begin), "dur": (span.end - span.begin) / 1000,
        }  # fmt: skip

    def _counters(self, engine: Engine, now: float) -> list[Event]:
        """Those that have changed."""
        allocator, running = engine.model.allocator, engine.num_running
        held, filled = engine.table.occupancy()
        counters = {
            "pages": {
                "owned": allocator.num_owned, "cached": allocator.num_cached, "free": allocator.num_free,
            },
            "unused slots": {"slots": held * engine.table.page_size - filled},
            "requests": {"running": running, "waiting": max(len(engine.requests) - running, 0)},
        }  # fmt: skip
        if engine.model.swap is not None:
            counters["swapped pages"] = {"pages": engine.model.swap.num_swapped}
        events = [
            {"name": name, "ph": "C", "pid": _PROCESS, "ts": now, "args": values}
            for name, values in counters.items()
            if self._counted.get(name) != values
        ]
        self._counted = counters
        return events

    def _microseconds(self, nanoseconds: int) -> float:
        return (nanoseconds - self._made_at) / 1000

    def _write(self, events: list[Event]) -> None:
        lines = b",\n".join(json.dumps(event, separators=(",", ":")).encode() for event in events)
        with self._lock:
            if self._file is None:
                return
            size = os.fstat(self._file).st_size  # and no count of our own, which Ctrl-C could miss
            at = max(size - len(_END), 0)
            data = (b",\n" if size else b"[\n") + lines + _END
            if at + len(data) > self._max_bytes:
                self._stop(f"has the {self._max_bytes} bytes that it may have")
                return
            try:
                _write_whole(self._file, data, at)
            except OSError as error:
                with suppress(OSError):  # the end that was there before has its room
                    os.ftruncate(self._file, at)
                    _write_whole(self._file, _END, at)
                self._stop(f"cannot be written: {error}")

    def _stop(self, why: str) -> None:
        logger.warning("the trace %s ends here, as it %s", self.path, why)
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_snapshots(path: str | os.PathLike[str]) -> list[Snapshot]:
    """The snapshots of a trace, in the order of time; also while it is written.

    Raises:
        ArgumentError: no trace, one of more than 1 GiB, or one without a snapshot.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_READ_BYTES + 1)
        if len(data) > MOST_READ_BYTES:
            raise _no_trace(path, f"more than {MOST_READ_BYTES} bytes")
        events = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise _no_trace(path, f"{type(error).__name__}: {error!s:.200}") from error
    if not isinstance(events, list):
        raise _no_trace(path, f"{type(events).__name__} where its events should be")
    found = [
        Snapshot.from_json(event.get("args"))
        for event in events
        if isinstance(event, dict) and event.get("name") == SNAPSHOT and event.get("ph") == "i"
    ]
    if not found:
        raise _no_trace(path, "no snapshot in it, as no step was run")
    return found


def _no_trace(path: str | os.PathLike[str], got: str) -> ArgumentError:
    return ArgumentError(
        f"the file {os.fspath(path)!r} must be a trace that Quire wrote; got {got}. "
        "Fix: quire generate … --trace FILE writes one"
    )


def _open(path: str) -> int:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except (OSError, ValueError) as error:
        raise _no_place(path, str(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise _no_place(path, "something else")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two who write there would destroy both
        os.ftruncate(file, 0)
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError):
            raise _no_place(path, "one that another trace is written to") from error
        raise _no_place(path, str(error)) from error
    except BaseException:
        os.close(file)
        raise
    return file


def _no_place(path: str, got: str) -> ArgumentError:
    return ArgumentError(
        f"a trace must be written to a file that can be made or overwritten; got {path!r}: {got}. "
        "Fix: --trace trace.json"
    )


def _write_whole(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _named(kind: str, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": _THREAD, "args": {"name": name}}
