"""One text on its way: its tokens, and how many of them are in pages."""

from __future__ import annotations

import time
from array import array
from collections import abc, deque
from typing import TYPE_CHECKING, Literal

import torch

from quire.engine.logits import LogitRules, TokenCounts
from quire.engine.logprobs import Logprob, TokenLogprobs
from quire.engine.params import SamplingParams
from quire.pages import Prefix

if TYPE_CHECKING:
    from quire.engine.text import TextStream

FinishReason = Literal["stop", "length", "abort"]


class Sequence:
    """A prompt and what is generated after it: what the page table knows, and what a chunk is cut from.

    Args:
        seq_id: its name in the page table.
        params: how its tokens are chosen.
        max_length: most tokens, prompt included, that it may reach.
        stop_token_ids: all tokens that end it, the model's own included.
        text: turns the tokens into text; None without a tokenizer.
        rules: what changes its logits; None: nothing does.
        index: its place among the samples of its request; its seed is params.seed + index.
    Attributes:
        logprobs: how likely each generated token was, added before the token; None where nobody asked.
    """

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: abc.Sequence[int],
        params: SamplingParams,
        *,
        max_length: int,
        stop_token_ids: frozenset[int],
        text: TextStream | None = None,
        rules: LogitRules | None = None,
        index: int = 0,
    ) -> None:
        self.seq_id = seq_id
        params = params.with_defaults()  # itself where nothing is unset, as of every request
        self.params = params
        self.tokens = array("q", prompt_token_ids)  # prompt and generated; one buffer, sliced by the runner
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed = 0  # leading tokens whose keys and values are in pages
        self.prefix: Prefix | None = None  # its named pages; while it waits, those last found; see PrefixHits
        self.max_length = max_length
        self.generator = _seeded_generator(params, index)
        self._drawn: deque[torch.Tensor] = deque()  # for the tokens that are not accepted yet
        self.finish_reason: FinishReason | None = None
        self.first_token_at: float | None = None
        self.finished_at = 0.0
        self._stop_token_ids = stop_token_ids
        self._text = text
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._shown: list[dict[int, Logprob]] = []
        self.rules = rules
        self.counts: TokenCounts | None = None
        if rules is not None and rules.penalises:
            self.counts = TokenCounts(prompt_token_ids if params.repetition_penalty != 1 else ())

    @property
    def num_pending(self) -> int:
        """Known tokens not yet computed: the rest of a prompt, or the token just generated."""
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def text(self) -> str:
        """Text that is certain by now."""
        return "" if self._text is None else self._text.text

    def draw(self, ahead: int = 0) -> torch.Tensor:
        """The number in [0, 1) that chooses the next token, float64 [1] on the CPU; the same until `accept`.

        A step that breaks off after it drew is run again and must choose the same token.

        Args:
            ahead: 1: the one that chooses the token after the next.
        """
        while len(self._drawn) <= ahead:
            self._drawn.append(torch.rand(1, dtype=torch.float64, generator=self.generator, device="cpu"))
        return self._drawn[ahead]

    def updated_counts(self) -> TokenCounts:
        """`counts`, up to the last generated token; for a sequence that has them."""
        assert self.counts is not None
        self.counts.update(self.tokens[self.num_prompt_tokens :])
        return self.counts

    def decode(self, token: int) -> str | None:
        """A token's text alone; None without a tokenizer."""
        return None if self._text is None else self._text.decode_token(token)

    def shown_logprobs(self) -> list[dict[int, Logprob]] | None:
        """`logprobs` by token id, as a caller sees them; each is put into that form once. Not to be changed."""
        if self.logprobs is None:
            return None
        for found in self.logprobs[len(self._shown) :]:
            self._shown.append(found.as_dict(self.decode))
        return self._shown

    def accept(self, token: int) -> None:
        """Add a generated token and see whether it ends the sequence."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.tokens.append(token)
        if self._drawn:
            self._drawn.popleft()
        if self._stops_at(token):
            self.finish("stop")
        elif len(self.tokens) >= self.max_length:
            self.finish("length")

    def _stops_at(self, token: int) -> bool:
        """Add the last token to the text and say whether it is a stop token or completes a stop string."""
        may_stop = self._may_stop
        stops = may_stop and token in self._stop_token_ids
        if self._text is None or (stops and not self.params.include_stop_str_in_output):
            return stops
        return self._text.push(token, may_stop=may_stop) or stops

    @property
    def _may_stop(self) -> bool:
        return self.num_generated > self.params.min_tokens

    def finish(self, reason: FinishReason) -> None:
        """End the sequence and release the text held back so far."""
        self.finished_at = time.perf_counter()
        try:
            if (
                self._text is not None
                # whether its last characters completed a stop string
                and self._text.close(cut_off=reason != "stop", may_stop=self._may_stop)
                and reason == "length"
            ):
                reason = "stop"
        finally:
            self.finish_reason = reason


def _seeded_generator(params: SamplingParams, index: int) -> torch.Generator | None:
    if params.temperature == 0:
        return None
    seed = params.seed
    seed = int(torch.randint(2**63 - 1, (), device="cpu").item()) if seed is None else seed + index
    return torch.Generator().manual_seed(seed)
