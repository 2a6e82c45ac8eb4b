"""Who runs in the next step, and on whose pages."""

from __future__ import annotations

import threading
from bisect import insort, insort_left
from collections import abc
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.engine.hits import PrefixHits, Start
from quire.engine.request import Request
from quire.engine.sequence import Sequence
from quire.errors import ArgumentError
from quire.pages import AppendResult, PageTable, PrefixCache, Swap


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence: a piece of its prompt, or the token it generated last.

    request: the one it belongs to.
    slot_mapping: int64 [num_tokens], where their keys and values go.
    copies: (source page, destination page) pairs, to be copied before these are written.
    start: the position of its first token.
    is_last: whether no known token is left after it, so that the next one can be chosen.
    """

    request: Request
    sequence: Sequence
    num_tokens: int
    slot_mapping: npt.NDArray[np.int64]
    copies: list[tuple[int, int]]
    start: int
    is_last: bool

    @classmethod
    def of(
        cls,
        request: Request,
        sequence: Sequence,
        num_tokens: int,
        slot_mapping: npt.NDArray[np.int64],
        copies: list[tuple[int, int]],
    ) -> Chunk:
        """A chunk of tokens that are known."""
        is_last = num_tokens == sequence.num_pending
        return cls(request, sequence, num_tokens, slot_mapping, copies, sequence.num_computed, is_last)

    @property
    def choosing(self) -> abc.Sequence[Sequence]:
        """The sequences whose next token the logits of its last token give, if it is the last chunk.

        Its own; at the end of a prompt that is computed for all samples, those that have no token yet.
        """
        if self.request.leader is None:
            return (self.sequence,)
        return [sequence for sequence in self.request.live() if not sequence.num_generated]

    @property
    def is_current(self) -> bool:
        """Whether its sequence still needs it: not after its end, and not once it gave its pages up."""
        return self.sequence.finish_reason is None and self.sequence.num_computed == self.start

    @property
    def prompt_rows(self) -> range:
        """Its tokens, counted from its first, whose logits the request's prompt_logprobs still lack."""
        known, sequence = self.request.prompt_logprobs, self.sequence
        if known is None or sequence is not self.request.sequences[0]:
            return range(0)
        start = self.start
        return range(max(len(known) - start, 0), min(sequence.num_prompt_tokens - 1 - start, self.num_tokens))


