"""Gluon's language on the machine of ``gluon_machine``: a kernel's source runs as it is, with its names given here."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from typing import Any

import torch
from gluon_machine import Barrier, Barriers, Descriptor, Machine, Pointer, Product, Shared, value


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
        fma=lambda a, b, c: a * b + c,
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
