"""The memory that a kernel sees in the interpreter: one address space per tensor argument, every access checked.

An argument's address is a made-up one, far from every other argument's, with the true one's alignment. So an access
names the argument it was computed from, however wrong it is, and reaches memory only if it falls on elements of
that argument. Beside each storage lie records of who read and who wrote which byte.

Programs run one after another here, yet an access is a race unless a GPU would have to keep the order: what a
program writes is seen by all its own threads after its next barrier, and by another program once that has acquired,
through an atomic, what this one released after that barrier.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from arithmetic import KernelFault

_SPACE_BITS = 44  # an address is (number of its argument << 44) + offset
_MIDDLE = 1 << (_SPACE_BITS - 1)  # where a tensor starts in its space: room for errors both ways
_ALIGNMENT = 4096
_NOBODY, _SEVERAL = 0, -1


class _Records:
    """Who did what last to each byte of one torch storage, which several arguments may share.

    Programs are counted from 1, times in barriers that the program had passed, from 1.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.address = storage.data_ptr()
        # np.zeros asks for no memory before it is touched, so a huge pool costs nothing.
        self.writer, self.written_at, self.reader, self.read_at = (
            np.zeros(storage.nbytes(), np.int32) for _ in range(4)
        )
        self.released: dict[
            int, np.ndarray
        ] = {}  # address of an atomic: what whoever acquires there will see
        self.updated: dict[int, dict[int, int]] = {}  # ... and who updated it when


@dataclass
class _Argument:
    name: str
    tensor: torch.Tensor
    base: int  # the made-up address of its first element
    records: _Records
    span: int  # elements from its first to its last
    owned: np.ndarray | None  # which of those are its own; None: all


