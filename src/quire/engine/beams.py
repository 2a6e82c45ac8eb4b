"""Beam search: the likeliest texts of a prompt, found by following several at once."""

from __future__ import annotations

import math
import time
from array import array
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.params import BeamSearchParams, SamplingParams
from quire.engine.request import CompletionOutput, Request, RequestOutput
from quire.engine.sequence import FinishReason, Sequence
from quire.engine.text import TextStream
from quire.errors import ArgumentError

_ROWS_AT_ONCE = 64  # rows of a vocabulary that are normalised together


class Candidates(NamedTuple):
    """The likeliest tokens after a beam, from the likeliest down: int64 and float32 [k]."""

    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]


def candidates_of(logits: torch.Tensor, ks: abc.Sequence[int]) -> list[Candidates]:
    """The ks[i] likeliest tokens of each row; a row's answer is the same in any batch.

    Args:
        logits: fp32 [len(ks), vocab_size], on any device; not changed.
    Cost: a softmax and a partial sort per row; two copies to the host for every 64 rows and each different k.
    """
    found: list[Candidates | None] = [None] * len(ks)
    for start in range(0, len(ks), _ROWS_AT_ONCE):
        some = ks[start : start + _ROWS_AT_ONCE]
        logprobs = logits[start : start + _ROWS_AT_ONCE].log_softmax(dim=-1)
        for k in set(some):  # each by itself: which of tied tokens are among k depends on k
            rows = [row for row, its_k in enumerate(some) if its_k == k]
            of_k = logprobs if len(rows) == len(some) else logprobs[rows]
            values, tokens = of_k.topk(min(k, logits.shape[-1]), dim=-1)
            for row, *likeliest in zip(rows, tokens.cpu().numpy(), values.cpu().numpy(), strict=True):
                found[start + row] = Candidates(*likeliest)
    return [each for each in found if each is not None]


class Beam(Sequence):
    """A text that may still become longer.

    Attributes:
        cumulative_logprob: the sum of its generated tokens' logprobs, rounded to float32 at each of them.
        candidates: what may come next; known once all of its tokens are computed.
    """

    cumulative_logprob: float = 0.0
    candidates: Candidates | None = None

    def followed_by(self, token: int, cumulative_logprob: float, seq_id: int) -> Beam:
        """This text and a token, in pages that hold what this one has computed."""
        longer = Beam(
            seq_id, self.tokens, self.params, max_length=self.max_length, stop_token_ids=frozenset()
        )
        longer.num_prompt_tokens = self.num_prompt_tokens
        longer.tokens.append(token)
        longer.num_computed = self.num_computed
        longer.prefix = self.prefix
        longer.cumulative_logprob = cumulative_logprob
        return longer


@dataclass(frozen=True)
class Hypothesis:
    """A text that has ended: its generated tokens, their logprobs' sum, and the score by which it is compared."""

    tokens: array[int]
    cumulative_logprob: float
    score: float
    finish_reason: FinishReason


class Generation(NamedTuple):
    """All texts of one length, and those that ended before.

    beams: the best one first; empty when the search has ended.
    hypotheses: the best one first, at most beam_width.
    outputs: what the caller gets; None until the search has ended.
    """

    beams: list[Beam]
    hypotheses: list[Hypothesis]
    outputs: list[CompletionOutput] | None = None


class Regrouping(NamedTuple):
    """What the next generation asks of pages.

    forks: (parent, child): the child begins with the pages of the parent, which goes on too or is in `ended`.
    ended: whose pages are given back, after the forks.
    """

    generation: Generation
    forks: list[tuple[Beam, Beam]]
    ended: list[Beam]


