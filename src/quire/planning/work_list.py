"""What a plan hands to the kernels: plain arrays on the host.

The planner builds these and the backends read them, so that neither has to know the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from quire.errors import UnsupportedError

Ints = NDArray[np.int64]


class Item(NamedTuple):
    """A tile, or a part of one: the columns of ``WorkList.items``."""

    sequence: int
    kv_head: int
    q_begin: int  # packed query token
    q_len: int
    q_position: int  # where the first query stands in its sequence
    kv_begin: int  # logical tokens kv_begin … kv_end − 1
    kv_end: int
    partial: int  # −1 for a whole tile, else the place of its partial state in the workspace


class Merge(NamedTuple):
    """A tile that is split: the columns of ``WorkList.merges``."""

    kv_head: int
    q_begin: int
    q_len: int
    first_partial: int
    num_partials: int


ITEM_COLUMNS, MERGE_COLUMNS = Item._fields, Merge._fields
# The place of each column: ``items[:, ITEM.partial]``.
ITEM, MERGE = Item(*range(len(ITEM_COLUMNS))), Merge(*range(len(MERGE_COLUMNS)))

# Keys of a part where a step is to be batch-invariant: short enough to share one long sequence, long enough
# that folding its parts costs little.
INVARIANT_KV_SPLIT = 2048


class TileShape(NamedTuple):
    """What one kernel works on at a time: query tokens by KV tokens.

    Blocks of ``kv_tokens`` keys, counted from the sequence's first, are the grain at which a tile may be split.
    """

    q_tokens: int
    kv_tokens: int
    num_workers: int = 0  # 0: as many as the tiling says
    part_cost: int = 0  # what splitting a tile costs, in KV tokens; 0: so little that equal shares are best
    # What loading the queries and writing the result of an item costs, in KV tokens. It keeps a share of many short
    # sequences from being taken for a cheap one.
    item_cost: int = 16
    # Work that weighs less (see ``split``) is one worker's, because waking the others would take longer.
    least_shared: int = 0


class Tiling(NamedTuple):
    """How a backend wants the work cut: its workers and the tile of each of its two kernels.

    Sequences with at most ``decode_max_q_len`` query tokens are decode work; 0 sends all to prefill.
    """

    num_workers: int
    decode: TileShape
    prefill: TileShape
    decode_max_q_len: int = 1
    whole_tiles: bool = False  # a tile costs the same however few of its rows are filled
    rows_stand_alone: bool = False  # prefill keeps to the rules of ``batch_invariant``
    kv_split: int = 0  # cut all tiles at multiples of so many keys, and nowhere else; 0: where shares end
    # What a prefill tile costs beside its keys, in KV tokens, where that is much: whole tiles are then dealt out
    # if that is even; see ``deal``.
    prefill_tile_cost: int = 0

    def batch_invariant(self, backend: str) -> Tiling:
        """The same, cut by nothing that depends on the batch: one kernel for all rows, and fixed parts of keys.

        A row then has the same bits in every batch, on any number of workers and however its sequence was
        divided into steps, if the prefill kernel's rows stand alone: rows do not mix; blocks of keys lie on the
        grid of ``prefill.kv_tokens``, wherever ``kv_begin`` is; blocks and parts in which a row sees no key
        change none of its bits, so that one part folded with empty ones is that part.

        Raises:
            UnsupportedError: they do not.
        """
        if not self.rows_stand_alone:
            raise UnsupportedError(
                f'backend "{backend}" cannot be batch-invariant: a row\'s bits may depend on its tile. '
                'Fix: backend="auto", or batch_invariant=False'
            )
        grain = self.prefill.kv_tokens
        return self._replace(decode_max_q_len=0, kv_split=-(-INVARIANT_KV_SPLIT // grain) * grain)


class WorkBound(NamedTuple):
    """What a kernel's work lists of a step hold, or at most hold."""

    num_workers: int
    items: int
    partials: int


class WorkList(NamedTuple):
    """Work of one kernel, cut into one share per worker.

    ``items[worker_indptr[w]:worker_indptr[w + 1]]`` is the share of worker w.
    """

    lists: Ints  # worker_indptr, items and merges, one behind the other, perhaps among other numbers
    at: int  # where in ``lists`` they begin
    num_workers: int
    num_items: int
    num_merges: int = 0  # tiles that are split
    num_partials: int = 0
    weight: int = 0  # of all items together, as ``split`` weighs them

    @property
    def worker_indptr(self) -> Ints:
        """[num_workers + 1]."""
        return self.lists[self.at : self.at + self.num_workers + 1]

    @property
    def items(self) -> Ints:
        """[num_items, 8], see Item."""
        first, width = self.at + self.num_workers + 1, len(ITEM_COLUMNS)
        return self.lists[first : first + self.num_items * width].reshape(-1, width)

    @property
    def merges(self) -> Ints:
        """[num_merges, 5], see Merge."""
        first, width = self.at + self.num_workers + 1 + self.num_items * len(ITEM_COLUMNS), len(MERGE_COLUMNS)
        return self.lists[first : first + self.num_merges * width].reshape(-1, width)

    @property
    def bound(self) -> WorkBound:
        """Room for this work and no more."""
        return WorkBound(self.num_workers, self.num_items, self.num_partials)

    def column(self, name: str) -> Ints:
        """One named column of ``items``."""
        column: Ints = self.items[:, ITEM_COLUMNS.index(name)]
        return column

    def kv_tokens_per_worker(self) -> Ints:
        """KV tokens each worker reads: what the balance is judged by."""
        lengths = self.column("kv_end") - self.column("kv_begin")
        read = np.concatenate([[0], np.cumsum(lengths)])
        tokens: Ints = np.diff(read[self.worker_indptr])
        return tokens


