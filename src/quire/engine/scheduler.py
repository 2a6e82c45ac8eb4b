"""Who runs in the next step, and on whose pages."""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.engine.hits import PrefixHits
from quire.engine.request import Request
from quire.engine.sequence import Sequence
from quire.errors import ArgumentError
from quire.pages import PageTable, PrefixCache


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence: a piece of its prompt, or the token it generated last.

    request: the one it belongs to.
    slot_mapping: int64 [num_tokens], where their keys and values go.
    copies: (source page, destination page) pairs, to be copied before these are written.
    """

    request: Request
    sequence: Sequence
    num_tokens: int
    slot_mapping: npt.NDArray[np.int64]
    copies: list[tuple[int, int]]

    @property
    def is_last(self) -> bool:
        """Whether no known token is left after this chunk, so that the next one can be chosen."""
        return self.num_tokens == self.sequence.num_pending

    @property
    def choosing(self) -> abc.Sequence[Sequence]:
        """The sequences whose next token the logits of its last token give, if it is the last chunk.

        Its own; at the end of a prompt that is computed for all samples, those that have no token yet.
        """
        if self.request.leader is None:
            return (self.sequence,)
        return [sequence for sequence in self.request.live() if not sequence.num_generated]

    @property
    def prompt_rows(self) -> range:
        """Its tokens, counted from its first, whose logits the request's prompt_logprobs still lack."""
        known, sequence = self.request.prompt_logprobs, self.sequence
        if known is None or sequence is not self.request.sequences[0]:
            return range(0)
        start = sequence.num_computed
        return range(max(len(known) - start, 0), min(sequence.num_prompt_tokens - 1 - start, self.num_tokens))


