"""The least time that a decode step can take: every weight and every key and value read once, at the rate of today."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.serving.cases import Case

ROUNDS = 7
BYTES = {"cuda": 4 << 30, "cpu": 512 << 20}  # beyond any cache


def read_bandwidth(device: str) -> float:
    """Bytes per second at which torch reads memory: the faster of a sum and a dot product, medians."""
    numbers = torch.ones(BYTES[torch.device(device).type] // 4, device=device)
    sum_, dot = (_median_seconds(call, device) for call in (numbers.sum, lambda: torch.dot(numbers, numbers)))
    return numbers.numel() * 4 / min(sum_, dot)


def _median_seconds(call: Callable[[], object], device: str) -> float:
    seconds = []
    for _ in range(ROUNDS + 1):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[1:]))


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def floor_seconds(case: Case, itemsize: int, slots: float, bytes_per_second: float) -> float:
    """Seconds of a decode step that reads all weights but the embedding, and so many slots of keys and values."""
    values = case.shape.step_parameters + case.shape.slot_values * slots
    return values * itemsize / bytes_per_second


def decode_window(times: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """From when the last request has its first token until the first request has its last; None where that is never.

    Between them every step is one token for every request.
    """
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    return (begin, end) if begin < end else None


def decode_step(case: Case, times: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """A decode step of all requests together: its median seconds, and the slots that it reads on average.

    None where the requests never all decode at once, or for no step.
    """
    window = decode_window(times)
    if window is None:
        return None
    begin, end = window
    steps, slots = [], 0.0
    for each, own in zip(case.asked, times, strict=True):
        inside = [at for at in own if begin <= at <= end]
        steps += [later - at for at, later in itertools.pairwise(inside)]
        before = sum(at < begin for at in own)
        slots += each.prompt_len + before + len(inside) / 2
    return (float(np.median(steps)), slots) if steps else None
