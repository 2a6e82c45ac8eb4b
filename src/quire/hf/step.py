"""One packed forward, as plain tensors: what an engine hands to a model on pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from quire.errors import ArgumentError, DtypeError, ShapeError

_LAYOUT = {
    "input_ids": (torch.int64, "[tokens]"),
    "position_ids": (torch.int64, "[tokens]"),
    "page_table": (torch.int32, "[batch, max_pages]"),
    "seq_lens": (torch.int32, "[batch]"),
    "cu_seqlens_q": (torch.int32, "[batch + 1]"),
    "slot_mapping": (torch.int64, "[tokens]"),
    "logits_indices": (torch.int64, "[rows]"),
}
_OF_GROUPS = {
    "page_table": (torch.int32, "[groups, batch, max_pages]"),
    "slot_mapping": (torch.int64, "[groups, tokens]"),
}


@dataclass(frozen=True)
class Step:
    """The new tokens of several sequences end to end, and where each sequence's pages are.

    All tensors live on the CPU: the host plans with them and moves to the model's device what it needs.

    Args:
        input_ids: int64 [tokens], the new tokens of all sequences, packed.
        position_ids: int64 [tokens], each token's position in its own sequence.
        page_table: int32 [batch, max_pages], the pages of each sequence in logical order. For a model whose layers
            have several page tables (`PagedModel.groups`): int32 [groups, batch, max_pages].
        seq_lens: int32 [batch], tokens of each sequence including those of this step.
        cu_seqlens_q: int32 [batch + 1], where each sequence's new tokens start in the packed row.
        slot_mapping: int64 [tokens], page × page_size + offset of each new token; or int64 [groups, tokens].
        logits_indices: int64 [rows], the packed tokens whose logits are wanted, usually each sequence's last.
    Raises:
        DtypeError, ShapeError, ArgumentError: tensors that do not fit together.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    slot_mapping: torch.Tensor
    logits_indices: torch.Tensor

    def __post_init__(self) -> None:
        layouts = _LAYOUT
        if isinstance(self.page_table, torch.Tensor) and self.page_table.dim() == 3:
            layouts = _LAYOUT | _OF_GROUPS
        for name, (dtype, layout) in layouts.items():
            _check_host_tensor(name, getattr(self, name), dtype, layout)
        tokens, batch = self.num_tokens, len(self.seq_lens)
        if tokens == 0:
            raise ShapeError(
                "input_ids must hold at least one token; got [0]. Fix: skip a step without tokens"
            )
        sizes = {
            "position_ids": (tokens, len(self.position_ids)),
            "slot_mapping": (tokens, self.slot_mapping.shape[-1]),
            "page_table": (batch, self.page_table.shape[-2]),
            "cu_seqlens_q": (batch + 1, len(self.cu_seqlens_q)),
        }
        for name, (length, got) in sizes.items():
            if got != length:
                raise ShapeError(
                    f"{name} must be {layouts[name][1]} with tokens={tokens}, batch={batch}; got length "
                    f"{got}. Fix: build the step's tensors from the same sequences"
                )
        if layouts is not _LAYOUT and len(self.slot_mapping) != self.num_groups:
            raise ShapeError(
                f"slot_mapping must be [groups, tokens] with groups={self.num_groups} as in page_table; got "
                f"{list(self.slot_mapping.shape)}. Fix: build the step's tensors from the same page table"
            )
        if int(self.cu_seqlens_q[-1]) != tokens:
            raise ArgumentError(
                f"cu_seqlens_q must end with the number of tokens, {tokens}; got "
                f"{int(self.cu_seqlens_q[-1])}. Fix: the cumulative sum of new tokens, with a leading 0"
            )
        _check_range("logits_indices", self.logits_indices, tokens, "give rows of the packed tokens")

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences together."""
        return len(self.input_ids)

    @property
    def num_groups(self) -> int:
        """Page tables that the layers of a model have."""
        return 1 if self.page_table.dim() == 2 else len(self.page_table)

    def table_of(self, group: int) -> torch.Tensor:
        """The page table of one group of layers, [batch, max_pages]."""
        return self.page_table if self.page_table.dim() == 2 else self.page_table[group]

    def check_fits(self, vocab_size: int, max_seq_len: int | None, num_slots: int) -> None:
        """Refuse tokens and positions the model has no row for, and slots that the pool does not have.

        Raises:
            ArgumentError: an id outside the vocabulary, a position at or past max_seq_len, or a slot at or past
                num_slots.
        """
        _check_range("input_ids", self.input_ids, vocab_size, "use the tokenizer that belongs to this model")
        if max_seq_len is not None:
            _check_range(
                "position_ids", self.position_ids, max_seq_len, "end the sequence at max_seq_len tokens"
            )
        _check_range(
            "slot_mapping",
            self.slot_mapping.reshape(-1),
            num_slots,
            "use the slots of this pool's table",
            least=-1,
        )


def pad_decode(step: Step | None, size: int, num_groups: int = 1) -> Step:
    """A step of one token per sequence, padded to `size` sequences; None: padding alone.

    Padding is a sequence of length 0: its token is 0, its keys go to slot -1, which is nowhere, and its row attends
    to nothing.
    """
    empty = torch.empty(0, dtype=torch.int64)
    missing = size if step is None else size - step.num_tokens
    ids, positions, table, lens, slots = (
        (
            empty,
            empty,
            torch.empty(num_groups, 0, 1, dtype=torch.int32),
            empty.int(),
            empty.expand(num_groups, 0),
        )
        if step is None
        else (step.input_ids, step.position_ids, step.page_table, step.seq_lens, step.slot_mapping)
    )
    if table.dim() == 3 and num_groups == 1:
        table, slots = table[0], slots.reshape(-1)
    return Step(
        input_ids=pad(ids, (0, missing)),
        position_ids=pad(positions, (0, missing)),
        page_table=pad(table, (0, 0, 0, missing)),
        seq_lens=pad(lens, (0, missing)),
        cu_seqlens_q=torch.arange(size + 1, dtype=torch.int32),
        slot_mapping=pad(slots, (0, missing), value=-1),
        logits_indices=torch.arange(size),
    )


def _check_host_tensor(name: str, value: object, dtype: torch.dtype, layout: str) -> None:
    wanted = f"{name} must be {str(dtype).removeprefix('torch.')} {layout} on the CPU"
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(f"{wanted}; got {type(value).__name__}. Fix: torch.tensor({name}, dtype={dtype})")
    if value.dtype != dtype or value.device.type != "cpu":
        raise DtypeError(f"{wanted}; got {value.dtype} on {value.device}. Fix: {name}.to('cpu', {dtype})")
    if value.dim() != layout.count(",") + 1:
        raise ShapeError(f"{wanted}; got shape {list(value.shape)}. Fix: {name}.reshape to {layout}")


def _check_range(name: str, values: torch.Tensor, end: int, fix: str, least: int = 0) -> None:
    if len(values) == 0:
        return
    low, high = int(values.min()), int(values.max())
    if low < least or high >= end:
        wrong = low if low < least else high
        raise ArgumentError(f"{name} must be from {least} to {end - 1}; got {wrong}. Fix: {fix}")