class BeamRequest(Request):
    """A prompt whose likeliest texts are searched. All its sequences, the beams, have the same length.

    It begins with one sequence. When the last tokens of all beams are computed, `regroup` says which of their
    continuations go on. Beams, and what has ended, change together in one assignment, so that an
    interruption leaves the old generation or the new one.

    Args:
        first: the prompt.
        params: what the caller asks for.
        eos_token_ids: tokens that end a text.
        new_seq_id: names for further beams in the page table.
        make_text: what turns the tokens of a text into characters; None without a tokenizer.
        prompt, index: as for Request.
    Source: the scores, and when the search ends, are those of transformers' `generate` with num_beams. With a width
        of 1, which is greedy search there, the first text that ends is the last.
    """

    def __init__(
        self,
        first: Beam,
        params: BeamSearchParams,
        *,
        eos_token_ids: abc.Collection[int],
        new_seq_id: Callable[[], int],
        make_text: Callable[[], TextStream | None],
        prompt: str | None = None,
        index: int = 0,
    ) -> None:
        super().__init__([first], prompt, index)
        self.params = params
        self.generation = Generation([first], [])
        self._prompt_token_ids = first.tokens.tolist()
        self._max_length = first.max_length
        self._eos_token_ids = frozenset(eos_token_ids)
        self._new_seq_id = new_seq_id
        self._make_text = make_text
        self._first_token_at: float | None = None
        self._finished_at = 0.0

    @property
    def sequences(self) -> abc.Sequence[Sequence]:
        """The beams."""
        return self.generation.beams

    @property
    def streamed(self) -> abc.Sequence[Sequence]:
        """None: any of them may be given up."""
        return ()

    @property
    def finished(self) -> bool:
        """Whether the search has ended."""
        return self.generation.outputs is not None

    @property
    def num_to_come(self) -> int:
        """Beams that will be forks of those it has, unless the next token is the last."""
        beams = self.generation.beams
        goes_on = bool(beams) and len(beams[0].tokens) + 1 < self._max_length
        return self.params.beam_width - len(beams) if goes_on else 0

    @property
    def num_candidates(self) -> int:
        """How many tokens after each beam may matter: beam_width that go on, if all that end it are likelier."""
        return self.params.beam_width + len(self._eos_token_ids)

    @property
    def is_ready(self) -> bool:
        """Whether all tokens of all beams are computed."""
        return all(not beam.num_pending for beam in self.generation.beams)

    def regroup(self) -> Regrouping:
        """Choose what follows the beams; changes nothing.

        Raises:
            ArgumentError: the model's logits leave nothing to choose.
        """
        beams = self.generation.beams
        chosen, ended = self._choose(beams)
        hypotheses = _best([*self.generation.hypotheses, *ended], self.params.beam_width)
        if not chosen and not hypotheses:
            raise ArgumentError(
                "logits of a beam search must leave a token to choose; got none that is a number above -inf. "
                "Fix: look for NaN in the model's weights"
            )
        if self._is_over(chosen, hypotheses, beams[0].num_generated + 1):
            return Regrouping(Generation([], hypotheses, self._outputs(hypotheses)), [], [*beams])
        return self._next_generation(beams, chosen, hypotheses)

    def accept(self, generation: Generation) -> None:
        """Go on with what `regroup` has chosen, once the pages are regrouped."""
        now = time.perf_counter()
        if self._first_token_at is None:
            self._first_token_at = now
        if generation.outputs is not None:
            self._finished_at = now
        self.generation = generation

    def abort(self) -> None:
        """End the search with the best of what has ended and of the beams."""
        if self.finished:
            return
        cut = [
            self._hypothesis(beam.tokens[beam.num_prompt_tokens :], beam.cumulative_logprob, "abort")
            for beam in self.generation.beams
        ]
        hypotheses = _best([*self.generation.hypotheses, *cut], self.params.beam_width)
        self._finished_at = time.perf_counter()
        self.generation = Generation([], hypotheses, self._outputs(hypotheses))

    def output(self) -> RequestOutput:
        """The result of a finished search."""
        assert self.generation.outputs is not None
        return self._output(
            self._prompt_token_ids, self.generation.outputs, self._first_token_at, self._finished_at
        )

    def _choose(self, beams: abc.Sequence[Beam]) -> tuple[list[tuple[Beam, int, float]], list[Hypothesis]]:
        """The continuations that go on, (beam, token, cumulative logprob), the best first; and those that end.

        A text that ends counts if it is among the best beam_width of all continuations. At the greatest length all end.
        """
        width = self.params.beam_width
        candidates = [beam.candidates for beam in beams if beam.candidates is not None]
        sums = np.concatenate(
            [
                found.logprobs + np.float32(beam.cumulative_logprob)
                for beam, found in zip(beams, candidates, strict=True)
            ]
        )
        tokens = np.concatenate([found.tokens for found in candidates])
        parents = np.repeat(np.arange(len(beams)), [len(found.tokens) for found in candidates])
        order = np.argsort(-sums, kind="stable")
        is_last = len(beams[0].tokens) + 1 >= self._max_length
        goes_on: list[tuple[Beam, int, float]] = []
        ended: list[Hypothesis] = []
        ranked = zip(sums[order].tolist(), tokens[order].tolist(), parents[order].tolist(), strict=True)
        for rank, (logprob, token, parent) in enumerate(ranked):
            if not logprob > -np.inf or (rank >= width and (is_last or len(goes_on) == width)):
                break
            is_eos = token in self._eos_token_ids
            if is_eos or is_last:
                if rank < width:
                    beam = beams[parent]
                    generated = beam.tokens[beam.num_prompt_tokens :]
                    generated.append(token)
                    ended.append(self._hypothesis(generated, logprob, "stop" if is_eos else "length"))
            elif len(goes_on) < width:
                goes_on.append((beams[parent], token, logprob))
        return goes_on, ended

    def _is_over(
        self,
        chosen: abc.Sequence[tuple[Beam, int, float]],
        hypotheses: abc.Sequence[Hypothesis],
        num_generated: int,
    ) -> bool:
        """Whether no beam can become better than what has ended, as early_stopping counts."""
        params = self.params
        if not chosen:
            return True
        if len(hypotheses) < params.beam_width:
            return False
        if params.early_stopping is True or params.beam_width == 1:
            return True
        longest = params.early_stopping == "never" and params.length_penalty > 0
        length = self._max_length - len(self._prompt_token_ids) if longest else num_generated
        return not self._score(chosen[0][2], length) > hypotheses[-1].score

    def _next_generation(
        self,
        beams: abc.Sequence[Beam],
        chosen: abc.Sequence[tuple[Beam, int, float]],
        hypotheses: list[Hypothesis],
    ) -> Regrouping:
        """The first continuation of a beam keeps its pages; each further one begins as a fork."""
        longer: list[Beam] = []
        forks: list[tuple[Beam, Beam]] = []
        kept: set[int] = set()
        for beam, token, logprob in chosen:
            if beam.seq_id not in kept:
                kept.add(beam.seq_id)
                longer.append(beam.followed_by(token, logprob, beam.seq_id))
            else:
                longer.append(beam.followed_by(token, logprob, self._new_seq_id()))
                forks.append((beam, longer[-1]))
        ended = [beam for beam in beams if beam.seq_id not in kept]
        return Regrouping(Generation(longer, hypotheses), forks, ended)

    def _hypothesis(self, tokens: array[int], logprob: float, reason: FinishReason) -> Hypothesis:
        return Hypothesis(tokens, logprob, self._score(logprob, len(tokens)), reason)

    def _score(self, logprob: float, num_tokens: int) -> float:
        return logprob / math.pow(max(num_tokens, 1), self.params.length_penalty)

    def _outputs(self, hypotheses: abc.Sequence[Hypothesis]) -> list[CompletionOutput]:
        return [
            CompletionOutput(
                index,
                self._text_of(each),
                each.tokens.tolist(),
                each.finish_reason,
                cumulative_logprob=each.cumulative_logprob,
                score=each.score,
            )
            for index, each in enumerate(hypotheses)
        ]

    def _text_of(self, hypothesis: Hypothesis) -> str:
        text = self._make_text()
        if text is None:
            return ""
        stopped = hypothesis.finish_reason == "stop"
        for token in hypothesis.tokens[: -1 if stopped else None]:
            text.push(token)
        text.close(cut_off=not stopped)
        return text.text


def add_candidates(logits: torch.Tensor, beams: abc.Sequence[tuple[int, BeamRequest, Beam]]) -> None:
    """Give beams the tokens that may follow them, each from its row of the logits: (row, request, beam)."""
    if not beams:
        return
    rows = [row for row, _, _ in beams]
    found = candidates_of(logits[rows], [request.num_candidates for _, request, _ in beams])
    for (_, _, beam), candidates in zip(beams, found, strict=True):
        beam.candidates = candidates


def beam_sampling_params(params: BeamSearchParams) -> SamplingParams:
    """What of a beam search other parts of the engine ask a sequence for."""
    return SamplingParams(max_tokens=params.max_tokens).with_defaults()


def _best(hypotheses: abc.Iterable[Hypothesis], width: int) -> list[Hypothesis]:
    """The best ones, best first; of equally good ones those that came first."""
    return sorted(hypotheses, key=lambda each: -each.score)[:width]