class Capacity(NamedTuple):
    """What memory for a step's plan has room for, and the rules that its kernels are compiled for.

    That of one step (``StepPlan.capacity``), or of every step that a ``Planner`` takes.
    """

    batch: int
    max_pages: int  # columns of the page table
    max_q_len: int  # query tokens of a sequence
    decode: WorkBound
    prefill: WorkBound
    causal: bool
    window_left: int
    kv_split: int


@dataclass(eq=False)  # not frozen: that would cost a microsecond of every plan
class StepPlan:
    """One step's lengths, page table and work, shared by all layers of one attention shape. Not to be changed.

    ``decode`` holds the sequences with at most ``Tiling.decode_max_q_len`` query tokens, ``prefill`` the others: two
    groups with their own tile shapes, because one kernel that branches between them is good at neither.
    """

    numbers: Ints  # seq_lens, cu_seqlens_q, page ids and all work, in one array
    # A page table on the kernels' device: the caller's until the backend has copied it, then the copy. ``numbers``
    # holds no page ids then.
    device_table: torch.Tensor | None
    batch: int
    max_pages: int  # columns of the page table
    page_size: int
    causal: bool
    window_left: int  # keys further back than this are out of sight; −1 for no window
    decode: WorkList
    prefill: WorkList
    kv_split: int  # as in Tiling: above 0 the step is batch-invariant
    num_tokens: int  # query tokens of all sequences
    max_q_len: int  # query tokens of the sequence that has most
    max_seq_len: int  # KV tokens of the sequence that has most
    highest_page: int  # the highest page id in use, none of them negative; −1 for none, or for a device_table

    @property
    def seq_lens(self) -> Ints:
        """[batch] KV tokens including this step's."""
        return self.numbers[: self.batch]

    @property
    def cu_seqlens_q(self) -> Ints:
        """[batch + 1] where each sequence's queries start."""
        return self.numbers[self.batch : 2 * self.batch + 1]

    @property
    def page_table(self) -> NDArray[np.int32]:
        """[batch, max_pages], undefined beyond the pages in use; a device_table is copied to the host each time."""
        if self.device_table is not None:
            return self.device_table.cpu().numpy()
        first, size = 2 * self.batch + 1, self.batch * self.max_pages
        table: NDArray[np.int32] = self.numbers[first : first + -(-size // 2)].view(np.int32)
        return table[:size].reshape(self.batch, self.max_pages)

    @property
    def capacity(self) -> Capacity:
        """Room for this step and no more."""
        rules = self.causal, self.window_left, self.kv_split
        return Capacity(
            self.batch, self.max_pages, self.max_q_len, self.decode.bound, self.prefill.bound, *rules
        )

    @cached_property
    def pages_per_sequence(self) -> Ints:
        """[batch] pages in use."""
        count: Ints = -(-self.seq_lens // self.page_size)
        return count

    @cached_property
    def page_indptr(self) -> NDArray[np.int32]:
        """[batch + 1] where each sequence's pages start in ``page_indices``."""
        return np.concatenate([[0], np.cumsum(self.pages_per_sequence)]).astype(np.int32)

    @cached_property
    def page_indices(self) -> NDArray[np.int32]:
        """[pages] physical pages of all sequences end to end."""
        table = self.page_table
        indices: NDArray[np.int32] = table[np.arange(table.shape[1]) < self.pages_per_sequence[:, None]]
        return indices

    @cached_property
    def page_offsets(self) -> NDArray[np.int32]:
        """[pages] logical token at which each page starts in its sequence."""
        ordinal = np.arange(self.page_indptr[-1])
        first = np.repeat(self.page_indptr[:-1], self.pages_per_sequence)
        return ((ordinal - first) * self.page_size).astype(np.int32)

    @cached_property
    def page_valid_lengths(self) -> NDArray[np.int32]:
        """[pages] tokens of each page that hold keys; only a sequence's last page may be partly filled."""
        seq_len = np.repeat(self.seq_lens, self.pages_per_sequence)
        valid: NDArray[np.int32] = np.minimum(self.page_size, seq_len - self.page_offsets).astype(np.int32)
        return valid
