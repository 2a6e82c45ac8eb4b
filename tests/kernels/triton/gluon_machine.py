"""A multiprocessor that runs warp-specialised Gluon kernels on the CPU, as unkindly as the hardware may.

Partitions are threads of which one runs at a time; at every operation that others can notice, a seeded scheduler
picks who goes on. What the hardware does asynchronously happens late or early, as chance has it:

- the copy engine (TMA) poisons its destination with NaN when asked and fills it at some later moment;
- a matrix product reads its shared operands anywhere between being issued and being waited for;
- a barrier completes a phase when its arrivals and its bytes are all in, and a wait is by parity alone.

So a missing wait, a buffer freed too early or a phase mixed up shows as wrong values, and a lost signal as
``Deadlock``. Shared memory has the layout of the matrix unit (slabs of 64 columns), and a reinterpreted view forgets
what it was sliced from, as the compiler's does.

Modelled as far as this kernel needs; register layouts, swizzling and proxies' fences are not.
"""

from __future__ import annotations

import collections
import math
import random
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SLAB = 64


class Deadlock(Exception):
    """Every partition waits for something that nobody will do."""


class Value(torch.Tensor):
    """A register tensor: torch's arithmetic, Gluon's attributes."""

    @property
    def type(self):
        return types.SimpleNamespace(layout=None)

    def split(self):  # Gluon's: the last dimension, of two
        return self[..., 0], self[..., 1]


def value(tensor: torch.Tensor) -> Value:
    return tensor.as_subclass(Value)


