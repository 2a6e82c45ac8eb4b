"""Who runs in the next step, and on whose pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.engine.request import Request
from quire.pages import PageTable


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one request: a piece of its prompt, or the token it generated last.

    slot_mapping: int64 [num_tokens], where their keys and values go.
    """

    request: Request
    num_tokens: int
    slot_mapping: npt.NDArray[np.int64]

    @property
    def is_last(self) -> bool:
        """Whether no known token is left after this chunk, so that the next one can be chosen."""
        return self.num_tokens == self.request.num_pending


class Scheduler:
    """First come, first served, under a budget of tokens per step and of pages in all.

    Running requests stand in the order of their arrival, and all before those waiting. Each step
    serves them in that order, so only the last one served can be inside its prompt: those before it
    decode, it takes a chunk of prompt from what is left of the budget, and requests behind it wait.

    When a request needs a page and none is free, the youngest running request gives all of its
    pages back and waits at the front of the queue; later its prompt and the tokens it has generated
    are computed again. The youngest itself never takes pages from anyone: it stands still until
    there are some. So the oldest request always moves, and every request becomes the oldest.

    Args:
        table: hands out pages; this scheduler adds, extends and frees the sequences of its requests
            under their request_id and never forks one, so no append calls for a copy.
        max_batch_tokens: most tokens in one step.
        max_num_seqs: most requests running at once.
        poison: called with the pages that no one owns any more (debugging).
    Cost: a few microseconds of Python per running request and step.
    Source: continuous batching, Orca (OSDI 2022) §3; chunked prefill, Sarathi-Serve, arXiv:2403.02310
        §4; preemption by recomputation, arXiv:2309.06180 §4.5.
    """

    def __init__(
        self,
        table: PageTable,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        poison: Callable[[list[int]], None] | None = None,
    ) -> None:
        self.table = table
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = max_num_seqs
        self.poison = poison
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request behind all others."""
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next step and give them slots.

        Returns:
            Chunks of different requests, at most max_batch_tokens tokens in all; empty when nothing
            can run.
        """
        chunks: list[Chunk] = []
        budget = self.max_batch_tokens
        for request in self.running:  # making room may shorten the list, but only behind this request
            num_tokens = self._make_room(request, min(request.num_pending, budget))
            if not num_tokens:
                return chunks
            chunks.append(self._extend(request, num_tokens))
            budget -= num_tokens
        while (
            budget and len(self.running) < self.max_num_seqs and self.waiting and self._fits(self.waiting[0])
        ):
            request = self.waiting.popleft()
            self.running.append(request)
            self.table.add(request.request_id)
            chunks.append(self._extend(request, min(request.num_pending, budget)))
            budget -= chunks[-1].num_tokens
        return chunks

    def remove(self, request: Request) -> None:
        """Forget a request, running or waiting, and free its pages."""
        if request in self.running:
            self.running.remove(request)
            self._free(request)
        else:
            self.waiting.remove(request)

    def preempt_all(self) -> None:
        """Take the pages of every running request; all will be computed again, in the same order."""
        while self.running:
            self._preempt_youngest()

    def _preempt_youngest(self) -> None:
        request = self.running.pop()
        self.waiting.appendleft(request)
        self._free(request)
        request.num_computed = 0
        request.preemptions += 1

    def _free(self, request: Request) -> None:
        freed = self.table.free(request.request_id)
        if self.poison:
            self.poison(freed)

    def _make_room(self, request: Request, num_tokens: int) -> int:
        """How many of num_tokens there are pages for now, taken from younger requests if need be."""
        allocator, table = self.table.allocator, self.table
        while table.pages_needed(request.request_id, num_tokens) > allocator.num_free:
            if request is self.running[-1]:
                unused_slots = -table.length(request.request_id) % table.page_size
                return unused_slots + allocator.num_free * table.page_size
            self._preempt_youngest()
        return num_tokens

    def _extend(self, request: Request, num_tokens: int) -> Chunk:
        return Chunk(request, num_tokens, self.table.append(request.request_id, num_tokens).slot_mapping)

    def _fits(self, request: Request) -> bool:
        """Whether a waiting request finds pages for all its tokens, with one to spare per running request.

        Without the spare pages it would often be preempted a few steps later, its work lost.
        """
        pages = -(-request.num_pending // self.table.page_size)
        return pages + len(self.running) <= self.table.allocator.num_free
