"""Engines on one model take turns, and take pages from one another when none are left."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.engine.scheduler import Scheduler

PATIENCE = 0.1  # seconds in which no other engine runs, until its older requests are taken for suspended


class Turns:
    """Lets one thread at a time touch the pages and the model, in the order in which the threads asked.

    A turn holds `PagedModel.lock`, so whoever runs the model without an engine holds that too.

    **Pages.** Engines on one PagedModel draw from one pool. An engine in which nothing can run takes pages from
    the others' youngest requests, as long as these are younger than its own oldest; they are computed again
    later, like all that are preempted. So the oldest request on the model is never in want, if its engine
    is stepped. If it is not, a stream that nobody reads for example, the others would wait for it: when none of the
    other engines has run for PATIENCE, older requests give their pages too.

    Args:
        lock: `PagedModel.lock`.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._door = threading.Lock()
        self._moved = threading.Condition(lock)
        self._owner: int | None = None
        self._deferred: deque[Callable[[], None]] = deque()
        self._schedulers: list[Scheduler] = []
        self._stuck: dict[Scheduler, tuple[int, float]] = {}  # the others' steps by then, and since when

    def join(self, engine: object, scheduler: Scheduler) -> None:
        """Count an engine's scheduler in; when the engine is gone, its pages go back."""
        self._schedulers.append(scheduler)
        weakref.finalize(engine, self.soon, lambda: self._leave(scheduler)).atexit = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn and have it."""
        with self._door:  # one thread waits for the lock, the others here: who had a turn comes last
            self._lock.acquire()
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._end_turn()
        self._run_deferred()

    @property
    def is_mine(self) -> bool:
        """Whether this thread is inside a turn."""
        return self._owner == threading.get_ident()

    def soon(self, action: Callable[[], None]) -> None:
        """Run an action in a turn: at once if it is nobody's, else at the end of the one that runs.

        Never waits, so finalizers may call it, whatever their thread is in the middle of.
        """
        self._deferred.append(action)
        self._run_deferred()

    def wait(self) -> None:
        """Sleep until another engine has had a turn, at most for PATIENCE."""
        with self._lock:
            self._moved.wait(PATIENCE)

    def take_pages(self, scheduler: Scheduler) -> bool:
        """Make the youngest request of the other engines give its pages up; False when none may be taken."""
        others = self._others_with_pages(scheduler)
        if not others:
            return False
        youngest = max(others, key=lambda other: other.running[-1].arrived)
        if youngest.running[-1].arrived < scheduler.oldest.arrived and not self._is_tired_of_waiting(
            scheduler, others
        ):
            return False
        youngest.preempt_youngest()
        return True

    def others_hold_pages(self, scheduler: Scheduler) -> bool:
        """Whether requests of other engines hold pages of the same pool."""
        return bool(self._others_with_pages(scheduler))

    def _others_with_pages(self, scheduler: Scheduler) -> list[Scheduler]:
        pool = scheduler.table.allocator
        return [s for s in self._schedulers if s is not scheduler and s.running and s.table.allocator is pool]

    def _is_tired_of_waiting(self, scheduler: Scheduler, others: list[Scheduler]) -> bool:
        steps, now = sum(other.steps for other in others), time.monotonic()
        steps_then, since = self._stuck.get(scheduler, (-1, now))
        if steps_then != steps:
            self._stuck[scheduler] = (steps, now)
            return False
        return now - since >= PATIENCE

    def _leave(self, scheduler: Scheduler) -> None:
        scheduler.preempt_all()
        self._schedulers.remove(scheduler)
        self._stuck.pop(scheduler, None)

    def _run_deferred(self) -> None:
        # Whoever fails to get the lock leaves its action to the one who has it, who looks here after letting go.
        while self._deferred and not self.is_mine and self._lock.acquire(blocking=False):
            self._owner = threading.get_ident()
            self._end_turn()

    def _end_turn(self) -> None:
        try:
            while self._deferred:
                self._deferred.popleft()()
        finally:
            self._owner = None
            self._moved.notify_all()
            self._lock.release()


_turns: weakref.WeakValueDictionary[int, Turns] = weakref.WeakValueDictionary()
_turns_lock = threading.Lock()


def turns_of(lock: threading.RLock) -> Turns:
    """The turns of a model's lock: the same for all engines whose models have this lock."""
    with _turns_lock:
        turns = _turns.get(id(lock))  # which keeps the lock, so that the id stays its own
        if turns is None:
            turns = _turns[id(lock)] = Turns(lock)
        return turns