class Machine:
    """One multiprocessor: its partitions, the copies in flight, and chance."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.waiting: dict[int, Callable[[], bool] | None] = {}
        self.baton: dict[int, threading.Semaphore] = {}
        self.failure: BaseException | None = None
        self.sends: list[Callable[[], None]] = []
        self.stores: collections.Counter[int] = (
            collections.Counter()
        )  # on their way from shared memory, by partition
        self.me = threading.local()
        self.favourite: int | None = None

    def land_some(self) -> None:
        for flying, share in ((self.copies, 0.3), (self.sends, 0.03)):
            while flying and self.chance.random() < share:
                flying.pop(self.chance.randrange(len(flying)))()

    def pass_on(self) -> None:
        """Hand the baton to somebody who can run."""
        self.land_some()
        while not (ready := [i for i, test in self.waiting.items() if test is None or test()]):
            flying = self.copies or self.sends
            if not flying:
                if self.waiting:
                    self.fail(Deadlock(f"partitions {sorted(self.waiting)} wait for each other"))
                return
            flying.pop(self.chance.randrange(len(flying)))()
        # One partition runs on for a while, then another: races need one to be far ahead of the rest.
        if self.favourite not in ready or self.chance.random() < 0.1:
            self.favourite = self.chance.choice(ready)
        self.baton[self.favourite].release()

    def fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        for baton in self.baton.values():
            baton.release()

    def pause(self, until: Callable[[], bool] | None = None) -> None:
        """Let others run; come back when ``until`` holds."""
        number = getattr(self.me, "number", None)
        if number is None:
            return
        self.waiting[number] = until
        self.pass_on()
        self.baton[number].acquire()
        if self.failure:
            raise self.failure
        self.waiting[number] = None

    def specialize(self, partitions: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        self.waiting = dict.fromkeys(range(len(partitions)))
        self.baton = {i: threading.Semaphore(0) for i in self.waiting}

        def body(number: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            self.me.number, self.me.products = number, []
            self.baton[number].acquire()
            try:
                if not self.failure:
                    function(*arguments)
                del self.waiting[number]
                self.pass_on()
            except BaseException as error:
                self.fail(error)

        threads = [threading.Thread(target=body, args=(i, *p)) for i, p in enumerate(partitions)]
        for thread in threads:
            thread.start()
        self.pass_on()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure
        for land in self.copies + self.sends:
            land()


# --- memory ----------------------------------------------------------------------------------------------


@dataclass
class Pointer:
    memory: torch.Tensor
    offset: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more)

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.memory.dtype)


@dataclass
class Shared:
    """A view of shared memory: rows of ``shape[-1]`` columns, laid out slab by slab."""

    storage: torch.Tensor
    offset: int
    shape: list[int]
    slab_rows: int  # rows from one slab to the next: those of the tile this was sliced from
    turned: bool = False
    layout: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @staticmethod
    def at(storage: torch.Tensor, offset: int, shape: list[int]) -> Shared:
        return Shared(storage, offset, shape, math.prod(shape[:-1]))

    def index(self, i: Any) -> Shared:
        rest = self.shape[1:]
        return Shared.at(self.storage, self.offset + int(i) * math.prod(rest), rest)

    def slice(self, start: int, length: int) -> Shared:
        columns = min(self.shape[1], SLAB)
        return Shared(self.storage, self.offset + start * columns, [length, self.shape[1]], self.slab_rows)

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        assert math.prod(shape) == math.prod(self.shape)
        return Shared.at(self.storage, self.offset, shape)

    def permute(self, order: tuple[int, int]) -> Shared:
        assert order == (1, 0)
        return Shared(self.storage, self.offset, self.shape, self.slab_rows, not self.turned)

    def slabs(self) -> torch.Tensor:
        rows, columns = math.prod(self.shape[:-1]), self.shape[-1]
        width = min(columns, SLAB)
        return self.storage.as_strided(
            (columns // width, rows, width), (self.slab_rows * width, width, 1), self.offset
        )

    def read(self) -> torch.Tensor:
        tile = self.slabs().transpose(0, 1).reshape(-1, self.shape[-1]).float()
        return tile.T if self.turned else tile

    def store(self, tile: torch.Tensor) -> None:
        self.write(tile.as_subclass(torch.Tensor))

    def write(self, tile: torch.Tensor) -> None:
        slabs = self.slabs()
        slabs.copy_(tile.reshape(slabs.shape[1], slabs.shape[0], slabs.shape[2]).transpose(0, 1))


@dataclass
class Descriptor:
    """A tensor as the copy engine sees it; what lies outside arrives as zeros."""

    base: torch.Tensor
    block_shape: list[int]
    inside: tuple[int, ...] = ()  # dimensions whose coordinate must exist: page ids are never made up
    layout: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def box(self, at: list[int]) -> torch.Tensor:
        for axis in self.inside:
            assert 0 <= at[axis] < self.base.shape[axis], f"coordinate {at} outside {tuple(self.base.shape)}"
        box = torch.zeros(self.block_shape, dtype=self.dtype)
        low = [max(0, c) for c in at]
        high = [min(n, c + b) for n, c, b in zip(self.base.shape, at, self.block_shape, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            target = tuple(slice(a - c, b - c) for a, b, c in zip(low, high, at, strict=True))
            box[target] = self.base[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        return box

    def write(self, at: list[int], box: torch.Tensor) -> None:
        """What lies outside is dropped."""
        low = [max(0, c) for c in at]
        high = [min(n, c + b) for n, c, b in zip(self.base.shape, at, self.block_shape, strict=True)]
        source = tuple(slice(a - c, b - c) for a, b, c in zip(low, high, at, strict=True))
        target = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        self.base[target] = box.reshape(self.block_shape)[source].to(self.dtype)


@dataclass
class Barrier:
    count: int = 0
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


class Barriers(list):
    def index(self, i: Any) -> Barrier:
        return self[int(i)]


@dataclass
class Product:
    """A matrix product in flight."""

    a: Any
    b: Shared
    added: torch.Tensor | None
    done: torch.Tensor | None = None

    def read(self) -> None:
        if self.done is None:
            a = self.a.read() if isinstance(self.a, Shared) else self.a.float()
            self.done = a @ self.b.read()
            if self.added is not None:
                self.done = self.done + self.added
