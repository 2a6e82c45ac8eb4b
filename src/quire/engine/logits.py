"""What changes logits before a token is chosen: penalties, bias, a caller's functions and masks."""

from __future__ import annotations

from array import array
from collections import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.params import LogitsProcessor, SamplingParams, takes_prompt
from quire.errors import ArgumentError
from quire.hf.transfer import to_device

if TYPE_CHECKING:
    from quire.engine.sequence import Sequence

Ids = npt.NDArray[np.int64]
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class LogitRules:
    """What a request changes in its logits, made ready once; all its sequences share it.

    Attributes:
        params: what the caller asked for.
        bias_ids, bias: int64 and float32, of equal length.
        allowed: the only tokens that may be chosen; None: all.
        endings: tokens that would end the text, ruled out within params.min_tokens.
        bad_words: texts that must not come up.
        processors: each with whether it takes the prompt's tokens.
    """

    params: SamplingParams
    bias_ids: Ids
    bias: npt.NDArray[np.float32]
    allowed: Ids | None
    endings: Ids
    bad_words: BadWords
    processors: tuple[tuple[LogitsProcessor, bool], ...]

    @property
    def penalises(self) -> bool:
        """Whether any penalty changes anything."""
        params = self.params
        return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def logit_rules(
    params: SamplingParams,
    *,
    ending_ids: abc.Iterable[int],
    bad_words: abc.Iterable[abc.Sequence[int]],
    vocab_size: int,
) -> LogitRules | None:
    """The rules of a request, or None where it changes nothing.

    Tokens outside the vocabulary never come, so there is nothing to rule out.

    Args:
        ending_ids: stop tokens and the model's end-of-text tokens.
        bad_words: token ids of each text that must not come up.
    """
    params = params.with_defaults()  # itself where nothing is unset, as of every request
    bias = dict(params.logit_bias or {})
    endings = sorted({token for token in ending_ids if 0 <= token < vocab_size}) if params.min_tokens else []
    allowed = (
        None
        if params.allowed_token_ids is None
        else np.array(sorted(set(params.allowed_token_ids)), np.int64)
    )
    rules = LogitRules(
        params,
        np.array(list(bias), np.int64),
        np.clip(np.array(list(bias.values()), np.float64), -_LARGEST, _LARGEST).astype(np.float32),
        allowed,
        np.array(endings, np.int64),
        BadWords(word for word in bad_words if word and max(word) < vocab_size),
        tuple((processor, takes_prompt(processor)) for processor in params.logits_processors or ()),
    )
    changes = rules.penalises or bias or endings or rules.bad_words or rules.processors or allowed is not None
    return rules if changes else None


class BadWords:
    """Token sequences that must not be generated: rules their last token out where the others have just come."""

    def __init__(self, words: abc.Iterable[abc.Sequence[int]]) -> None:
        self.single: Ids = np.zeros(0, np.int64)
        self._by_last_of_prefix: dict[int, list[tuple[array[int], int]]] = {}
        single = set()
        for *prefix, last in {tuple(word) for word in words}:
            if prefix:
                self._by_last_of_prefix.setdefault(prefix[-1], []).append((array("q", prefix), last))
            else:
                single.add(last)
        if single:
            self.single = np.array(sorted(single), np.int64)

    def __bool__(self) -> bool:
        return bool(len(self.single) or self._by_last_of_prefix)

    def completions(self, tokens: array[int], num_prompt_tokens: int) -> list[int]:
        """Tokens that would complete a word of several tokens, all of them generated."""
        return [
            last
            for prefix, last in self._by_last_of_prefix.get(tokens[-1], ())
            if len(tokens) - num_prompt_tokens >= len(prefix) and tokens[-len(prefix) :] == prefix
        ]


class TokenCounts:
    """The different tokens of a sequence, and how often each was generated.

    Args:
        prompt: tokens that count as present but not as generated; empty where the prompt does not matter.
    Attributes:
        ids: each token once.
        counts: beside each, how often it was generated.
    """

    def __init__(self, prompt: abc.Iterable[int]) -> None:
        self._prompt = array("q", dict.fromkeys(prompt))
        self._is_whole = False
        self._num_seen = 0

    def update(self, generated: array[int]) -> None:
        """Count what was generated since the last call; the cost is that of the new tokens."""
        if not self._is_whole:  # this is the first update, or the last one was interrupted
            self._clear()
        self._is_whole = False
        for token in generated[self._num_seen :]:
            place = self._places.setdefault(token, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token)
                self.counts.append(0)
            self.counts[place] += 1
        self._num_seen = len(generated)
        self._is_whole = True

    def _clear(self) -> None:
        self.ids = self._prompt[:]
        self.counts = array("q", [0]) * len(self.ids)
        self._places = {token: place for place, token in enumerate(self.ids)}
        self._num_seen = 0


