"""Copies between host and device that make neither wait for more than it needs.

A plain copy to a GPU from ordinary memory, and every read of a device tensor, stops the host until the device has done
all that was launched before. From pinned memory a copy is queued like a launch. What a step sends goes this way, so
that the host waits once a step: for the tokens that were chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on a device, copied on the current stream; the host does not wait, and may change `values`."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def to_list(values: torch.Tensor) -> list[Any]:
    """A tensor's numbers, once the current stream has computed them; nested as the tensor is."""
    return begin_list(values)()


def begin_list(values: torch.Tensor) -> Callable[[], list[Any]]:
    """Queue a copy to the host; what is returned waits for it, not for later launches, and gives the numbers."""
    if not values.is_cuda:
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.current_stream(values.device).record_event()

    def wait() -> list[Any]:
        copied.synchronize()
        return host.tolist()

    return wait


class StreamTurns:
    """Lets each step wait, on the device, for the steps before it, whatever streams their threads use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    def take(self) -> None:
        """Let the current stream wait for the one that had the last turn."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and stream != self._last:
            stream.wait_stream(self._last)
        self._last = stream
