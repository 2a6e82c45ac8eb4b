"""Streams that use one plan's memory, one after the other, and CUDA graphs that go on using it.

A plan is copied to the device on the stream that is current when it is made. Its launches read that copy, and the
parts of split tiles meet in memory beside it. So whatever uses this memory next on another stream must wait for the
stream that used it last: on the device, never on the host.

Replaying a graph runs no Python, and the plan may be gone by then. Memory that a captured launch reads is therefore
never freed.

One thread at a time plans and runs what shares this memory: the wait and the launch behind it are two steps.
"""

from __future__ import annotations

import torch

from quire.errors import ArgumentError

DEFAULT_STREAM = 0  # CUDA's own, as a raw stream; nothing can be captured on it

_captured: list[torch.Tensor] = []  # buffers that graphs read


class StreamOrder:
    """The order of the uses of one buffer.

    Attributes:
        quiet: the raw stream on which a launch may skip ``before_launch``; None: every launch calls before_launch.
    """

    quiet: int | None

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer, self._index, self._is_captured = buffer, buffer.device.index, False
        raw = torch._C._cuda_getCurrentRawStream(self._index) if buffer.is_cuda else DEFAULT_STREAM
        self._now_used_on(raw, None if raw == DEFAULT_STREAM else torch.cuda.current_stream(self._index))

    def before_copy(self) -> None:
        """Before a plan is copied to the buffer on the current stream.

        Raises:
            ArgumentError: the stream is being captured. The copy's source would be gone when it is replayed.
        """
        if not self._buffer.is_cuda:
            return
        raw = torch._C._cuda_getCurrentRawStream(self._index)
        if raw == self.quiet:
            return
        with torch.cuda.device(self._index):
            if raw != DEFAULT_STREAM and torch.cuda.is_current_stream_capturing():
                raise ArgumentError(
                    "a step must be planned outside of a graph's capture; got a stream that is being captured. "
                    "Fix: planner.plan(...) before torch.cuda.graph(...), and again before each replay"
                )
            self._hand_over(raw)

    def before_launch(self, raw: int) -> None:
        """Before a launch that reads the buffer on the current stream, whose raw stream is given."""
        if raw == DEFAULT_STREAM or not torch.cuda.is_current_stream_capturing():
            self._hand_over(raw)
        elif not self._is_captured:
            self._is_captured = True
            _captured.append(self._buffer)

    def _hand_over(self, raw: int) -> None:
        """To the current stream, if another one used the buffer last."""
        if raw == self._raw:
            return
        stream = torch.cuda.current_stream(self._index)
        stream.wait_stream(self._stream or torch.cuda.default_stream(self._index))
        # Once freed, the buffer is not given to others before this stream is done with it.
        self._buffer.record_stream(stream)
        self._now_used_on(raw, stream)

    def _now_used_on(self, raw: int, stream: torch.cuda.Stream | None) -> None:
        self._raw, self._stream = raw, stream
        self.quiet = DEFAULT_STREAM if raw == DEFAULT_STREAM else None