class Scheduler:
    """First come, first served, under a budget of tokens per step and of pages in all.

    Running requests stand in the order of their arrival, and all before those waiting. Each step
    serves them in that order, so only the last one served can be inside its prompt: those before it
    decode, it takes a chunk of prompt from what is left of the budget, and requests behind it wait.

    When a request needs a page and none is available, the youngest running request gives all of its
    pages back and waits at the front of the queue; later its prompt and the tokens it has generated
    are computed again, as far as they are not found in cached pages. The youngest itself never takes pages from anyone:
    it stands still until there are some. So the oldest request always moves, and every request becomes the oldest.

    The sequences of a request run, wait and give their pages up together. One of them, the leader, computes the prompt
    and the others begin as forks of it, also when they are computed again, so that the prompt is never in pages twice.
    They share partly filled pages with one another (`PageTable.fork`), full ones also with those of other requests
    (`PrefixHits`).

    Nobody is preempted once a request was let in, so no page that a chunk is about to copy is freed by that. A kept
    page that a chunk copies has an owner until `release_sources`, so that a later chunk of the same step cannot take
    it.

    Args:
        table: hands out pages; this scheduler adds, extends and frees sequences under their seq_id.
        max_batch_tokens: most tokens in one step.
        max_num_seqs: most requests running at once; one of several sequences counts once.
        prefix_cache: where pages are found and named; None: nowhere.
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
    ) -> None:
        self.table = table
        self.hits = PrefixHits(table, prefix_cache)
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.steps = 0
        self._sources: list[int] = []  # pages that chunks of this step copy, one owner each

    @property
    def oldest(self) -> Request:
        """The request that arrived first; there must be one."""
        return self.running[0] if self.running else self.waiting[0]

    @property
    def has_requests(self) -> bool:
        """Whether any is running or waiting."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request behind all others; another thread may be in `schedule`."""
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next step and give them slots.

        Returns:
            Chunks of different sequences, at most max_batch_tokens tokens in all; empty when nothing
            can run.
        """
        chunks = self._choose()
        self.steps += bool(chunks)
        return chunks

    def _choose(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget = self.max_batch_tokens
        self.hits.new_step()
        for request in self.running:  # making room may shorten the list, but only behind this request
            for sequence in request.sequences if request.leader is None else (request.leader,):
                if sequence.finish_reason is not None:
                    continue
                num_tokens = self._make_room(request, sequence, min(_pending(request, sequence), budget))
                if not num_tokens:
                    return chunks
                chunks.append(self._extend(request, sequence, num_tokens))
                budget -= num_tokens
        while budget and len(self.running) < self.max_num_seqs and self.waiting:
            request = self.waiting[0]
            # A page of each group to spare per running request: else it would often be preempted a few steps later, its
            # work lost. If none runs, fewer tokens at once must do: nobody will give this one more pages.
            spare = len(self.running) * len(self.table.groups)
            starts = self.hits.find(
                request,
                self.table.allocator.num_available - spare,
                self.max_batch_tokens if self.running else 1,
            )
            if starts is None or self.hits.is_coming(starts):
                break
            self.running.append(request)
            self.waiting.popleft()
            self.hits.begin(request, starts)
            for start in starts:
                num_tokens = min(_pending(request, start.sequence), budget)
                if self.table.releases:  # what it will hold at most may be less than all of these tokens take
                    num_tokens = min(num_tokens, self.table.room(start.sequence.seq_id))
                if num_tokens:
                    chunks.append(self._extend(request, start.sequence, num_tokens))
                    budget -= num_tokens
        return chunks

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

    def finish(self, request: Request, sequence: Sequence) -> None:
        """Free the pages of a running request's sequence that has finished, and forget the request after its last."""
        self.table.free(sequence.seq_id)
        if request.finished:
            self.running.remove(request)

    def remove(self, request: Request) -> None:
        """Forget a request before its end, running or waiting, and free its pages."""
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self._free(request)

    def release_sources(self) -> None:
        """Give up the pages that chunks copy: their copies are made, or will not be."""
        if self._sources:
            self.table.allocator.free(self._sources)
            self._sources = []

    def preempt_all(self) -> None:
        """Take the pages of every running request; all will be computed again, in the same order."""
        self.release_sources()
        wrong: ArgumentError | None = None
        while self.running:
            try:
                self.preempt_youngest()
            except ArgumentError as error:  # someone freed its pages; the others still give theirs back
                wrong = error
        if wrong is not None:
            raise wrong

    def preempt_youngest(self) -> None:
        """Take the pages of the running request that arrived last; it will be computed again."""
        request = self.running[-1]
        if (
            not self.waiting or self.waiting[0] is not request
        ):  # it is, where an interruption came before the next line
            self.waiting.appendleft(request)
        self.running.pop()
        for sequence in request.sequences:
            sequence.num_computed = 0
        request.preemptions += 1
        self._free(request)

    def _free(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.seq_id in self.table:
                self.table.free(sequence.seq_id)

    def _make_room(self, request: Request, sequence: Sequence, num_tokens: int) -> int:
        """How many of num_tokens there are pages for now, taken from younger requests if need be."""
        allocator, table = self.table.allocator, self.table
        while table.pages_needed(sequence.seq_id, num_tokens) > allocator.num_available:
            if request is self.running[-1]:
                return table.room(sequence.seq_id)
            self.preempt_youngest()
        return num_tokens

    def _extend(self, request: Request, sequence: Sequence, num_tokens: int) -> Chunk:
        slot_mapping, copies = self.table.append(sequence.seq_id, num_tokens)
        if copies:
            sources = [source for source, _ in copies if not self.table.allocator.refcount(source)]
            self.table.allocator.share(sources)
            self._sources += sources
        if self.waiting:
            self.hits.announce(sequence, num_tokens)
        return Chunk(request, sequence, num_tokens, slot_mapping, copies)


def _pending(request: Request, sequence: Sequence) -> int:
    """How many tokens a running sequence has to compute: a leader those of the prompt, for all."""
    if request.leader is None:
        return sequence.num_pending
    return sequence.num_prompt_tokens - sequence.num_computed