@dataclass
class Memory:
    """One launch's arguments and the accesses to them."""

    arguments: list[_Argument] = field(default_factory=list)
    where: tuple[int, ...] = ()
    _program: int = 0
    # By program: this one sees what that one wrote before so many barriers of its own.
    _seen: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int32))
    _records: dict[int, _Records] = field(default_factory=dict)

    def enter(self, name: str, tensor: torch.Tensor) -> int:
        """The address under which the kernel is to know this tensor."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._records:
            self._records[storage.data_ptr()] = _Records(storage)
        records = self._records[storage.data_ptr()]
        base = (len(self.arguments) + 1 << _SPACE_BITS) + _MIDDLE + tensor.data_ptr() % _ALIGNMENT
        self.arguments.append(_Argument(name, tensor, base, records, _span(tensor), _owned_elements(tensor)))
        return base

    def begin(self, program: int, num_programs: int, where: tuple[int, ...]) -> None:
        """From here on, accesses are those of this program of the grid."""
        self._program, self.where = program + 1, where
        self._seen = np.zeros(num_programs + 1, np.int32)
        self._seen[self._program] = 1

    def barrier(self) -> None:
        """What the program wrote so far is visible to all its threads."""
        self._seen[self._program] += 1

    def read(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        """The true addresses behind ``pointers``; 0 where masked off."""
        return self._access("load", pointers, mask, size)

    def write(self, pointers: np.ndarray, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The same for a store of ``values``."""
        _refuse_ambiguity(pointers, mask, values, self.where)
        return self._access("store", pointers, mask, values.itemsize)

    def update(self, pointers: np.ndarray, mask: np.ndarray, size: int, order: str) -> np.ndarray:
        """The same for an atomic operation; ``order`` names its memory semantics."""
        return self._access(order, pointers, mask, size)

    def _access(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        true = np.zeros(pointers.shape, np.uint64)
        used = pointers[mask].astype(np.int64)
        numbers = used >> _SPACE_BITS
        reached = np.empty_like(used)
        for number in np.unique(numbers):
            mine = numbers == number
            if not 1 <= number <= len(self.arguments):
                raise KernelFault(
                    f"{kind} at program {self.where} through address {used[mine][0]:#x} of nothing"
                )
            argument = self.arguments[number - 1]
            offset = used[mine] - argument.base
            self._check_bounds(kind, argument, offset, size)
            reached[mine] = offset + argument.tensor.data_ptr()
            first_byte = reached[mine] - argument.records.address
            if kind in ("load", "store"):
                self._check_order(kind, argument, (first_byte[:, None] + np.arange(size)).ravel())
            else:
                self._synchronise(kind, argument.records, first_byte.tolist())
        true[mask] = reached.astype(np.uint64)
        return true

    def _check_bounds(self, kind: str, argument: _Argument, offset: np.ndarray, size: int) -> None:
        misaligned = (argument.base + offset) % size != 0
        if misaligned.any():
            raise KernelFault(
                f"misaligned {kind} of {argument.name} at program {self.where}: {size} bytes, the first at "
                f"{(argument.base + offset)[misaligned][0] % size} past a multiple of that"
            )
        tensor, item = argument.tensor, argument.tensor.element_size()
        first, last = offset // item, (offset + size - 1) // item
        outside, what = (first < 0) | (last >= argument.span), "out of bounds"
        if not outside.any() and argument.owned is not None:
            outside, what = ~(argument.owned[first] & argument.owned[last]), "between the elements"
        if outside.any():
            raise KernelFault(
                f"{kind} {what} of {argument.name} at program {self.where}: {int(outside.sum())} of "
                f"{outside.size} lanes, the first at element {first[outside][0]}; the tensor "
                f"{list(tensor.shape)} with strides {list(tensor.stride())} spans {argument.span}"
            )

    def _check_order(self, kind: str, argument: _Argument, bytes_: np.ndarray) -> None:
        records, me = argument.records, self._program
        writer = records.writer[bytes_]
        unseen = (writer != _NOBODY) & (records.written_at[bytes_] >= self._seen[writer])
        if kind == "store":
            unseen &= writer != me
        if unseen.any():
            who = "its own threads have" if (writer[unseen] == me).all() else "another program has"
            raise KernelFault(
                f"race on {argument.name}: {kind} at program {self.where} of what {who} written, with nothing that "
                "orders the two. Fix: tl.debug_barrier() between threads, and an atomic between programs"
            )
        reader = records.reader[bytes_]
        if kind == "load":
            records.reader[bytes_] = np.where((reader == _NOBODY) | (reader == me), me, _SEVERAL)
            records.read_at[bytes_] = self._seen[me]
        else:
            others = (reader != _NOBODY) & (reader != me)
            if (others & ((reader == _SEVERAL) | (records.read_at[bytes_] >= self._seen[reader]))).any():
                raise KernelFault(
                    f"race on {argument.name}: store at program {self.where} over what another program has read"
                )
            records.writer[bytes_], records.written_at[bytes_] = me, self._seen[me]
        for address, updates in records.updated.items():
            late = any(at > self._seen[program] for program, at in updates.items())
            if late and (bytes_ == address).any():
                raise KernelFault(
                    f"race on {argument.name}: plain {kind} at program {self.where} beside another's atomic"
                )

    def _synchronise(self, order: str, records: _Records, addresses: list[int]) -> None:
        """Acquire what others released at these addresses, and release what this program's threads have seen."""
        for address in addresses:
            released = records.released.setdefault(address, np.zeros_like(self._seen))
            if order in ("acquire", "acquire_release"):
                np.maximum(self._seen, released, out=self._seen)
            if order in ("release", "acquire_release"):
                np.maximum(released, self._seen, out=released)
            records.updated.setdefault(address, {})[self._program] = int(self._seen[self._program])


def _span(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _owned_elements(tensor: torch.Tensor) -> np.ndarray | None:
    span = _span(tensor)
    if span <= tensor.numel():  # dense, in whatever order, or broadcast
        return None
    owned = np.zeros(span, bool)
    np.lib.stride_tricks.as_strided(owned, tensor.shape, tensor.stride())[...] = True
    return owned


def _refuse_ambiguity(
    pointers: np.ndarray, mask: np.ndarray, values: np.ndarray, where: tuple[int, ...]
) -> None:
    """Two lanes of one store may not put different bits in one place: nobody knows which of them wins."""
    used, bits = pointers[mask], values[mask].view(f"u{values.itemsize}")
    order = np.argsort(used, kind="stable")
    used, bits = used[order], bits[order]
    if ((used[1:] == used[:-1]) & (bits[1:] != bits[:-1])).any():
        raise KernelFault(f"one store at program {where} puts different values in one place")
