"""Errors of a step's lengths, tables and rules, the same for every backend: name, expected, got, fix.

They are read on the host, before anything is launched.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from quire.checks import check_host, check_tensor, describe
from quire.errors import ArgumentError, DtypeError, ShapeError
from quire.spec import check_size
from quire.work import Ints, StepPlan

_INTS = (torch.int32, torch.int64)
# page_table int32 [batch, max_pages], seq_lens int64 [batch], cu_seqlens_q int64 [batch + 1]
HostStep = tuple[NDArray[np.int32], Ints, Ints]


def check_step(page_table: object, seq_lens: object, cu_seqlens_q: object | None, page_size: int) -> HostStep:
    """A step's page table and lengths as host arrays."""
    table = check_tensor("page_table", page_table, 2, "int32 [batch, max_pages]")
    if table.dtype != torch.int32:
        raise DtypeError(
            f"page_table must be int32 [batch, max_pages]; got {describe(table)}. Fix: page_table.to(torch.int32)"
        )
    if not table.is_cpu:
        check_host(page_table=table)
    lens_given, starts_given = _on_host("seq_lens", seq_lens, "[batch]"), None
    batch, max_pages = table.shape
    if lens_given.numel() != batch:
        raise ShapeError(
            f"seq_lens must be [batch] with batch={batch}, the rows of page_table; got [{len(lens_given)}]. "
            "Fix: one length per row"
        )
    if cu_seqlens_q is not None:
        starts_given = _on_host("cu_seqlens_q", cu_seqlens_q, "[batch + 1]")
        if starts_given.numel() != batch + 1:
            raise ShapeError(
                f"cu_seqlens_q must be [batch + 1] = [{batch + 1}]; got [{len(starts_given)}]. "
                "Fix: start with 0 and end with the number of query tokens"
            )
    lens, starts = np.empty(batch, np.int64), np.empty(batch + 1, np.int64)
    places = *_place("seq_lens", lens_given), *_place("cu_seqlens_q", starts_given)
    if not _arithmetic().copy_step(*places, lens, starts, max_pages * page_size):
        _refuse_step(table, lens, starts, page_size)
    if not table.is_contiguous() and table.stride(1) != 1:
        table = table.contiguous()
    return (table if table.is_cpu else table.cpu()).numpy(), lens, starts


@functools.cache
def _arithmetic() -> ModuleType:
    # Imported late: `import quire` must stay light, and Numba is not.
    from quire import cut

    return cut


def _refuse_step(table: torch.Tensor, lens: Ints, starts: Ints, page_size: int) -> NoReturn:
    """Say which number of a step is wrong."""
    if len(lens) and lens.min() < 0:
        raise ArgumentError(
            f"seq_lens must not be negative; got {lens.min()}. Fix: use 0 for an empty sequence"
        )
    capacity = table.shape[1] * page_size
    if len(lens) and lens.max() > capacity:
        row = int(lens.argmax())
        raise ShapeError(
            f"page_table must have {-(-int(lens[row]) // page_size)} columns for seq_lens[{row}]={lens[row]} at "
            f"page_size {page_size}; got {table.shape[1]}. Fix: append the tokens to the page table first"
        )
    raise ArgumentError(
        f"cu_seqlens_q must start with 0 and never decrease; got {starts[:8].tolist()}. "
        "Fix: the cumulative sum of query lengths, with a leading 0"
    )


def _on_host(name: str, value: object, layout: str) -> torch.Tensor:
    """Lengths as a contiguous tensor on the host."""
    tensor = check_tensor(name, value, 1, f"int32 {layout}")
    if tensor.dtype not in _INTS:
        raise DtypeError(
            f"{name} must be int32 {layout}; got {describe(tensor)}. Fix: {name}.to(torch.int32)"
        )
    if not tensor.is_cpu:
        check_host(**{name: tensor})
        tensor = tensor.cpu()
    return tensor.contiguous()


def _place(name: str, tensor: torch.Tensor | None) -> tuple[int, int]:
    """Where lengths lie and what each takes, for ``cut.copy_step``."""
    if tensor is None:
        return 0, 0
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise ArgumentError(
            f"{name} must hold data; got a {type(tensor).__name__} without memory. Fix: plan with a real tensor"
        )
    return address, tensor.element_size()


class Limits(NamedTuple):
    """The largest step of a ``Planner``."""

    max_batch: int
    max_seq_len: int
    max_q_len: int
    max_tokens: int

    @classmethod
    def checked(cls, max_batch: object, max_seq_len: object, max_q_len: object, max_tokens: object) -> Limits:
        """Limits as a user gives them: ints of at least 1, max_tokens or None."""
        given = {"max_batch": max_batch, "max_seq_len": max_seq_len, "max_q_len": max_q_len}
        if max_tokens is not None:
            given["max_tokens"] = max_tokens
        sizes = {name: check_size(name, value) for name, value in given.items()}
        return cls(**{"max_tokens": sizes["max_batch"] * sizes["max_q_len"]} | sizes)

    def check(self, step: StepPlan) -> None:
        """Refuse a step that is larger."""
        sizes = (
            ("sequences", "max_batch", len(step.seq_lens), self.max_batch),
            ("KV tokens in a sequence", "max_seq_len", int(step.seq_lens.max(initial=0)), self.max_seq_len),
            ("query tokens in a sequence", "max_q_len", step.max_q_len, self.max_q_len),
            ("query tokens", "max_tokens", int(step.cu_seqlens_q[-1]), self.max_tokens),
        )
        for what, name, size, limit in sizes:
            if size > limit:
                raise ArgumentError(
                    f"a step must have at most {name}={limit} {what}; got {size}. Fix: a Planner with {name}={size}, "
                    "or quire.plan for this step"
                )


def check_rules(causal: object, window_left: object, batch_invariant: object, backend: object) -> None:
    """causal and batch_invariant are bools, window_left an int of at least −1, backend a name."""
    if not isinstance(causal, bool):
        raise ArgumentError(f"causal must be True or False; got {causal!r}. Fix: causal=True")
    if not isinstance(batch_invariant, bool):
        raise ArgumentError(
            f"batch_invariant must be True or False; got {batch_invariant!r}. Fix: batch_invariant=False"
        )
    if not isinstance(window_left, int) or isinstance(window_left, bool) or window_left < -1:
        raise ArgumentError(
            f"window_left must be −1 (off) or at least 0; got {window_left!r}. Fix: window_left=-1"
        )
    if not isinstance(backend, str):
        raise ArgumentError(f'backend must be a name; got {backend!r}. Fix: backend="auto"')


def check_page_ids(page_table: NDArray[np.int32], seq_lens: Ints, page_size: int, num_pages: int) -> None:
    """Debug mode: every page a sequence uses exists in the pool."""
    used = np.arange(page_table.shape[1]) < -(-seq_lens // page_size)[:, None]
    bad = used & ((page_table < 0) | (page_table >= num_pages))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ArgumentError(
            f"page_table must hold page ids from 0 to {num_pages - 1}; got {page_table[row, column]} at "
            f"[{row}, {column}]. Fix: use the ids that PageTable handed out for this pool"
        )
