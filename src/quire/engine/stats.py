"""What an engine has done so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineStats:
    """What an engine has done so far.

    Attributes:
        steps: packed forwards.
        computed_tokens: tokens that went through the model, those computed again included.
        admitted_tokens: known tokens of the sequences that began to run, those that began again included.
        cached_tokens: how many of these were found in pages, and not computed.
        returned_tokens: how many were found because their pages came back from host memory.
        swapped_pages: pages with a copy in host memory, of all engines on the model, as of the last step.
        generated_tokens: tokens handed out.
        peak_pages: most pages of `model.bytes_per_page` that its sequences held at once; a shared page counts once.
        peak_unused_slots: slots of those pages that held no token at that moment.
    """

    steps: int = 0
    computed_tokens: int = 0
    admitted_tokens: int = 0
    cached_tokens: int = 0
    returned_tokens: int = 0
    swapped_pages: int = 0
    generated_tokens: int = 0
    peak_pages: int = 0
    peak_unused_slots: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of admitted tokens that was found in pages; 0.0 before the first."""
        return self.cached_tokens / self.admitted_tokens if self.admitted_tokens else 0.0
