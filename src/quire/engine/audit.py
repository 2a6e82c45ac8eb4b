"""Whether the pages of a step are the ones that its sequences computed."""

from __future__ import annotations

from collections import abc
from typing import TYPE_CHECKING

from quire.engine.sequence import Sequence
from quire.errors import PageStateError
from quire.pages import PageAllocator, PageTable, PrefixCache
from quire.pages.balance import find_fault, is_balanced, page_owners

if TYPE_CHECKING:
    from quire.engine.scheduler import Chunk

_STRIDE = 7919  # a prime: successive samples come from all over a sequence
STEPS_PER_COUNT = 64  # of steps, in one the sequences' pages are counted


def audit_counts(allocator: PageAllocator, step: int, *, whole: bool) -> None:
    """Check that every page of the pool is accounted for.

    Args:
        step: counts up; in one of several the sequences' pages are counted too.
        whole: look at each page; else at the numbers of them, and at each page only where these are wrong.
    Raises:
        PageStateError: a page that nobody holds and that is not free, or that more hold than it has owners; the
            sentence names page and owners.
    Cost: 2 µs; whole: O(pages of the pool and of the tables).
    """
    if whole or not is_balanced(allocator, recounts=step % STEPS_PER_COUNT == 0):
        fault = find_fault(allocator)
        if fault is not None:
            raise _error(fault.page, fault.expected, allocator)


def audit_all(chunks: abc.Sequence[Chunk], table: PageTable, cache: PrefixCache | None) -> None:
    """Check every page of every chunk's sequence.

    Raises:
        PageStateError: a page that is not what its sequence takes it for; the sentence names page and owners.
    Cost: O(pages of the sequences); with QUIRE_DEBUG=1.
    """
    for chunk in chunks:
        sequence = chunk.sequence
        for group in range(len(table.groups)):
            first = table.num_released(sequence.seq_id, group)
            for index in range(first, sequence.num_computed // table.page_size):
                _check(sequence, index, group, table, cache)


def audit_sample(chunks: abc.Sequence[Chunk], table: PageTable, cache: PrefixCache | None, step: int) -> None:
    """Check one page of one chunk's sequence, another one in each step.

    Raises:
        PageStateError: as `audit_all`.
    Cost: 2 µs.
    """
    sequence = chunks[step % len(chunks)].sequence
    group = step // len(chunks) % len(table.groups)
    first = table.num_released(sequence.seq_id, group)
    num_full = sequence.num_computed // table.page_size - first
    if num_full > 0:
        _check(sequence, first + step * _STRIDE % num_full, group, table, cache)


def _check(sequence: Sequence, index: int, group: int, table: PageTable, cache: PrefixCache | None) -> None:
    page = table.page_at(sequence.seq_id, index, group)
    if not table.allocator.refcount(page):
        raise _error(page, f"an owner, as page {index} of sequence {sequence.seq_id}", table.allocator)
    if cache is None or sequence.prefix is None:
        return
    name = cache.name_of(page)
    if name is None:
        if index < sequence.prefix.num_pages and not cache.was_cleared(sequence.prefix):
            raise _error(
                page,
                f"its content, which sequence {sequence.seq_id} owns and which was dropped",
                table.allocator,
            )
        return
    size = table.page_size
    tokens = sequence.tokens[index * size : (index + 1) * size]
    if name.num_pages != index + 1 or name.page_of(group) != page or name.tokens != tokens.tobytes():
        raise _error(
            page,
            f"tokens {index * size} to {(index + 1) * size - 1} of sequence {sequence.seq_id}",
            table.allocator,
        )


def _error(page: int, expected: str, allocator: PageAllocator) -> PageStateError:
    return PageStateError(
        f"page {page} must have {expected}; got {allocator.refcount(page)} owners, generation "
        f"{allocator.generation(page)}, held by sequences {page_owners(allocator, page)}. "
        "Fix: call free once per allocate or share, free sequences before their table is dropped and give names to no "
        "page of others, or report a bug of Quire"
    )
