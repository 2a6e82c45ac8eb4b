"""Engines on one model take turns, and take pages from one another when none are left."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from quire.errors import UnsupportedError

if TYPE_CHECKING:
    from quire.engine.scheduler import Scheduler

# Seconds. An engine that has run no step for so many seconds is taken to be suspended; its requests may then be
# preempted.
PATIENCE = 0.1

T = TypeVar("T")


class Turns:
    """Lets one thread at a time touch the pages and the model; none has two turns in a row while another waits.

    A turn holds `PagedModel.lock`, so whoever runs the model without an engine holds that too. A thread that holds it
    cannot have a turn: an engine may sleep in it, and other threads would then wait for the lock.

    **Pages.** Engines on one PagedModel draw from one pool. An engine in which nothing can run takes pages from
    the others' least urgent requests, as long as these are less urgent than its own most urgent one; they are computed
    again later, like all that are preempted. The most urgent request on the model therefore always gets pages while its
    engine is stepped. If nobody steps that engine (a stream that is not read), the others would wait for ever: after
    PATIENCE its requests give their pages too.

    Args:
        lock: `PagedModel.lock`.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._turn_ended = threading.Condition(lock)
        self._owner_thread: int | None = None
        self._last_thread: int | None = None  # who had the last turn
        self._waiting: dict[int, Scheduler | None] = {}  # threads that wait for a turn, and for which engine
        self._deferred: deque[Callable[[], object]] = deque()
        self._schedulers: list[Scheduler] = []
        # By engine without pages and by engine that holds some: the latter's steps, and since when they are so many.
        self._steps_seen: dict[Scheduler, dict[Scheduler, tuple[int, float]]] = {}

    def join(self, engine: object, scheduler: Scheduler) -> None:
        """Count an engine's scheduler in; when the engine is gone, its pages go back."""
        self._schedulers.append(scheduler)
        weakref.finalize(engine, self.defer, lambda: self._leave(scheduler)).atexit = False

    def run(self, action: Callable[[], T], scheduler: Scheduler | None) -> T:
        """Wait for a turn of an engine and run an action in it.

        Args:
            scheduler: the engine's; None: someone who only looks, which does not count as work of an engine.
        Raises:
            UnsupportedError: this thread holds the lock or is inside a turn.
        """
        self.check_may_wait()
        thread = threading.get_ident()
        try:
            self._waiting[thread] = scheduler
            with self._lock:  # and not acquire(): Ctrl-C may come before the next line
                self._let_another_go_first(thread)
                self._waiting.pop(thread, None)
                self._owner_thread = self._last_thread = thread
                try:
                    self._run_all_deferred()
                    return action()
                finally:
                    self._end_turn()
        finally:
            self._waiting.pop(thread, None)
            self._run_deferred()

    @property
    def in_turn(self) -> bool:
        """Whether this thread is inside a turn."""
        return self._owner_thread == threading.get_ident() and self._holds_lock()

    def look(self, action: Callable[[], T]) -> T:
        """Run an action that changes nothing, while no step runs: in a turn, or now if this thread holds the lock."""
        return action() if self._holds_lock() else self.run(action, None)

    @property
    def has_owner(self) -> bool:
        """Whether any thread is inside a turn."""
        return self._owner_thread is not None

    def check_may_wait(self) -> None:
        """Refuse a thread that would make the others wait for the lock that it holds.

        Raises:
            UnsupportedError: this thread holds the lock or is inside a turn.
        """
        if self._holds_lock():
            raise UnsupportedError(
                "step, generate, stream and abort must be called without the model's lock; got a call from a thread "
                "that holds model.lock or runs inside a step of an engine on this model. "
                "Fix: call them after the lock is released, or after the step"
            )

    def defer(self, action: Callable[[], object]) -> None:
        """Run an action in a turn: now if no turn is running, else when the running one ends.

        Never waits, so finalizers may call it, whatever their thread is in the middle of. While a thread holds
        `PagedModel.lock` without a turn, the action waits for the next turn or the next action.
        """
        self._deferred.append(action)
        self._run_deferred()

    def wait(self) -> None:
        """Sleep until another engine has had a turn, at most for PATIENCE."""
        with self._lock:
            self._turn_ended.wait(PATIENCE)

    def take_pages(self, scheduler: Scheduler) -> bool:
        """Make the least urgent request of the other engines give its pages up; False when none may be taken."""
        urgency = scheduler.most_urgent.urgency
        may_give = [
            other
            for other in self._others_with_pages(scheduler)
            if other.running[-1].urgency >= urgency or self._is_suspended(other, scheduler)
        ]
        if not may_give:
            return False
        other = max(may_give, key=lambda other: other.running[-1].urgency)
        try:
            other.preempt_last()
        except BaseException:  # nobody who steps that engine sees it
            other.preempt_all()
            raise
        return True

    def forget_wait(self, scheduler: Scheduler) -> None:
        """An engine has got pages: the next time that it has none, others have PATIENCE again."""
        self._steps_seen.pop(scheduler, None)

    def others_hold_pages(self, scheduler: Scheduler) -> bool:
        """Whether requests of other engines hold pages of the same pool."""
        return bool(self._others_with_pages(scheduler))

    def _others_with_pages(self, scheduler: Scheduler) -> list[Scheduler]:
        pool = scheduler.table.allocator
        return [s for s in self._schedulers if s is not scheduler and s.running and s.table.allocator is pool]

    def _is_suspended(self, other: Scheduler, scheduler: Scheduler) -> bool:
        """Whether an engine has run no step for PATIENCE, while another one waited for pages."""
        now = time.monotonic()
        seen = self._steps_seen.setdefault(scheduler, {})
        steps, since = seen.get(other, (-1, now))
        if steps != other.steps or other in list(self._waiting.values()):
            seen[other] = (other.steps, now)
            return False
        return now - since >= PATIENCE

    def _leave(self, scheduler: Scheduler) -> None:
        scheduler.preempt_all()
        self._schedulers.remove(scheduler)
        self._steps_seen.pop(scheduler, None)
        for seen in self._steps_seen.values():
            seen.pop(scheduler, None)

    def _let_another_go_first(self, thread: int) -> None:
        """Let a turn of another waiting thread pass if this one had the last; with the lock held."""
        if self._last_thread == thread and len(self._waiting) > 1:
            self._turn_ended.wait(PATIENCE)
            if self._last_thread == thread:  # nobody came: the others were interrupted as they waited
                self._waiting.clear()

    def _run_deferred(self) -> None:
        # Whoever fails to get the lock leaves its action to the one who has it, who looks here after letting go.
        while self._deferred and not self.in_turn and self._lock.acquire(blocking=False):
            with self._lock:
                self._lock.release()
                self._owner_thread = threading.get_ident()
                self._end_turn()

    def _end_turn(self) -> None:
        try:
            self._run_all_deferred()
        finally:
            self._owner_thread = None
            self._turn_ended.notify_all()

    def _run_all_deferred(self) -> None:
        while self._deferred:
            self._deferred.popleft()()

    def _holds_lock(self) -> bool:
        """Whether this thread holds the lock, in a turn or without one."""
        try:
            self._turn_ended.notify(0)  # wakes nobody; refuses a thread without the lock
        except RuntimeError:
            return False
        return True


_turns: weakref.WeakValueDictionary[int, Turns] = weakref.WeakValueDictionary()
_turns_lock = threading.Lock()


def turns_of(lock: threading.RLock) -> Turns:
    """The turns of a model's lock: the same for all engines whose models have this lock."""
    with _turns_lock:
        turns = _turns.get(id(lock))  # which keeps the lock, so that the id stays its own
        if turns is None:
            turns = _turns[id(lock)] = Turns(lock)
        return turns
