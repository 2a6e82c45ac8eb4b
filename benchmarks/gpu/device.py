"""Clocks: a CUDA device, timed by events and graph replays, and the host, to try everything without one."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

Call = Callable[[], Any]
MIN_ROUNDS, MAX_ROUNDS = 7, 200


class Device(Protocol):
    """What the benchmark asks of the thing that computes."""

    where: torch.device
    cache_bytes: int

    def synchronize(self) -> None:
        """Wait until all work handed to it is done."""

    def rounds(self, play: Call, count: int) -> list[float]:
        """Microseconds of each of ``count`` calls, as the device's own clock saw them."""

    def capture(self, calls: Sequence[Call]) -> Call:
        """A call that replays these calls as one graph; the host, which has none, makes them again."""

    def free(self) -> None:
        """Give memory of dead tensors back."""

    def alive(self) -> bool:
        """Whether it still computes."""

    def facts(self) -> dict[str, Any]:
        """Its name and driver."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.where = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = torch.cuda.get_device_properties(self.where).L2_cache_size

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def rounds(self, play: Call, count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize()
        for begin, end in pairs:
            begin.record()
            play()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in pairs]

    def capture(self, calls: Sequence[Call]) -> Call:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # lazy set-up must happen before capture, on a stream as capture's
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def free(self) -> None:
        gc.collect()
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # torch.AcceleratorError too: alive() is what says so
            return

    def alive(self) -> bool:
        try:
            torch.cuda.synchronize()
            return bool(torch.ones(1, device=self.where).item())
        except RuntimeError:
            return False

    def facts(self) -> dict[str, Any]:
        try:
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            driver = ""
        return {
            "gpu": torch.cuda.get_device_name(self.where),
            "driver": (driver.strip().splitlines() or ["unknown"])[0],
        }


class Host:
    """The CPU in a GPU's place: for trying the script out, not for figures."""

    def __init__(self) -> None:
        self.where = torch.device("cpu")
        self.cache_bytes = 1 << 10  # small, so that few layers outgrow it

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def rounds(self, play: Call, count: int) -> list[float]:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            play()
            times.append((time.perf_counter() - begin) * 1e6)
        return times

    def capture(self, calls: Sequence[Call]) -> Call:
        return lambda: [call() for call in calls]

    def free(self) -> None:
        gc.collect()

    def alive(self) -> bool:
        return True

    def facts(self) -> dict[str, Any]:
        return {"gpu": "none (dry run on the CPU)", "driver": "none"}


def make_device(name: str) -> Device:
    """The device of a name that torch knows."""
    return Cuda() if torch.device(name).type == "cuda" else Host()


def measure(device: Device, calls: Sequence[Call], seconds: float = 0.2) -> dict[str, Any]:
    """Time a run of calls that each use other memory, as the layers of a model do; columns of a row.

    median_us, p20_us and p80_us are per call, from replays of one graph of all calls where it can be captured
    (``by`` says); launched_us is the same from plain launches, host_us the host's time per plain launch.
    """

    def launch() -> None:
        for call in calls:
            call()

    for _ in range(2):
        launch()
    device.synchronize()
    launched = _rounds(device, launch, seconds / 2)
    note = ""
    try:
        replay = device.capture(calls)
        timed, by = _rounds(device, replay, seconds), "graph"
    except Exception as error:
        timed, by = launched, "launches"
        note = f"no graph: {type(error).__name__}: {str(error)[:120]}"
        device.synchronize()
    per_call = np.array(timed) / len(calls)
    return {
        "median_us": round(float(np.median(per_call)), 3),
        "p20_us": round(float(np.percentile(per_call, 20)), 3),
        "p80_us": round(float(np.percentile(per_call, 80)), 3),
        "by": by,
        "launched_us": round(float(np.median(launched)) / len(calls), 3),
        "host_us": round(host_cost(device, launch) / len(calls), 3),
        "layers": len(calls),
        "repeats": len(timed),
        "note": note,
    }


def host_cost(device: Device, call: Call, repeats: int = 9) -> float:
    """Microseconds the host is busy with a call, the device's queue being empty when it starts."""
    times = []
    for _ in range(repeats):
        device.synchronize()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    device.synchronize()
    return float(np.median(times))


def _rounds(device: Device, play: Call, seconds: float) -> list[float]:
    probe = min(device.rounds(play, 3))
    count = int(np.clip(seconds * 1e6 / max(probe, 1.0), MIN_ROUNDS, MAX_ROUNDS))
    return device.rounds(play, count)
