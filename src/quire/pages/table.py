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
from quire.spec import check_size

_PAD = array("i", [-1])
_FEW = 8  # pages that Python counts faster than NumPy


class AppendResult(NamedTuple):
    """Where appended tokens go, and what must be copied before they are written.

    slot_mapping: int64 [num_tokens]; slot = page × page_size + offset of each new token, in order.
    copies: (source page, destination page) pairs, for `KVPool.copy_pages` before the tokens are
        written; empty unless a shared page had to become private (copy-on-write).
    """

    slot_mapping: npt.NDArray[np.int64]
    copies: list[tuple[int, int]]


class _Pages:
    """One sequence. Always exactly as many pages as its length needs, all but the last one full."""

    __slots__ = ("length", "pages")

    def __init__(self, pages: array[int], length: int) -> None:
        self.pages = pages
        self.length = length


class PageTable:
    """The pages of every live sequence, in logical order.

    Token t of a sequence lives in its page number t // page_size, at offset t % page_size. Several
    sequences may share a page; one is written only while it has a single owner and its content is not
    kept (see `PageAllocator.keep`).

    Each sequence keeps its page ids in a growing `array` of int32: appending one costs what a list
    append costs, and `dense` and `csr` only join buffers.

    Args:
        allocator: hands out the pages; may serve other owners beside this table.
        page_size: tokens per page.
    Raises:
        ArgumentError: page_size below one.
    Source: block tables, sharing and copy-on-write of PagedAttention, arXiv:2309.06180 §4.2-4.4.
    """

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        check_size("page_size", page_size)
        self.allocator = allocator
        self.page_size = page_size
        self._sequences: dict[Hashable, _Pages] = {}
        # By page, how many sequences of this table hold it; NumPy sees the same memory, for many pages at once.
        self._holders = array("i", [0]) * allocator.num_pages
        self._holders_of_many = np.frombuffer(self._holders, dtype=np.int32)
        self._num_held = 0

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

    def pages(self, seq_id: Hashable, first: int = 0) -> list[int]:
        """Page ids of a sequence in logical order, from its first-th on. Raises ArgumentError when it is unknown."""
        return self._sequence(seq_id).pages[first:].tolist()

    def add(self, seq_id: Hashable, pages: Sequence[int] = ()) -> None:
        """Start a sequence: empty, or with the tokens of full pages that are owned or cached, which it shares.

        Args:
            pages: what it begins with, in logical order, as `Prefix.pages` returns them.
        Raises:
            ArgumentError: the id is in use, or a page is free or does not exist; nothing was changed.
        Cost: O(pages).
        """
        self._check_unused(seq_id)
        sequence = _Pages(array("i", pages), len(pages) * self.page_size)
        self.allocator.share(sequence.pages)
        self._hold(sequence.pages)
        self._sequences[seq_id] = sequence

    def page_at(self, seq_id: Hashable, index: int) -> int:
        """The index-th page of a sequence. Raises ArgumentError when the sequence is unknown or has no such page."""
        return self._sequence(seq_id).pages[self._check_index(seq_id, index)]

    def replace(self, seq_id: Hashable, index: int, page: int) -> None:
        """Let a sequence share another page instead of its index-th, one that holds the same keys and values.

        Raises:
            ArgumentError: unknown sequence, no such page in it, or `page` is free; nothing was changed.
        """
        pages = self._sequence(seq_id).pages
        before = pages[self._check_index(seq_id, index)]
        self.allocator.share([page])
        self._hold([page])
        pages[index] = page
        self._let_go([before])
        self.allocator.free([before])

    def pages_needed(self, seq_id: Hashable, num_tokens: int) -> int:
        """Pages that `append` would allocate now, the copy-on-write page included.

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
        pages = self.allocator.num_available - self._last_page_must_be_copied(sequence)
        left_in_last_page = -sequence.length % self.page_size
        return pages * self.page_size + left_in_last_page if pages >= 0 else 0

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
        pages, first = sequence.pages, sequence.length
        copies: list[tuple[int, int]] = []
        needed = self._pages_needed(sequence, num_tokens)
        if needed:
            fresh = self.allocator.allocate(needed)
            self._hold(fresh)
            if self._last_page_must_be_copied(sequence):
                shared = pages.pop()
                self._let_go([shared])
                self.allocator.free([shared])
                copies.append((shared, fresh[0]))
            pages.extend(fresh)
        sequence.length = first + num_tokens
        return AppendResult(_slots(pages, self.page_size, first, num_tokens), copies)

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
        self.allocator.share(source.pages)
        self._hold(source.pages)
        self._sequences[child] = _Pages(source.pages[:], source.length)

    def trim(self, seq_id: Hashable, length: int) -> list[int]:
        """Drop tokens from the end until `length` are left, as speculative decoding does.

        Pages left without a token of this sequence are given up. The new last page may be shared or
        kept: the next append then copies it.

        Returns:
            Pages that are free now: those that no one else owns and that are not kept.
        Raises:
            ArgumentError: unknown sequence, or length is not from 0 to its present length.
        Cost: O(pages dropped).
        """
        sequence = self._sequence(seq_id)
        if not 0 <= length <= sequence.length:
            raise ArgumentError(
                f"length must be from 0 to {sequence.length}, the tokens of sequence {seq_id!r}; "
                f"got {length}. Fix: use append to lengthen a sequence"
            )
        kept = -(-length // self.page_size)
        self._let_go(sequence.pages[kept:])
        released = self.allocator.free(sequence.pages[kept:])
        del sequence.pages[kept:]
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
        pages = self._sequence(seq_id).pages
        del self._sequences[seq_id]  # first: it ends also where someone freed its pages before
        self._let_go(pages)
        return self.allocator.free(pages)

    def dense(self, seq_ids: Sequence[Hashable]) -> torch.Tensor:
        """Page table of a batch, the `page_table` of `paged_attention`.

        Returns:
            int32 [batch, max_pages] on the CPU, a fresh tensor padded with -1; max_pages is the most
            pages a sequence of the batch has.
        Raises:
            ArgumentError: unknown sequence.
        Cost: one copy of the batch's page ids, row by row.
        """
        rows = [self._sequence(seq_id).pages for seq_id in seq_ids]
        width = max(map(len, rows), default=0)
        table = _join([row if len(row) == width else row + _PAD * (width - len(row)) for row in rows])
        return torch.from_numpy(table.reshape(len(rows), width))

    def seq_lens(self, seq_ids: Sequence[Hashable]) -> torch.Tensor:
        """Tokens of each sequence of a batch, int32 [batch] on the CPU.

        Raises:
            ArgumentError: unknown sequence.
        """
        lengths = [self._sequence(seq_id).length for seq_id in seq_ids]
        return torch.tensor(lengths, dtype=torch.int32, device="cpu")

    def csr(self, seq_ids: Sequence[Hashable]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages of a batch end to end, without padding.

        Returns:
            page_indptr int32 [batch + 1] and page_indices int32 [pages of the batch] on the CPU: the
            pages of sequence i are page_indices[page_indptr[i] : page_indptr[i + 1]].
        Raises:
            ArgumentError: unknown sequence.
        Cost: one copy of the batch's page ids, row by row.
        """
        rows = [self._sequence(seq_id).pages for seq_id in seq_ids]
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
            if tokens:
                last = sequence.pages[-1]
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
            for page in sequence.pages:
                owners[page].append(seq_id)
        return owners

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
        if len(pages) < _FEW:
            for page in pages:
                self._holders[page] -= 1
                self._num_held -= not self._holders[page]
        else:
            index = np.asarray(pages)
            self._holders_of_many[index] -= 1
            self._num_held -= len(pages) - int(np.count_nonzero(self._holders_of_many[index]))

    def _check_index(self, seq_id: Hashable, index: int) -> int:
        num_pages = len(self._sequence(seq_id).pages)
        if not 0 <= index < num_pages:
            raise ArgumentError(
                f"index must be from 0 to {num_pages - 1}, the pages of sequence {seq_id!r}; got {index}. "
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
        pages_after = -(-(sequence.length + num_tokens) // self.page_size)
        return pages_after - len(sequence.pages) + self._last_page_must_be_copied(sequence)

    def _last_page_must_be_copied(self, sequence: _Pages) -> bool:
        return sequence.length % self.page_size != 0 and not self.allocator.is_private(sequence.pages[-1])

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