def change_logits(logits: torch.Tensor, sequences: abc.Sequence[Sequence]) -> dict[int, Exception]:
    """Apply each sequence's rules to its row, in the order that SamplingParams gives; a row never sees another.

    Args:
        logits: fp32 [len(sequences), vocab_size], changed in place.
        sequences: all with rules.
    Returns:
        What a row's logits_processors raised, by row; such a row holds anything.
    Cost: O(tokens that the rules name), a pass over the rows, and what logits_processors take. No host sync.
    Source: repetition penalty, arXiv:1909.05858 §4.1.
    """
    _penalise(logits, sequences)
    _add_bias(logits, sequences)
    failures = _run_processors(logits, sequences)
    _mask(logits, sequences)
    logits.clamp_(max=_LARGEST)  # a draw subtracts the maximum, and inf - inf is no number
    return failures


def _penalise(logits: torch.Tensor, sequences: abc.Sequence[Sequence]) -> None:
    rows = [row for row, sequence in enumerate(sequences) if sequence.counts is not None]
    if not rows:
        return
    all_counts = [sequences[row].updated_counts() for row in rows]
    sizes = [len(counts.ids) for counts in all_counts]
    places = _places(logits, rows, [np.array(counts.ids, np.int64) for counts in all_counts])
    counts = torch.from_numpy(np.concatenate([np.array(c.counts, np.float32) for c in all_counts]))
    counts = to_device(counts, logits.device)
    repetition, frequency, presence = (
        to_device(torch.from_numpy(np.repeat(np.array(values, np.float32), sizes)), logits.device)
        for values in zip(*(_penalties(sequences[row].params) for row in rows), strict=True)
    )
    values = logits[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts
    values -= presence * (counts > 0)
    logits[places] = values


def _penalties(params: SamplingParams) -> tuple[float, float, float]:
    return params.repetition_penalty, params.frequency_penalty, params.presence_penalty


def _add_bias(logits: torch.Tensor, sequences: abc.Sequence[Sequence]) -> None:
    biased = [(row, rules) for row, rules in _rules(sequences) if len(rules.bias_ids)]
    if biased:
        places = _places(logits, [row for row, _ in biased], [rules.bias_ids for _, rules in biased])
        bias = torch.from_numpy(np.concatenate([rules.bias for _, rules in biased]))
        logits[places] += to_device(bias, logits.device)


def _run_processors(logits: torch.Tensor, sequences: abc.Sequence[Sequence]) -> dict[int, Exception]:
    failures: dict[int, Exception] = {}
    for row, rules in _rules(sequences):
        if rules.processors:
            try:
                _run_processors_of(sequences[row], rules, logits[row])
            except Exception as error:  # the request's own: the others of the batch go on
                failures[row] = error
    return failures


def _run_processors_of(sequence: Sequence, rules: LogitRules, row: torch.Tensor) -> None:
    prompt = sequence.tokens[: sequence.num_prompt_tokens].tolist()
    generated = sequence.tokens[sequence.num_prompt_tokens :].tolist()
    logits = row
    for processor, with_prompt in rules.processors:
        logits = processor(prompt, generated, logits) if with_prompt else processor(generated, logits)
        if not (
            isinstance(logits, torch.Tensor) and logits.shape == row.shape and logits.is_floating_point()
        ):
            got = (
                f"{logits.dtype} {list(logits.shape)}"
                if isinstance(logits, torch.Tensor)
                else type(logits).__name__
            )
            raise ArgumentError(
                f"logits_processors must return logits, a float tensor [{len(row)}]; got {got} from "
                f"{processor!r:.60}. Fix: return the logits"
            )
    if logits is not row:
        row.copy_(logits)


def _mask(logits: torch.Tensor, sequences: abc.Sequence[Sequence]) -> None:
    allowed = [(row, rules.allowed) for row, rules in _rules(sequences) if rules.allowed is not None]
    if allowed:
        rows = [row for row, _ in allowed]
        places = _places(logits, rows, [ids for _, ids in allowed])
        kept = logits[places]
        logits.index_fill_(0, to_device(torch.tensor(rows), logits.device), -torch.inf)
        logits[places] = kept
    ruled_out = [(row, ids) for row, rules in _rules(sequences) for ids in _ruled_out(sequences[row], rules)]
    if ruled_out:
        logits[_places(logits, [row for row, _ in ruled_out], [ids for _, ids in ruled_out])] = -torch.inf


def _ruled_out(sequence: Sequence, rules: LogitRules) -> list[Ids]:
    ruled_out = []
    if len(rules.endings) and sequence.num_generated < rules.params.min_tokens:
        ruled_out.append(rules.endings)
    if rules.bad_words:
        ruled_out.append(rules.bad_words.single)
        completions = rules.bad_words.completions(sequence.tokens, sequence.num_prompt_tokens)
        ruled_out.append(np.array(completions, np.int64))
    return ruled_out


def _rules(sequences: abc.Sequence[Sequence]) -> list[tuple[int, LogitRules]]:
    return [(row, sequence.rules) for row, sequence in enumerate(sequences) if sequence.rules is not None]


def _places(
    logits: torch.Tensor, rows: abc.Sequence[int], ids: abc.Sequence[Ids]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of some tokens of each row, end to end: [sum of the sizes], twice."""
    sizes = [len(each) for each in ids]
    row_of = torch.from_numpy(np.repeat(np.array(rows, np.int64), sizes))
    return to_device(row_of, logits.device), to_device(torch.from_numpy(np.concatenate(ids)), logits.device)
