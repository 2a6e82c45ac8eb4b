"""A step on its way: launched, its tokens chosen on the device or to be chosen when it has ended.

On a GPU the host only launches a step. While the device runs it, the host may launch the next one, with the tokens that
this one chooses still on the device, and hand this one's out when they arrive: the device never waits for the
scheduler, the plan or the callers. What it costs is that an end is seen a step late. The surplus token of a sequence
that has ended meanwhile, by a stop token, a stop string or `abort`, is dropped.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quire.engine.beams import Beam, BeamRequest
from quire.engine.request import Request
from quire.engine.sampler import choose
from quire.engine.scheduler import Chunk
from quire.engine.sequence import Sequence
from quire.hf.transfer import begin_list


@dataclass(frozen=True)
class LaunchedStep:
    """Chunks that the model was launched on.

    Attributes:
        logits: fp32, as `build_step` orders their rows.
        tokens: int64 [chunks] on the device: what follows each chunk; None where that is chosen later.
        arrive: waits for the tokens, and returns them.
    """

    chunks: list[Chunk]
    logits: torch.Tensor
    tokens: torch.Tensor | None = None
    arrive: Callable[[], list[int]] | None = None

    @property
    def is_current(self) -> bool:
        """Whether any of its sequences still needs it."""
        return any(chunk.is_current for chunk in self.chunks)


def choose_on_device(chunks: list[Chunk], logits: torch.Tensor, ahead: int) -> LaunchedStep:
    """Launch the choice of the tokens that follow, where nothing but their logits decides it.

    Args:
        ahead: 1 where the chunks' own tokens have not been accepted yet.
    """
    if not all(_is_plain(chunk) for chunk in chunks):
        return LaunchedStep(chunks, logits)
    tokens = choose(logits, [chunk.sequence for chunk in chunks], ahead)
    return LaunchedStep(chunks, logits, tokens, begin_list(tokens))


def _is_plain(chunk: Chunk) -> bool:
    """Whether a chunk gives its own sequence a token that the host need not see to choose the next."""
    sequence, request = chunk.sequence, chunk.request
    return (
        chunk.is_last
        and request.leader is None
        and request.prompt_logprobs is None
        and sequence.rules is None
        and sequence.logprobs is None
        and not isinstance(sequence, Beam)
    )


def rows_of(step: LaunchedStep, chunks: abc.Sequence[Chunk]) -> list[int]:
    """The rows of the chunks whose sequences go on in these chunks of the next step."""
    going_on = {chunk.sequence.seq_id for chunk in chunks}
    return [row for row, chunk in enumerate(step.chunks) if chunk.sequence.seq_id in going_on]


def who_chooses(
    complete: abc.Sequence[Chunk],
) -> tuple[list[tuple[Request, Sequence]], list[int], list[tuple[int, BeamRequest, Beam]]]:
    """The sequences that get a token from the logits of these chunks, beside them their rows; and beams with theirs."""
    choosing: list[tuple[Request, Sequence]] = []
    rows: list[int] = []
    beams: list[tuple[int, BeamRequest, Beam]] = []
    for row, chunk in enumerate(complete):
        for sequence in chunk.choosing:
            if isinstance(sequence, Beam) and isinstance(chunk.request, BeamRequest):
                beams.append((row, chunk.request, sequence))
            else:
                choosing.append((chunk.request, sequence))
                rows.append(row)
    return choosing, rows, beams
