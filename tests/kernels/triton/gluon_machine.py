"""Runs the source of a warp-specialised Gluon kernel on the CPU, as unkindly as the hardware may.

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
from collections.abc import Callable, Sequence
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


# --- the language ----------------------------------------------------------------------------------------


def language(machine: Machine, program: int) -> dict[str, Any]:
    """The names that a kernel's source uses, acting on a machine."""
    pause, chance = machine.pause, machine.chance

    def load(pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "") -> Any:
        memory, where = pointer.memory, torch.as_tensor(pointer.offset)
        wanted = (
            torch.ones(where.shape, dtype=torch.bool)
            if mask is None
            else torch.as_tensor(mask).expand(where.shape)
        )
        assert not wanted.any() or (where[wanted].min() >= 0 and where[wanted].max() < memory.numel())
        loaded = (
            memory[torch.where(wanted, where, 0).long()] if wanted.any() else memory.new_zeros(where.shape)
        )
        loaded = (
            loaded if other is None else torch.where(wanted, loaded, torch.tensor(other, dtype=memory.dtype))
        )
        return value(loaded if memory.is_floating_point() else loaded.long())

    def store(pointer: Pointer, values: Any, mask: Any = None) -> None:
        where, values = torch.as_tensor(pointer.offset), torch.as_tensor(values)
        mask = torch.ones(where.shape, dtype=torch.bool) if mask is None else mask.expand(where.shape)
        assert not mask.any() or (where[mask].min() >= 0 and where[mask].max() < pointer.memory.numel())
        pointer.memory[where[mask].long()] = values[mask].to(pointer.memory.dtype).as_subclass(torch.Tensor)

    def atomic_add(pointer: Pointer, amount: int, sem: str, scope: str) -> Any:
        before = load(pointer)
        store(pointer, before + amount)
        pause()
        return before

    def pick(test: Any, a: Any, b: Any) -> Any:
        return torch.where(test, a, b) if torch.is_tensor(test) and test.ndim else (a if test else b)

    def either(tensor_op: Any, scalar_op: Any) -> Any:
        def op(a: Any, b: Any) -> Any:
            if any(torch.is_tensor(x) and x.ndim for x in (a, b)):
                return tensor_op(torch.as_tensor(a), torch.as_tensor(b))
            return value(torch.tensor(scalar_op(int(a), int(b))))

        return op

    def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
        if layout == "barrier":
            return Barriers(Barrier() for _ in range(shape[0])) if len(shape) > 1 else Barrier()
        return Shared.at(torch.full((math.prod(shape),), math.nan, dtype=dtype), 0, list(shape))

    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def expect(barrier: Barrier, bytes: int) -> None:
        barrier.bytes += int(bytes)
        barrier.pending -= 1
        barrier.settle()
        pause()

    def arrive(barrier: Barrier, count: int = 1, pred: Any = True) -> None:
        if pred:
            barrier.pending -= count
            barrier.settle()
        pause()

    def wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
        if pred:
            pause(lambda: barrier.phase != int(phase))

    def copy(descriptor: Descriptor, at: list[Any], barrier: Barrier, target: Shared) -> None:
        where = [int(c) for c in at]
        assert target.shape == list(descriptor.block_shape)
        target.write(torch.full(target.shape, math.nan))

        def land() -> None:
            box = descriptor.box(where)
            target.write(box)
            barrier.bytes -= box.numel() * box.element_size()
            barrier.settle()

        machine.copies.append(land)
        pause()

    def send(descriptor: Descriptor, at: list[Any], source: Shared) -> None:
        where, number = [int(c) for c in at], machine.me.number

        def land() -> None:
            descriptor.write(where, source.read())
            machine.stores[number] -= 1

        assert source.shape == list(descriptor.block_shape)
        machine.stores[number] += 1
        machine.sends.append(land)
        pause()

    def store_wait(pendings: int) -> None:
        number = machine.me.number
        pause(lambda: machine.stores[number] <= pendings)

    def mma(a: Any, b: Shared, acc: torch.Tensor, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        product = Product(a, b, acc if use_acc else None)
        machine.me.products.append(product)
        if chance.random() < 0.5:
            pause()
            product.read()
        pause()
        return product

    def mma_wait(num_outstanding: int, deps: tuple[Any, ...]) -> Any:
        pause()
        flying = machine.me.products
        while len(flying) > num_outstanding:
            flying.pop(0).read()
        results = tuple(value(d.done) if isinstance(d, Product) else d for d in deps)
        return results[0] if len(results) == 1 else results

    gl = types.SimpleNamespace(
        constexpr=object, float32=torch.float32, int64=torch.int64, load=load, store=store, where=pick,
        maximum=either(torch.maximum, max), minimum=either(torch.minimum, min), static_range=range,
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2,
        arange=lambda a, b, layout: value(torch.arange(a, b)), program_id=lambda axis: program,
        full=lambda shape, x, dtype, layout: value(torch.full(shape, x, dtype=dtype)),
        zeros=lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)),
        atomic_add=atomic_add, convert_layout=lambda x, layout: x,
        allocate_shared_memory=allocate,
        warp_specialize=lambda partitions, warps, registers: machine.specialize(partitions),
        **dict.fromkeys(
            ("NVMMADistributedLayout", "NVMMASharedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"),
            lambda *arguments: None,
        ),
    )  # fmt: skip
    barriers = types.SimpleNamespace(
        MBarrierLayout=lambda: "barrier", init=init, expect=expect, arrive=arrive, wait=wait
    )
    return {
        "gl": gl, "mbarrier": barriers, "tma": types.SimpleNamespace(
            async_copy_global_to_shared=copy, async_copy_shared_to_global=send, store_wait=store_wait
        ),
        "thread_barrier": lambda: None, "warpgroup_mma": mma, "warpgroup_mma_wait": mma_wait,
        "fence_async_shared": lambda: None,
    }  # fmt: skip


def run(
    modules: Sequence[types.ModuleType], kernel: str, programs: int, arguments: dict[str, Any], seed: int = 0
) -> None:
    """Run a kernel of some modules of Gluon functions; tensors among the arguments become pointers."""
    given = {name: Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    for program in range(programs):
        names = {"range": lambda *bounds: (value(torch.tensor(i)) for i in range(*map(int, bounds)))}
        for module in modules:
            for name, thing in vars(module).items():
                if hasattr(thing, "fn") and thing.fn.__module__ == module.__name__:
                    names[name] = types.FunctionType(thing.fn.__code__, names, name)
                elif type(thing).__name__ == "constexpr":
                    names[name] = thing.value
        names.update(language(Machine(seed * 1000 + program), program))
        names[kernel](**given)
