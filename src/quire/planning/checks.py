"""Errors of a step's lengths, tables and rules, the same for every backend: name, expected, got, fix.

They are read on the host, before anything is launched. ``plan_step`` checks the numbers in lengths and tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from quire.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from quire.planning.work_list import Ints
from quire.spec import check_size

_INTS = (torch.int32, torch.int64)
# page_table, seq_lens and cu_seqlens_q; the last is None where every sequence has one query.
CheckedStep = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def describe(value: object) -> str:
    """How an argument looks in an error: `int64 [4, 7]` for a tensor, the type's name otherwise."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def check_tensor(name: str, value: object, ndim: int, layout: str) -> torch.Tensor:
    """A tensor with ``ndim`` dimensions; ``layout`` is how the error draws the shape."""
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(
            f"{name} must be a tensor {layout}; got {describe(value)}. Fix: torch.as_tensor({name})"
        )
    if value.dim() != ndim:
        raise ShapeError(
            f"{name} must be {layout}; got {describe(value)}. Fix: reshape it to {ndim} dimension{'s' * (ndim > 1)}"
        )
    return value


def check_host(**tensors: torch.Tensor | None) -> None:
    """The step's tables and lengths are read on the host: they may lie on any device that holds data."""
    for name, tensor in given(tensors):
        if tensor.is_meta:
            raise DeviceError(f'{name} must hold data; got a tensor on meta. Fix: make it with device="cpu"')


def given(tensors: dict[str, torch.Tensor | None]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        if tensor is not None:
            if not isinstance(tensor, torch.Tensor):
                raise ArgumentError(
                    f"{name} must be a tensor; got {describe(tensor)}. Fix: torch.as_tensor({name})"
                )
            yield name, tensor


def check_step(page_table: object, seq_lens: object, cu_seqlens_q: object | None) -> CheckedStep:
    """A step's page table where it is, and its lengths on the host; ``plan_step`` checks the numbers in them."""
    table = check_tensor("page_table", page_table, 2, "int32 [batch, max_pages]")
    if table.dtype != torch.int32:
        raise DtypeError(
            f"page_table must be int32 [batch, max_pages]; got {describe(table)}. Fix: page_table.to(torch.int32)"
        )
    lens, starts, batch = _on_host("seq_lens", seq_lens, "int32 [batch]"), None, table.shape[0]
    if lens.numel() != batch:
        raise ShapeError(
            f"seq_lens must be [batch] with batch={batch}, the rows of page_table; got [{len(lens)}]. "
            "Fix: one length per row"
        )
    if cu_seqlens_q is not None:
        starts = _on_host("cu_seqlens_q", cu_seqlens_q, "int32 [batch + 1]")
        if starts.numel() != batch + 1:
            raise ShapeError(
                f"cu_seqlens_q must be [batch + 1] = [{batch + 1}]; got [{len(starts)}]. "
                "Fix: start with 0 and end with the number of query tokens"
            )
    return table, lens, starts


def _on_host(name: str, value: object, layout: str) -> torch.Tensor:
    """Lengths as a tensor on the host."""
    tensor = check_tensor(name, value, 1, layout)
    if tensor.dtype not in _INTS:
        raise DtypeError(f"{name} must be {layout}; got {describe(tensor)}. Fix: {name}.to(torch.int32)")
    if not tensor.is_cpu:
        check_host(**{name: tensor})
        tensor = tensor.cpu()
    return tensor


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

    def check_lengths(self, lens: Ints, starts: Ints) -> None:
        """Refuse a step of these lengths and starts if it is larger."""
        self.check(len(lens), lens.max(initial=0), (starts[1:] - starts[:-1]).max(initial=0), starts[-1])

    def check(self, batch: int, max_seq_len: int, max_q_len: int, num_tokens: int) -> None:
        """Refuse a step that is larger."""
        sizes = (
            ("sequences", "max_batch", batch, self.max_batch),
            ("KV tokens in a sequence", "max_seq_len", max_seq_len, self.max_seq_len),
            ("query tokens in a sequence", "max_q_len", max_q_len, self.max_q_len),
            ("query tokens", "max_tokens", num_tokens, self.max_tokens),
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
    check_backend(backend)


def check_backend(backend: object) -> None:
    """A name; whether there is a backend of that name is looked up later."""
    if not isinstance(backend, str):
        raise ArgumentError(f'backend must be a name; got {backend!r}. Fix: backend="auto"')


def check_page_ids(
    page_table: NDArray[np.int32],
    seq_lens: Ints,
    page_size: int,
    num_pages: int | None = None,
    name: str = "page_table",
) -> None:
    """Every page that a sequence uses exists in the pool, or in some pool where num_pages is None."""
    used = np.arange(page_table.shape[1]) < -(-seq_lens // page_size)[:, None]
    bad = used & ((page_table < 0) | (page_table >= (1 << 31 if num_pages is None else num_pages)))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        allowed = "that are not negative" if num_pages is None else f"from 0 to {num_pages - 1}"
        raise ArgumentError(
            f"{name} must hold page ids {allowed}; got {page_table[row, column]} at [{row}, {column}]. "
            "Fix: use the ids that PageTable handed out for this pool"
        )