class Scheduler:
    """The most urgent first, under a budget of tokens per step and of pages in all.

    Requests are ordered by `Request.urgency`: by arrival, where a priority above 0 counts as a later arrival and one
    below 0 as an earlier one. Running requests stand in this order, and so do those waiting. Each step serves
    all of them in this order: a running request gets its next tokens, one that waits is let in. So of requests with the
    same priority only the last one served can be inside its prompt: those before it decode, it takes a chunk of
    prompt from what is left of the budget, and requests behind it wait.

    When a request needs a page and none is available, the least urgent running request gives all of its
    pages back and waits again; later its prompt and the tokens it has generated
    are computed again, as far as they are not found in cached pages or brought back from host memory. A waiting request
    takes pages, and a place among max_num_seqs, from running ones that are less urgent; among requests of one priority
    there are none. The least urgent running request never takes pages from anyone: it stands still until there are
    some. So the most urgent one always moves, and as urgency depends on arrival, every request becomes the most urgent.

    The sequences of a request run, wait and give their pages up together. One of them, the leader, computes the prompt
    and the others begin as forks of it, also when they are computed again, so that the prompt is never in pages twice.
    They share partly filled pages with one another (`PageTable.fork`), full ones also with those of other requests
    (`PrefixHits`). Where the budget is smaller than their number, those with the fewest tokens are served first.

    Only requests behind the one that is served are preempted. None of them has a chunk yet, so no page that a chunk is
    about to copy is freed by that. A kept page that a chunk copies has an owner until `release_sources`, so that a
    later chunk of the same step cannot take it.

    Args:
        table: hands out pages; this scheduler adds, extends and frees sequences under their seq_id.
        max_batch_tokens: most tokens in one step.
        max_num_seqs: most requests running at once; one of several sequences counts once.
        prefix_cache: where pages are found and named; None: nowhere.
        swap: copies of the cache's pages in host memory; None: there are none.
    Attributes:
        hits: what was found.
        steps: how often `schedule` has found something to run.
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
        prefix_cache: PrefixCache | None = None,
        swap: Swap | None = None,
    ) -> None:
        self.table = table
        self.hits = PrefixHits(table, prefix_cache, swap)
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = max_num_seqs
        self.waiting: list[Request] = []
        self._queueing = threading.Lock()  # held while `waiting` is changed: requests arrive from any thread
        self.running: list[Request] = []
        self.steps = 0
        self._has_changed = (
            True  # since the last `schedule`: a request has come, or given up pages or its place
        )
        self._was_refused = (
            False  # the first of `waiting`, in the last `schedule`, for want of pages or of a place
        )
        self._available_then = 0  # pages, after the last `schedule`
        self._sources: list[int] = []  # pages that chunks of this step copy, one owner each

    @property
    def most_urgent(self) -> Request:
        """The request that is served first; there must be one."""
        return min((*self.running[:1], *self.waiting[:1]), key=_urgency)

    @property
    def has_requests(self) -> bool:
        """Whether any is running or waiting."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request behind those as urgent; another thread may be in `schedule`."""
        with self._queueing:
            insort(self.waiting, request, key=_urgency)
            self._has_changed = True

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next step and give them slots.

        Returns:
            Chunks of different sequences, at most max_batch_tokens tokens in all; empty when nothing
            can run.
        """
        chunks = self._choose()
        self._available_then = self.table.allocator.num_available
        self.steps += bool(chunks)
        return chunks

    def _choose(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        self._has_changed = False  # first: a request may arrive meanwhile
        self._was_refused = False
        budget = self.max_batch_tokens
        self.hits.new_step()
        place = 0  # the running requests before it have been served
        lets_in = True
        while budget:
            starts = None
            if lets_in and self._waits_for(place):
                starts = self._let_in(place)
                lets_in = starts is not None
            if starts is None and place == len(self.running):
                break
            request = self.running[place]
            place += 1
            due = _due(request, budget) if starts is None else [start.sequence for start in starts]
            for sequence in due:
                num_tokens = min(_pending(request, sequence), budget)
                if starts is None:
                    num_tokens = self._make_room(request, sequence, num_tokens)
                    if not num_tokens:
                        return chunks
                elif self.table.releases:  # it may hold less at most than these tokens take
                    num_tokens = min(num_tokens, self.table.room(sequence.seq_id))
                if num_tokens:
                    chunks.append(self._extend(request, sequence, num_tokens))
                    budget -= num_tokens
        return chunks

    def _waits_for(self, place: int) -> bool:
        """Whether the first waiting request is the next to be served, as the running ones from place on can wait."""
        waiting, running = self.waiting, self.running
        return bool(waiting) and (place == len(running) or waiting[0].urgency < running[place].urgency)

    def _let_in(self, place: int) -> list[Start] | None:
        """Let the first waiting request run, at its place among the running; None where it has to wait."""
        request = self.waiting[0]
        while True:
            if len(self.running) < self.max_num_seqs:
                starts = self._find(request)
                if starts is not None and self.hits.bring_back(request):
                    starts = self._find(request)
                if starts is not None:
                    break
            if len(self.running) == place:
                self._was_refused = True
                return None
            self.preempt_last()
        if self.hits.is_coming(starts):
            return None
        self.running.insert(place, request)
        with self._queueing:
            self.waiting.remove(request)
        self.hits.begin(request, starts)
        return starts

    def _find(self, request: Request) -> list[Start] | None:
        # A page of each group to spare per running request: else it would often be preempted a few steps later.
        to_spare = (len(self.running) + request.num_to_come) * len(self.table.groups)
        return self.hits.find(
            request,
            self.table.allocator.num_available - to_spare,
            # If none runs, fewer tokens at once must do: nobody will give this one more pages.
            self.max_batch_tokens if self.running else 1,
        )

    def schedule_ahead(self, chunks: abc.Sequence[Chunk]) -> list[Chunk]:
        """Choose the step after one that has not ended, and whose tokens nobody knows.

        Every sequence goes on with the token that its chunk chooses, but for those which that token brings to their
        longest. One that turns out to have ended for another reason has a slot too many, and gives it back with its
        pages.

        Args:
            chunks: the step that runs, the last of every sequence.
        Returns:
            Chunks of one token; empty where the next step must wait for the tokens: a request may be let in, or pages
            are short.
        """
        if self._may_let_in or len(chunks) != sum(len(request.live()) for request in self.running):
            return []
        going_on = [c for c in chunks if c.start + c.num_tokens + 1 < c.sequence.max_length]
        table = self.table
        if sum(table.pages_needed(c.sequence.seq_id, 1) for c in going_on) > table.allocator.num_available:
            return []
        self.steps += bool(going_on)
        return [
            Chunk(
                c.request, c.sequence, 1, *self._append(c.sequence, 1), c.start + c.num_tokens, is_last=True
            )
            for c in going_on
        ]

    @property
    def _may_let_in(self) -> bool:
        """Whether a waiting request may run in the next step: always, unless it was refused and nothing has changed."""
        return bool(self.waiting) and (
            not self._was_refused
            or self._has_changed
            or self.table.allocator.num_available > self._available_then
        )

    def advance(self, chunks: list[Chunk]) -> None:
        """The keys and values of these chunks are written: count them, and name the pages that they have filled.

        Pages that are out of sight from now on are given back, cached if they are named. Where a leader has computed
        the prompt, the other sequences of its request begin as forks of it.
        """
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_tokens
            if sequence.num_computed % self.table.page_size < chunk.num_tokens:
                self.hits.name_pages(sequence)
            if self.table.releases:
                self.table.release_unseen(sequence.seq_id)
            request = chunk.request
            if sequence is request.leader and sequence.num_computed == sequence.num_prompt_tokens:
                self._fork(request, sequence)

    def _fork(self, request: Request, leader: Sequence) -> None:
        for sequence in request.live():
            if sequence is not leader:
                self.table.fork(leader.seq_id, sequence.seq_id)
                sequence.num_computed = leader.num_computed
                sequence.prefix = leader.prefix
        request.leader = None

    def regroup(self, forks: abc.Iterable[tuple[Sequence, Sequence]], ended: abc.Iterable[Sequence]) -> None:
        """Exchange sequences of a running request: children begin with the pages of parents, (parent, child).

        After that those that ended give theirs back.
        """
        self._has_changed = True
        for parent, child in forks:
            self.table.fork(parent.seq_id, child.seq_id)
        for sequence in ended:
            self.table.free(sequence.seq_id)

    def finish(self, request: Request, sequence: Sequence) -> None:
        """Free the pages of a running request's sequence that has finished, and forget the request after its last."""
        self._has_changed = True
        self.table.free(sequence.seq_id)
        if request.finished:
            self.running.remove(request)

    def remove(self, request: Request) -> None:
        """Forget a request before its end, running or waiting, and free its pages."""
        for queue in (self.running, self.waiting):
            with self._queueing:
                if request in queue:
                    queue.remove(request)
        self._free(request)

    def release_sources(self) -> None:
        """Give up the pages that chunks copy: their copies are made, or will not be."""
        if self._sources:
            self.table.allocator.free(self._sources)
            self._sources = []

    def preempt_all(self) -> None:
        """Take the pages of every running request; all will be computed again, in the same order.

        Also brings queues and pages in order where a change of them was interrupted.
        """
        self.release_sources()
        if self.hits.swap is not None:
            self.hits.swap.release()
        wrong: ArgumentError | None = None
        while self.running:
            try:
                self.preempt_last()
            except ArgumentError as error:  # someone freed its pages; the others still give theirs back
                wrong = error
        for seq_id in self.table.seq_ids:  # of a request that was about to give them up
            try:
                self.table.free(seq_id)
            except ArgumentError as error:
                wrong = error
        if wrong is not None:
            raise wrong

    def preempt_last(self) -> None:
        """Take the pages of the least urgent running request; it will be computed again.

        After an interruption, Ctrl-C, `preempt_all` does what is left to do.
        """
        request = self.running[-1]
        for sequence in request.sequences:
            sequence.num_computed = 0
        with self._queueing:
            if request not in self.waiting:  # it is, where an interruption came before the next line
                insort_left(self.waiting, request, key=_urgency)
        self.running.pop()
        request.preemptions += 1
        self._free(request)

    def _free(self, request: Request) -> None:
        self._has_changed = True
        for sequence in request.sequences:
            if sequence.seq_id in self.table:
                self.table.free(sequence.seq_id)

    def _make_room(self, request: Request, sequence: Sequence, num_tokens: int) -> int:
        """How many of num_tokens there are pages for now, taken from less urgent requests if need be."""
        allocator, table = self.table.allocator, self.table
        while table.pages_needed(sequence.seq_id, num_tokens) > allocator.num_available:
            if request is self.running[-1]:
                return table.room(sequence.seq_id)
            self.preempt_last()
        return num_tokens

    def _extend(self, request: Request, sequence: Sequence, num_tokens: int) -> Chunk:
        if self.waiting:
            self.hits.announce(sequence, num_tokens)
        return Chunk.of(request, sequence, num_tokens, *self._append(sequence, num_tokens))

    def _append(self, sequence: Sequence, num_tokens: int) -> AppendResult:
        appended = self.table.append(sequence.seq_id, num_tokens)
        if appended.copies:
            sources = [source for source, _ in appended.copies if not self.table.allocator.refcount(source)]
            self.table.allocator.share(sources)
            self._sources += sources
        return appended


def _urgency(request: Request) -> tuple[float, float]:
    return request.urgency


def _due(request: Request, budget: int) -> abc.Sequence[Sequence]:
    """The sequences of a running request that have tokens to compute, in the order in which they are served."""
    if request.leader is not None:
        return (request.leader,)
    due = [each for each in request.sequences if each.finish_reason is None and each.num_pending]
    return sorted(due, key=lambda each: each.num_generated) if len(due) > budget else due


def _pending(request: Request, sequence: Sequence) -> int:
    """How many tokens a running sequence has to compute: a leader those of the prompt, for all."""
    if request.leader is None:
        return sequence.num_pending
    return sequence.num_prompt_tokens - sequence.num_computed
