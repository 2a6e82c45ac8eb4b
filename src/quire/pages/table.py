"""Which pages each sequence owns, and where its next tokens go."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from quire.errors import ArgumentError
from quire.pages.allocator import PageAllocator
from quire.spec import Visibility, check_size

_PAD = array("i", [-1])
_FEW = 8  # pages that Python counts faster than NumPy


class AppendResult(NamedTuple):
    """Where appended tokens go, and what must be copied before they are written.

    slot_mapping: int64 [num_tokens]; slot = page × page_size + offset of each new token, in order. Of a table
        of several groups int64 [groups, num_tokens].
    copies: (source page, destination page) pairs, for `KVPool.copy_pages` before the tokens are
        written; empty unless a shared page had to become private (copy-on-write).
    """

    slot_mapping: npt.NDArray[np.int64]
    copies: list[tuple[int, int]]


class _Pages:
    """One sequence. In each group as many pages as its length needs, all but the last one full.

    firsts: in each group, how many of its first pages it has given back; page 0 stands for these.
    due: the length from which on it can give back more.
    """

    __slots__ = ("due", "firsts", "groups", "length")

    def __init__(self, groups: list[array[int]], firsts: list[int], length: int) -> None:
        self.groups = groups
        self.firsts = firsts
        self.length = length
        self.due = 0

    def held(self) -> array[int]:
        """Its pages, group by group."""
        if len(self.groups) == 1 and not self.firsts[0]:
            return self.groups[0]
        held = array("i")
        for pages, first in zip(self.groups, self.firsts, strict=True):
            held += pages[first:]
        return held


class PageTable:
    """The pages of every live sequence, in logical order.

    Token t of a sequence lives in its page number t // page_size, at offset t % page_size. Several
    sequences may share a page; one is written only while it has a single owner and its content is not
    kept (see `PageAllocator.keep`).

    **Groups.** Where some layers see fewer tokens than others, the layers form groups and each group has a page table:
    a token then lies on one page of each group, and a sequence gives back those pages of a group that none of its
    later tokens sees (`release_unseen`). All groups take pages of one allocator, so memory goes where it is needed.

    Each sequence keeps its page ids in growing `array`s of int32: appending one costs what a list
    append costs, and `dense` and `csr` only join buffers.

    Args:
        allocator: hands out the pages; may serve other owners beside this table.
        page_size: tokens per page.
        groups: what the layers of each group see; by default one group that sees all tokens.
    Attributes:
        releases: whether there is a group of which pages are ever given back.
    Raises:
        ArgumentError: page_size below one, no group, or chunks that are no whole number of pages.
    Source: block tables, sharing and copy-on-write of PagedAttention, arXiv:2309.06180 §4.2-4.4; groups of layers as in
        vLLM's hybrid KV cache manager.
    """

    def __init__(
        self, allocator: PageAllocator, page_size: int, groups: Sequence[Visibility] = (Visibility(),)
    ) -> None:
        check_size("page_size", page_size)
        if not groups or any(sight.chunk_size % page_size for sight in groups):
            raise ArgumentError(
                f"groups must be what the layers of each page table see, chunks in whole pages of {page_size}; "
                f"got {groups!r:.200}. Fix: leave it out for one table of all tokens"
            )
        self.allocator = allocator
        self.page_size = page_size
        self.groups = tuple(groups)
        self.releases = not all(sight.sees_all for sight in groups)
        self._sequences: dict[Hashable, _Pages] = {}
        # By page, how many sequences of this table hold it; NumPy sees the same memory, for many pages at once.
        self._holders = array("i", [0]) * allocator.num_pages
        self._holders_of_many = np.frombuffer(self._holders, dtype=np.int32)
        self._num_held = 0
        self._num_shares = 0
        allocator.tables.add(self)

    @property
    def seq_ids(self) -> list[Hashable]:
        """The live sequences, oldest first."""
        return list(self._sequences)

    def __contains__(self, seq_id: Hashable) -> bool:
        """Whether a sequence is live."""
        return seq_id in self._sequences

    def length(self, seq_id: Hashable) -> int:
        """Tokens of a sequence. Raises ArgumentError when it is unknown."""
        return self._sequence(seq_id).length

    def pages(self, seq_id: Hashable, first: int = 0, group: int = 0) -> list[int]:
        """Page ids of a sequence in one group, in logical order, from its first-th on; those given back are left out.

        Raises ArgumentError when it is unknown.
        """
        sequence = self._sequence(seq_id)
        return sequence.groups[group][max(first, sequence.firsts[group]) :].tolist()

    def all_pages(self, seq_id: Hashable) -> list[int]:
        """Page ids of a sequence, group by group. Raises ArgumentError when it is unknown."""
        return self._sequence(seq_id).held().tolist()

    def num_released(self, seq_id: Hashable, group: int = 0) -> int:
        """How many of its first pages a sequence has given back in a group. Raises ArgumentError when it is unknown."""
        return self._sequence(seq_id).firsts[group]

    def add(self, seq_id: Hashable, pages: Sequence[int] = (), length: int | None = None) -> None:
        """Start a sequence: empty, or with tokens on pages that are owned or cached, which it shares.

        Args:
            pages: what it begins with, group by group, as `PrefixCache.pages` returns them: of each group those that a
                token behind them sees.
            length: how many tokens; None: all that fit the pages, if there is one group that sees all tokens.
        Raises:
            ArgumentError: the id is in use, a page is free or does not exist, or they are too few or too many for this
                length; nothing was changed.
        Cost: O(pages).
        """
        self._check_unused(seq_id)
        if length is None:
            length = len(pages) // len(self.groups) * self.page_size
        count = -(-length // self.page_size)
        firsts = [sight.first_key(length) // self.page_size for sight in self.groups]
        if len(pages) != count * len(firsts) - sum(firsts):
            raise ArgumentError(
                f"pages must be those that a token behind {length} others sees, "
                f"{count * len(firsts) - sum(firsts)} in {len(firsts)} groups; got {len(pages)}. "
                "Fix: pass PrefixCache.pages(prefix, length) and the same length"
            )
        groups, start = [], 0
        for first in firsts:
            end = start + count - first
            groups.append(array("i", [0]) * first + array("i", pages[start:end]))
            start = end
        sequence = _Pages(groups, firsts, length)
        held = sequence.held()
        self.allocator.share(held, counted=True)
        self._hold(held)
        self._set_due(sequence)
        self._sequences[seq_id] = sequence

    def page_at(self, seq_id: Hashable, index: int, group: int = 0) -> int:
        """The index-th page of a sequence in a group.

        Raises ArgumentError when the sequence is unknown, has no such page, or has given it back.
        """
        return self._sequence(seq_id).groups[group][self._check_index(seq_id, index, group)]

    def replace(self, seq_id: Hashable, index: int, page: int, group: int = 0) -> None:
        """Let a sequence share another page instead of its index-th, one that holds the same keys and values.

        Raises:
            ArgumentError: unknown sequence, no such page in it, or `page` is free; nothing was changed.
        """
        pages = self._sequence(seq_id).groups[group]
        before = pages[self._check_index(seq_id, index, group)]
        self.allocator.share([page], counted=True)
        self._hold([page])
        pages[index] = page
        self._let_go([before])
        self.allocator.free([before], counted=True)

    def pages_needed(self, seq_id: Hashable, num_tokens: int) -> int:
        """Pages that `append` would allocate now, in all groups, the copy-on-write pages included.

        When the sum over several sequences is at most `allocator.num_available`, all their appends
        succeed. The sum can exceed what they take: of sequences that share one partial page each
        counts a copy, and the last to append may write in place. A kept page needs a second one for its copy also in a
        full pool: both exist until the copy is made.

        Raises:
            ArgumentError: unknown sequence, or num_tokens is negative.
        """
        return self._pages_needed(self._sequence(seq_id), num_tokens)

    def room(self, seq_id: Hashable) -> int:
        """Most tokens that `append` would find pages for now. Raises ArgumentError when it is unknown."""
        sequence = self._sequence(seq_id)
        left_in_last_page = -sequence.length % self.page_size
        pages = self.allocator.num_available - (self._pages_needed(sequence, 1) if left_in_last_page else 0)
        return pages // len(self.groups) * self.page_size + left_in_last_page if pages >= 0 else 0

    def append(self, seq_id: Hashable, num_tokens: int) -> AppendResult:
        """Make room for the next num_tokens tokens of a sequence.

        A partially filled last page that someone else owns too, or whose content is kept, is replaced
        by a private page, and the copy to make is reported. Carry out the copies of a step in the order of the appends
        and before writing its tokens; they may be collected into one `KVPool.copy_pages`. A source may have lost its
        last owner: before anything else is allocated, copy it or `share` it until it is copied.

        Raises:
            OutOfPages: too few free pages; nothing was changed.
            ArgumentError: unknown sequence, or num_tokens is negative.
        Cost: no pass over pages already full; one token, the decode step, avoids NumPy arithmetic.
        Source: arXiv:2309.06180 §4.3, §4.4.
        """
        sequence = self._sequence(seq_id)
        groups, first, size = sequence.groups, sequence.length, self.page_size
        copies: list[tuple[int, int]] = []
        needed = self._pages_needed(sequence, num_tokens)
        if needed:
            fresh = self.allocator.allocate(needed, counted=True)
            self._hold(fresh)
            grows_by = -(-(first + num_tokens) // size) - len(groups[0])
            start = 0
            for pages in groups:
                end = start + grows_by
                if first % size and not self.allocator.is_private(pages[-1]):
                    end += 1
                    shared = pages.pop()
                    self._let_go([shared])
                    self.allocator.free([shared], counted=True)
                    copies.append((shared, fresh[start]))
                pages.extend(fresh[start:end])
                start = end
        sequence.length = first + num_tokens
        if len(groups) == 1:
            return AppendResult(_slots(groups[0], size, first, num_tokens), copies)
        return AppendResult(np.stack([_slots(pages, size, first, num_tokens) for pages in groups]), copies)

    def release_unseen(self, seq_id: Hashable) -> None:
        """Give up the pages of a sequence that none of its next tokens sees: in groups with a window or chunks.

        Call it when the tokens so far have been written and attended to. A later `trim` must leave every page in sight.

        Raises:
            ArgumentError: unknown sequence.
        Cost: a comparison, unless there are such pages: once per page of tokens.
        """
        sequence = self._sequence(seq_id)
        if sequence.length < sequence.due:
            return
        length, firsts = sequence.length, sequence.firsts
        for group, sight in enumerate(self.groups):
            first, before = sight.first_key(length) // self.page_size, firsts[group]
            if first > before:
                pages = sequence.groups[group]
                released = pages[before:first]
                pages[before:first] = array("i", [0]) * (first - before)
                firsts[group] = first
                self._let_go(released)
                self.allocator.free(released, counted=True)
        self._set_due(sequence)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Start a sequence with the tokens of another, sharing all its pages, the last included.

        Nothing is copied now. Whoever first appends to a shared partial page takes a private copy
        (see `append`), so write the parent's tokens before either of the two appends.

        Raises:
            ArgumentError: unknown parent, or the child's id is in use.
        Cost: O(pages of the parent).
        Source: arXiv:2309.06180 §4.4.
        """
        source = self._sequence(parent)
        self._check_unused(child)
        held = source.held()
        self.allocator.share(held, counted=True)
        self._hold(held)
        copy = _Pages([pages[:] for pages in source.groups], source.firsts[:], source.length)
        copy.due = source.due
        self._sequences[child] = copy

    def trim(self, seq_id: Hashable, length: int) -> list[int]:
        """Drop tokens from the end until `length` are left, as speculative decoding does.

        Pages left without a token of this sequence are given up. The new last page may be shared or
        kept: the next append then copies it.

        Returns:
            Pages that are free now: those that no one else owns and that are not kept.
        Raises:
            ArgumentError: unknown sequence, length is not from 0 to its present length, or the next token would see a
                page that was given back; nothing was changed.
        Cost: O(pages dropped).
        """
        sequence = self._sequence(seq_id)
        if not 0 <= length <= sequence.length:
            raise ArgumentError(
                f"length must be from 0 to {sequence.length}, the tokens of sequence {seq_id!r}; "
                f"got {length}. Fix: use append to lengthen a sequence"
            )
        for sight, first in zip(self.groups, sequence.firsts, strict=True):
            if first and sight.first_key(length) // self.page_size < first:
                raise ArgumentError(
                    f"length must leave every page in sight of layers that see {sight}; got {length}, where "
                    f"sequence {seq_id!r} has given back its first {first} pages. Fix: trim before release_unseen"
                )
        kept = -(-length // self.page_size)
        released: list[int] = []
        for pages in sequence.groups:
            self._let_go(pages[kept:])
            released += self.allocator.free(pages[kept:], counted=True)
            del pages[kept:]
        sequence.length = length
        return released

    def free(self, seq_id: Hashable) -> list[int]:
        """End a sequence and give up its pages.

        Returns:
            Pages that are free now: those that no one else owns and that are not kept.
        Raises:
            ArgumentError: unknown sequence; also when someone else freed its pages: it has ended then, and its other
                pages stay owned.
        Cost: O(pages of the sequence).
        """
        pages = self._sequence(seq_id).held()
        del self._sequences[seq_id]  # first: it ends also where someone freed its pages before
        self._let_go(pages)
        return self.allocator.free(pages, counted=True)

    def dense(self, seq_ids: Sequence[Hashable]) -> torch.Tensor:
        """Page table of a batch, the `page_table` of `paged_attention`.

        Returns:
            int32 [batch, max_pages] on the CPU, a fresh tensor padded with -1; max_pages is the most
            pages a sequence of the batch has. Of several groups [groups, batch, max_pages]. Pages given back
            are 0: an id that a plan accepts, and that no kernel reads.
        Raises:
            ArgumentError: unknown sequence.
        Cost: one copy of the batch's page ids, row by row.
        """
        batch, num_groups = [self._sequence(seq_id).groups for seq_id in seq_ids], len(self.groups)
        rows = [groups[group] for group in range(num_groups) for groups in batch]
        width = max(map(len, rows), default=0)
        table = _join([row if len(row) == width else row + _PAD * (width - len(row)) for row in rows])
        shape = (len(batch), width) if num_groups == 1 else (num_groups, len(batch), width)
        return torch.from_numpy(table.reshape(shape))

    def seq_lens(self, seq_ids: Sequence[Hashable]) -> torch.Tensor:
        """Tokens of each sequence of a batch, int32 [batch] on the CPU.

        Raises:
            ArgumentError: unknown sequence.
        """
        lengths = [self._sequence(seq_id).length for seq_id in seq_ids]
        return torch.tensor(lengths, dtype=torch.int32, device="cpu")

    def csr(self, seq_ids: Sequence[Hashable], group: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages of a batch in one group end to end, without padding.

        Returns:
            page_indptr int32 [batch + 1] and page_indices int32 [pages of the batch] on the CPU: the
            pages of sequence i are page_indices[page_indptr[i] : page_indptr[i + 1]].
        Raises:
            ArgumentError: unknown sequence.
        Cost: one copy of the batch's page ids, row by row.
        """
        rows = [self._sequence(seq_id).groups[group] for seq_id in seq_ids]
        page_indptr = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum([len(row) for row in rows], out=page_indptr[1:])
        return torch.from_numpy(page_indptr), torch.from_numpy(_join(rows))

    def occupancy(self) -> tuple[int, int]:
        """How many pages the sequences of this table hold, and how many slots of them hold a token.

        What several sequences share counts once.

        Cost: O(sequences), however many pages they hold.
        """
        size = self.page_size
        unused = 0
        shared: dict[
            int, tuple[int, int]
        ] = {}  # last pages of several: how many have not filled it, most tokens
        for sequence in self._sequences.values():
            tokens = sequence.length % size
            for pages in sequence.groups if tokens else ():
                last = pages[-1]
                if self._holders[last] == 1:
                    unused += size - tokens
                else:
                    holders, most = shared.get(last, (0, 0))
                    shared[last] = holders + 1, max(most, tokens)
        for page, (holders, most) in shared.items():
            if holders == self._holders[page]:  # else another one has filled it
                unused += size - most
        return self._num_held, self._num_held * size - unused

    def page_owners(self) -> list[list[Hashable]]:
        """For each page of the allocator, the sequences of this table that hold it, oldest first.

        An owner outside this table does not appear: a page it alone holds has an empty list.

        Cost: O(num_pages + pages held); for pictures and tests, not for every step.
        """
        owners: list[list[Hashable]] = [[] for _ in range(self.allocator.num_pages)]
        for seq_id, sequence in self._sequences.items():
            for page in sequence.held():
                owners[page].append(seq_id)
        return owners

    @property
    def num_shares(self) -> int:
        """Pages of all sequences together, as they were counted; one that several share counts for each."""
        return self._num_shares

    def count_shares(self) -> int:
        """The same, counted from the sequences themselves.

        Cost: O(sequences).
        """
        shares = 0
        for sequence in self._sequences.values():
            for pages, first in zip(sequence.groups, sequence.firsts, strict=True):
                shares += len(pages) - first
        return shares

    def count_holders(self) -> npt.NDArray[np.int32]:
        """How many of its sequences hold each page, int32 [num_pages], counted from the sequences themselves.

        Cost: O(num_pages + pages held); to check the counts, not for every step.
        """
        holders = np.zeros(self.allocator.num_pages, dtype=np.int32)
        for sequence in self._sequences.values():
            np.add.at(holders, np.asarray(sequence.held(), dtype=np.int64), 1)
        return holders

    def recount(self) -> None:
        """Count again which pages the sequences hold, where an interruption may have left the counts wrong.

        Cost: as `count_holders`.
        """
        self._holders_of_many[:] = holders = self.count_holders()
        self._num_held = int(np.count_nonzero(holders))
        self._num_shares = int(holders.sum())

    def _sequence(self, seq_id: Hashable) -> _Pages:
        try:
            return self._sequences[seq_id]
        except KeyError:
            raise ArgumentError(
                f"seq_id must name a sequence of this table ({len(self._sequences)} live); got {seq_id!r}. "
                "Fix: add(seq_id) or fork(parent, seq_id) first"
            ) from None

    def _hold(self, pages: Sequence[int]) -> None:
        """Count one more sequence for each of these pages, no two of them the same."""
        self._num_shares += len(pages)
        if len(pages) < _FEW:
            for page in pages:
                self._num_held += not self._holders[page]
                self._holders[page] += 1
        else:
            index = np.asarray(pages)
            self._num_held += len(pages) - int(np.count_nonzero(self._holders_of_many[index]))
            self._holders_of_many[index] += 1

    def _let_go(self, pages: Sequence[int]) -> None:
        """Count one sequence less for each of these pages."""
        self._num_shares -= len(pages)
        if len(pages) < _FEW:
            for page in pages:
                self._holders[page] -= 1
                self._num_held -= not self._holders[page]
        else:
            index = np.asarray(pages)
            self._holders_of_many[index] -= 1
            self._num_held -= len(pages) - int(np.count_nonzero(self._holders_of_many[index]))

    def _set_due(self, sequence: _Pages) -> None:
        """When the next page falls out of a group's sight."""
        size = self.page_size
        sequence.due = min(
            sight.unseen_from((first + 1) * size)
            for sight, first in zip(self.groups, sequence.firsts, strict=True)
        )

    def _check_index(self, seq_id: Hashable, index: int, group: int) -> int:
        sequence = self._sequence(seq_id)
        first, num_pages = sequence.firsts[group], len(sequence.groups[group])
        if not first <= index < num_pages:
            raise ArgumentError(
                f"index must be from {first} to {num_pages - 1}, the pages of sequence {seq_id!r}; got {index}. "
                "Fix: pages(seq_id) lists them"
            )
        return index

    def _check_unused(self, seq_id: Hashable) -> None:
        if seq_id in self._sequences:
            raise ArgumentError(
                f"seq_id of a new sequence must not be in use; got {seq_id!r}, which is live. "
                "Fix: free it first or choose another id"
            )

    def _pages_needed(self, sequence: _Pages, num_tokens: int) -> int:
        if num_tokens < 0:
            raise ArgumentError(
                f"num_tokens must be 0 or more; got {num_tokens}. Fix: use trim to drop tokens from the end"
            )
        if not num_tokens:
            return 0
        groups, length, size = sequence.groups, sequence.length, self.page_size
        needed = (-(-(length + num_tokens) // size) - len(groups[0])) * len(groups)
        if length % size:
            for pages in groups:
                needed += not self.allocator.is_private(pages[-1])
        return needed

    def __repr__(self) -> str:
        tokens = sum(sequence.length for sequence in self._sequences.values())
        return (
            f"PageTable({len(self._sequences)} sequences of {tokens} tokens in all, page_size={self.page_size}, "
            f"{self.allocator!r})"
        )


def _slots(pages: array[int], page_size: int, first: int, num_tokens: int) -> npt.NDArray[np.int64]:
    """Slots of tokens first to first + num_tokens - 1: page × page_size + offset."""
    page, offset = divmod(first, page_size)
    if num_tokens == 1:
        return np.array([pages[page] * page_size + offset], dtype=np.int64)
    page_starts = np.array(pages[page:], dtype=np.int64) * page_size
    slots = page_starts[:, None] + np.arange(page_size)
    return slots.reshape(-1)[offset : offset + num_tokens]


def _join(rows: list[array[int]]) -> npt.NDArray[np.int32]:
    return np.frombuffer(bytearray().join(rows), dtype=np.int32)
