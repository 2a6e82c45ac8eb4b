"""A process's memory: its limit, its peak and its course, on a GPU and on a CPU."""

from __future__ import annotations

import resource
import threading
import time
from pathlib import Path

import torch

SLACK = 256 << 20
MOST_SAMPLES = 60  # kept of a course: enough to draw it


class NoRoom(Exception):
    """What is asked for cannot fit into the memory that there may be."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was refused, in any of the ways that torch and Python say so."""
    said = str(error).lower()
    return isinstance(error, (MemoryError, NoRoom, torch.OutOfMemoryError)) or any(
        words in said
        for words in ("out of memory", "can't allocate memory", "cannot allocate memory", "bad alloc")
    )


def held(device: str) -> int:
    """Bytes that this process holds on a device now: torch's tensors on a GPU, resident memory on a CPU."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.memory_allocated())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def limit(device: str, budget: int, used: int) -> None:
    """Refuse this process more than so many bytes of weights, cache and activations.

    Args:
        used: of the budget, what is held already.
    A GPU's budget is kept to the byte. On a CPU, where stacks and the allocator's reserves count too, SLACK is added:
    whoever's peak is above the budget was out of memory all the same (`Course.peak`).
    """
    if torch.device(device).type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))
        return
    private = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData:")
    )
    most = private + max(0, budget - used) + SLACK
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))


class Course:
    """Memory over time while a block runs: looked at from a thread, often enough to see a prompt go through.

    Attributes:
        samples: (seconds after the start, bytes above the base).
    """

    def __init__(self, device: str, base: int, period: float = 0.03) -> None:
        self._device, self._base, self._period = device, base, period
        self.samples: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Course:
        self._start = time.perf_counter()
        if torch.device(self._device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    @property
    def peak(self) -> int:
        """Most bytes above the base: torch's own count on a GPU, the largest sample on a CPU."""
        if torch.device(self._device).type == "cuda":
            return int(torch.cuda.max_memory_allocated()) - self._base
        return max(held for _, held in self.samples)

    def thinned(self) -> list[tuple[float, int]]:
        """At most MOST_SAMPLES of the samples: the largest of each stretch."""
        size = -(-len(self.samples) // MOST_SAMPLES) or 1
        stretches = [self.samples[i : i + size] for i in range(0, len(self.samples), size)]
        return [max(stretch, key=lambda sample: sample[1]) for stretch in stretches]

    def _watch(self) -> None:
        while True:
            self._look()
            if self._over.wait(self._period):
                return

    def _look(self) -> None:
        self.samples.append((time.perf_counter() - self._start, held(self._device) - self._base))
