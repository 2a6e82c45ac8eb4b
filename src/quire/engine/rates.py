"""How fast an engine was of late: tokens per second, and what requests waited."""

from __future__ import annotations

import statistics
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.engine.request import Request

WINDOW = 5.0  # seconds that "of late" reaches back
_PIECE = 0.1  # seconds of steps that are counted together
_REQUESTS = 128  # so many of those that ended last count


class Rates:
    """Counts tokens by the time of their steps, and the waits of requests that ended.

    Its figures are of the last 5 seconds and the last 128 requests. Not thread-safe: an engine uses it in its turns.

    Cost: under a microsecond per step; at most 100 entries and 128 pairs of numbers are kept.
    """

    def __init__(self) -> None:
        self._pieces: deque[list[float]] = deque()  # begin, end and tokens of a tenth of a second
        self._total = 0
        self._waits: deque[tuple[float, float | None]] = deque(maxlen=_REQUESTS)

    def count(self, begin: float, end: float, total: int) -> None:
        """Take notice of a step, in seconds, and of the tokens handed out so far, in all."""
        gained, self._total = max(total - self._total, 0), total  # a caller may have set the total back
        if self._pieces and begin - self._pieces[-1][0] < _PIECE:
            self._pieces[-1][1] = end
            self._pieces[-1][2] += gained
        else:
            self._pieces.append([begin, end, gained])
            self._forget(end)

    def end(self, request: Request) -> None:
        """Take notice of a request that has finished."""
        began = [each for each in request.sequences if each.first_token_at is not None]
        if not began:
            return
        first = min(began, key=lambda each: each.first_token_at or 0.0)
        assert first.first_token_at is not None
        between = (
            (first.finished_at - first.first_token_at) / (first.num_generated - 1)
            if first.num_generated > 1
            else None
        )
        self._waits.append((first.first_token_at - request.arrived, between))

    def tokens_per_second(self, now: float) -> float:
        """Tokens handed out in the last 5 seconds, by their time; 0.0 where there was no step."""
        self._forget(now)
        if not self._pieces:
            return 0.0
        elapsed = now - max(self._pieces[0][0], now - WINDOW)
        return sum(piece[2] for piece in self._pieces) / elapsed if elapsed > 0 else 0.0

    def first_token_seconds(self) -> float | None:
        """Median time from a request's arrival to its first token; None before the first."""
        return statistics.median(first for first, _ in self._waits) if self._waits else None

    def between_tokens_seconds(self) -> float | None:
        """Median over requests of the mean time between two tokens; None before the first of two tokens."""
        found = [between for _, between in self._waits if between is not None]
        return statistics.median(found) if found else None

    def _forget(self, now: float) -> None:
        while self._pieces and self._pieces[0][1] < now - WINDOW:
            self._pieces.popleft()
