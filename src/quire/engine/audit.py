"""Whether the pages of a step are the ones that its sequences computed."""

from __future__ import annotations

from collections import abc
from typing import TYPE_CHECKING

from quire.engine.sequence import Sequence
from quire.errors import PageStateError
from quire.pages import PageTable, PrefixCache

if TYPE_CHECKING:
    from quire.engine.scheduler import Chunk

_STRIDE = 7919  # a prime: successive samples come from all over a sequence


def audit_all(chunks: abc.Sequence[Chunk], table: PageTable, cache: PrefixCache | None) -> None:
    """Check every page of every chunk's sequence, and that no page has fewer owners than sequences.

    Raises:
        PageStateError: a page that is not what its sequence takes it for; the sentence names page and owners.
    Cost: O(pages of the pool); with QUIRE_DEBUG=1.
    """
    for page, owners in enumerate(table.page_owners()):
        if len(owners) > table.allocator.refcount(page):
            raise _error(page, f"an owner for each of {len(owners)} sequences", table)
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
        raise _error(page, f"an owner, as page {index} of sequence {sequence.seq_id}", table)
    if cache is None or sequence.prefix is None:
        return
    name = cache.name_of(page)
    if name is None:
        if index < sequence.prefix.num_pages and not cache.was_cleared(sequence.prefix):
            raise _error(
                page, f"its content, which sequence {sequence.seq_id} owns and which was dropped", table
            )
        return
    size = table.page_size
    tokens = sequence.tokens[index * size : (index + 1) * size]
    if name.num_pages != index + 1 or name.page_of(group) != page or name.tokens != tokens.tobytes():
        raise _error(
            page, f"tokens {index * size} to {(index + 1) * size - 1} of sequence {sequence.seq_id}", table
        )


def _error(page: int, expected: str, table: PageTable) -> PageStateError:
    allocator = table.allocator
    return PageStateError(
        f"page {page} must have {expected}; got {allocator.refcount(page)} owners, generation "
        f"{allocator.generation(page)}, held by sequences {table.page_owners()[page]}. "
        "Fix: call free once per allocate or share and give names to no page of others, or report a bug of Quire"
    )
