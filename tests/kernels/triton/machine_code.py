"""What the backend would launch on a chip that is not here: compiled by the backend's own path, then disassembled.

Triton compiles for any target, and its package brings the assembler and disassembler along. ``standing_in`` puts a
driver in place that names the target and makes no launch; everything else, from the tile table to the argument that
is a multiple of 16, is what runs on the real chip.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from quire.kernels.triton import attend, hopper, store, tune
from quire.kernels.triton.launch import Form

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
KIB = 1024


class Chip(NamedTuple):
    """A chip as the compiler knows it."""

    target: GPUTarget
    multiprocessors: int
    shared_bytes: int  # that one block may have

    @property
    def is_nvidia(self) -> bool:
        return self.target.backend == "cuda"

    @property
    def known(self) -> tune.Chip:
        """The chip as ``tune`` knows it."""
        arch = self.target.arch if self.is_nvidia else 0
        return tune.known_chip(self.target.backend, arch, self.multiprocessors)


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 108, 163 * KIB),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 142, 99 * KIB),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 132, 227 * KIB),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 148, 227 * KIB),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 304, 64 * KIB),
}


@dataclass
class AbsentGPU:
    """A driver, as Triton asks for one: it knows its chip, loads nothing and only writes launches down."""

    chip: Chip
    launches: list[tuple[Any, tuple[Any, ...]]]  # source and arguments

    @property
    def utils(self) -> AbsentGPU:
        return self

    def get_current_target(self) -> GPUTarget:
        return self.chip.target

    def get_current_device(self) -> str:
        return f"absent {self.chip.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": self.chip.shared_bytes}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: str
    ) -> tuple[int, int, int, int, int]:
        module, function, registers, spills, max_threads = 1, 1, 0, 0, 1024
        return module, function, registers, spills, max_threads

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def write_down(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            _packed_metadata, _launch_metadata, _enter, _exit, *arguments = rest
            self.launches.append((source, tuple(arguments)))

        return write_down


@contextmanager
def standing_in(chip: Chip) -> Iterator[list[Any]]:
    """Inside, the backend's calls on CPU tensors compile for ``chip``; yields the list of kernels compiled so far."""
    known, gpu, kernels = chip.known, AbsentGPU(chip, []), []
    compile_form = Form.compile

    def noting(*arguments: Any) -> Form:
        form = compile_form(*arguments)
        kernels.append(form.compiled)
        return form

    with ExitStack() as undo:
        for kept in (store._forms, hopper._forms):
            undo.enter_context(patch.dict(kept, clear=True))
        attend._recipe.cache_clear()
        undo.callback(attend._recipe.cache_clear)
        for owner, name, value in (
            (triton.runtime.driver, "_active", gpu),
            (tune, "chip_of", lambda _: known),
            (Form, "compile", noting),
            (torch.cuda, "current_device", lambda: 0),
            (torch._C, "_cuda_getDevice", lambda: 0),
            (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),
        ):
            undo.enter_context(patch.object(owner, name, value, create=True))
        yield kernels
        for source, arguments in gpu.launches:
            _check_arguments(source, arguments)


def _check_arguments(source: Any, arguments: tuple[Any, ...]) -> None:
    """What the compiled launcher would be handed is what the kernel was compiled for."""
    assert len(arguments) == len(source.signature)
    for place, ((name, kind), argument) in enumerate(zip(source.signature.items(), arguments, strict=True)):
        given = f"{name}, compiled as {kind}, was given {argument!r}"
        if kind == "constexpr":
            assert argument == source.constants[place,], given
        elif kind.startswith("tensordesc"):
            assert argument.base.data_ptr() % 16 == 0, given
            assert len(argument.shape) == len(argument.strides), given
        elif kind == "fp32":
            assert isinstance(argument, (int, float)), given
        else:
            assert isinstance(argument, int), given
            assert kind != "i32" or -(2**31) <= argument < 2**31, given
            for promise, value in source.attrs.get((place,), []):
                # The other promise, tt.pointer_range, is about a size that a launcher is not told.
                assert promise != "tt.divisibility" or argument % value == 0, (
                    f"{given}, no multiple of {value}"
                )


@dataclass
class MachineCode:
    """What there is to say about one compiled kernel."""

    registers: int
    spilled_bytes: int  # local memory, on NVIDIA; private memory, on AMD
    shared_bytes: int
    threads: int
    instructions: Counter[str]
    vector_loads: str = r"(LDG|LDGSTS)\b.*\.128"  # names of loads from global memory, 16 bytes at once
    narrow_loads: str = r"LDG\b.*\.[US](8|16)\b"  # ... and of one or two bytes

    def count(self, pattern: str) -> int:
        """Instructions whose name matches."""
        return sum(count for name, count in self.instructions.items() if re.match(pattern, name))

    def __str__(self) -> str:
        loads = {
            name: count
            for name, count in self.instructions.items()
            if re.match(r"LDG|LDGSTS|LDL|STL|UTMALDG|(global|buffer)_load|scratch", name)
        }
        return (
            f"{self.registers} registers, {self.spilled_bytes} spilled, {self.shared_bytes} shared, "
            f"{self.threads} threads, {self.instructions.total()} instructions, {loads}"
        )


def read_machine_code(kernel: Any) -> MachineCode:
    """Disassemble a compiled kernel."""
    target = kernel.metadata.target
    return _read_cubin(kernel) if target.backend == "cuda" else _read_amdgcn(kernel)


def _read_cubin(kernel: Any) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = _run(_TOOLS / "cuobjdump", "-res-usage", file.name)
        listing = _run(_TOOLS / "nvdisasm", "-c", file.name)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    #   "  /*0010*/   @!P0 LDG.E.128 R4, [R2.64] ;"
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    assert names, "the disassembler's listing reads differently"
    return MachineCode(
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        threads=32 * kernel.metadata.num_warps,
        instructions=Counter(names),
    )


def _read_amdgcn(kernel: Any) -> MachineCode:
    listing = kernel.asm["amdgcn"]

    def stated(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", listing)
        assert found, f"the listing does not state {name}"
        return int(found[1])

    return MachineCode(
        registers=stated("vgpr_count"),
        spilled_bytes=stated("private_segment_fixed_size"),  # registers spilled into others cost no memory
        shared_bytes=kernel.metadata.shared,
        threads=64 * kernel.metadata.num_warps,
        instructions=Counter(re.findall(r"^\s+([a-z]\w+)", listing, re.MULTILINE)),
        vector_loads=r"(global|buffer)_load_dwordx4",
        narrow_loads=r"(global|buffer)_load_[us](byte|short)",
    )


def assembler_remarks(kernel: Any) -> str:
    """What ptxas says of the kernel, such as that it had to serialise its asynchronous matrix products."""
    arch = kernel.metadata.target.arch
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        command = [
            get_ptxas(arch).path,
            "-v",
            f"--gpu-name={sm_arch_from_capability(arch)}",
            source,
            "-o",
            "/dev/null",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _run(*command: Any) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
