"""Launching a compiled kernel with little work on the host.

``kernel[grid](...)`` inspects every argument of every call, 20 µs for forty of them. What compiled code depends on is
known here: the tensors' dtypes, strides and alignment, and which of them are given. A ``Form`` is compiled for those.
Bound to what does not change from layer to layer, it takes raw addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton

from quire.kernels.triton.addresses import as_bytes
from quire.kernels.triton.device_plan import Section
from quire.kernels.triton.interpreted import INTERPRETED
from quire.kernels.triton.streams import StreamOrder
from quire.kernels.triton.tune import Tile


class Options(NamedTuple):
    """How a kernel is compiled."""

    num_warps: int
    num_stages: int
    # With fusion on, the compiler rounds a·b + c once or twice depending on the code around it, so that an output's
    # bits depend on whether lse is asked for. With fusion off, it rounds once where the source says fma, else twice.
    enable_fp_fusion: bool = False
    launch_pdl: bool | None = None  # programmatic dependent launch

    @classmethod
    def of(cls, tile: Tile, overlaps: bool) -> Options:
        return cls(tile.num_warps, tile.num_stages, launch_pdl=overlaps or None)


class Form(NamedTuple):
    """A kernel compiled for tensors of one form: their dtypes, strides and alignment."""

    kernel: Any
    compiled: Any  # None in the interpreter
    tail: tuple[Any, ...]  # arguments after the tensors and the numbers of a step: strides, then constants

    @classmethod
    def compile(
        cls,
        kernel: Any,
        device: torch.device,
        tensors: Sequence[Any],
        numbers: Sequence[float],
        tail: tuple[Any, ...],
        options: Options,
    ) -> Form:
        """Compile ``kernel(*tensors, *numbers, *tail)``: seconds the first time, then from disk."""
        if INTERPRETED:
            return cls(kernel, None, tail)
        arguments = (*map(as_bytes, tensors), *numbers, *tail)
        # AMD's compiler knows no launch_pdl, not even None.
        asked = {name: value for name, value in options._asdict().items() if value is not None}
        # Code is loaded per device.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            compiled = kernel.warmup(*arguments, grid=(1,), **asked)
            compiled._init_handles()
        return cls(kernel, compiled, tail)

    def bind(
        self,
        grid: int,
        device: torch.device,
        sections: Sequence[Section],
        numbers: Sequence[float],
        order: StreamOrder | None = None,
    ) -> Enqueue:
        """``grid`` programs on the device's current stream, for tensors given anew each time, and for what stays.

        The bound form takes the tensors and their addresses, which callers have computed already. ``order`` is that of
        the sections' buffer.
        """
        if self.compiled is None:
            plan = [section.tensor for section in sections]

            def interpret(tensors: Sequence[torch.Tensor | None], addresses: Sequence[int | None]) -> None:
                self.kernel[(grid,)](*map(as_bytes, tensors), *plan, *numbers, *self.tail)

            return interpret
        index = torch.cuda.current_device() if device.index is None else device.index
        launcher, middle = _launcher_of(self.compiled)
        rest = (*[section.address for section in sections], *numbers, *self.tail)

        def enqueue(tensors: Sequence[torch.Tensor | None], addresses: Sequence[int | None]) -> None:
            if torch._C._cuda_getDevice() == index:
                stream = torch._C._cuda_getCurrentRawStream(index)
                if order and stream != order.quiet:
                    order.before_launch(stream)
                launcher(grid, 1, 1, stream, *middle, *addresses, *rest)
            else:
                with torch.cuda.device(index):
                    enqueue(tensors, addresses)

        return enqueue


Enqueue = Callable[[Sequence[torch.Tensor | None], Sequence[int | None]], None]


def _launcher_of(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The function that launches compiled code, and its arguments between the stream and the kernel's own.

    In Triton 3.6 that is the launcher's C function, if no scratch memory is needed, which saves a microsecond.
    """
    run, hooks = compiled.run, (compiled.packed_metadata, None, None, None)
    if triton.__version__.startswith("3.6.") and hasattr(run, "launch_pdl"):
        scratch = run.global_scratch_size, run.profile_scratch_size
        if scratch == (0, 0):
            return run.launch, (
                compiled.function,
                run.launch_cooperative_grid,
                run.launch_pdl,
                None,
                None,
                *hooks,
            )
    return run, (compiled.function, *hooks)
