"""How a token is drawn, for all rows at once."""

from __future__ import annotations

import math
from collections import abc

import torch

from quire.engine.logits import change_logits
from quire.engine.params import SamplingParams
from quire.engine.sequence import Sequence
from quire.errors import ArgumentError
from quire.hf.transfer import to_device, to_list

_FIRST_RANKS = 128  # how deep to sort for top_p at first
_NONE_LEFT = -1  # in place of a token


def sample(logits: torch.Tensor, sequences: abc.Sequence[Sequence]) -> list[int | Exception]:
    """Choose the next token of each sequence as its parameters say; their order stands in SamplingParams.

    A sequence that draws takes exactly one number per token from its own generator, and no row is mixed with
    another: its tokens depend on its logits and its seed only, not on the batch it is in. Tokens that
    tie at the edge of top-k or top-p all stay, so that the draw does not depend on how a sort breaks ties.

    Args:
        logits: fp32 [len(sequences), vocab_size], on any device; not changed.
        sequences: whose logits these are, row by row.
    Returns:
        A token id for each row, or what ends its request: what its logits_processors raised, or an ArgumentError where
        its rules leave no token. Greedy ties go to the token `torch.argmax` takes.
    Cost: greedy rows one pass; rows that draw a softmax and a cumulative sum; of these, rows with
        top_k or top_p a partial sort as deep as they reach; rows with rules a copy, and what `change_logits` costs. One
        host sync, with top_p one or a few more.
    Source: top-k, arXiv:1805.04833 §5.4; top-p (nucleus), arXiv:1904.09751 §3.1; min-p, arXiv:2407.01082 §3.
    """
    ruled = [row for row, sequence in enumerate(sequences) if sequence.rules is not None]
    if not ruled:
        return to_list(choose(logits, sequences))
    rows = _on_device(ruled, logits)
    changed, their_sequences = logits[rows], [sequences[row] for row in ruled]
    failures = change_logits(changed, their_sequences)
    tokens = _choose(changed, their_sequences, _drawing(their_sequences))
    tokens[~(changed.amax(dim=-1) > -torch.inf)] = _NONE_LEFT  # also a row of NaN
    if len(ruled) < len(sequences):
        drawing = [row for row in _drawing(sequences) if sequences[row].rules is None]
        of_all = _choose(logits, sequences, drawing)
        of_all[rows] = tokens
        tokens = of_all
    choices: list[int | Exception] = to_list(tokens)
    for place, row in enumerate(ruled):
        if place in failures:
            choices[row] = failures[place]
        elif choices[row] == _NONE_LEFT:
            choices[row] = ArgumentError(
                "allowed_token_ids, bad_words, min_tokens and logits_processors must leave a token to choose; got "
                f"none after {sequences[row].num_generated} generated tokens. Fix: rule out less"
            )
    return choices


def _drawing(sequences: abc.Sequence[Sequence]) -> list[int]:
    return [row for row, sequence in enumerate(sequences) if sequence.generator is not None]


def choose(logits: torch.Tensor, sequences: abc.Sequence[Sequence], ahead: int = 0) -> torch.Tensor:
    """The next token of each sequence, int64 [rows] on the logits' device, as `sample` chooses it.

    Args:
        sequences: all without rules.
        ahead: 1: the token after the next, where that one is chosen and not accepted yet.
    Cost: as `sample`, without the host sync but for top_p.
    """
    return _choose(logits, sequences, _drawing(sequences), ahead)


def _choose(
    logits: torch.Tensor, sequences: abc.Sequence[Sequence], drawing: abc.Sequence[int], ahead: int = 0
) -> torch.Tensor:
    """int64 [rows], from logits that are final: drawn in the rows `drawing`, else the likeliest."""
    if len(drawing) == len(sequences):
        return _draw(logits, sequences, ahead)
    tokens = logits.argmax(dim=-1)
    if drawing:
        rows = _on_device(drawing, logits)
        tokens[rows] = _draw(logits[rows], [sequences[row] for row in drawing], ahead)
    return tokens


def _draw(logits: torch.Tensor, sequences: abc.Sequence[Sequence], ahead: int) -> torch.Tensor:
    probabilities = _probabilities(logits, [sequence.params for sequence in sequences])
    # u is uniform in [0, total mass): the token drawn is the first whose cumulative mass exceeds u.
    mass = probabilities.double().cumsum(dim=-1)
    uniform = torch.cat([sequence.draw(ahead) for sequence in sequences])
    u = to_device(uniform, mass.device)[:, None] * mass[:, -1:]
    last_possible = (mass < mass[:, -1:]).sum(dim=-1, keepdim=True)  # where rounding must not go beyond
    return torch.searchsorted(mass, u, right=True).minimum(last_possible).squeeze(-1)


def _probabilities(logits: torch.Tensor, params: abc.Sequence[SamplingParams]) -> torch.Tensor:
    """What a token is drawn from, fp32 [rows, vocab_size]: 0 where a filter rules it out; rows sum to at most 1."""
    least = torch.finfo(logits.dtype).tiny  # what is smaller would be 0 in this dtype
    temperature = _column([max(p.temperature, least) for p in params], logits)
    # The maximum goes first: it becomes 0, and dividing by a tiny temperature cannot overflow to +inf.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return _keep_top_p(_keep_top_k(_keep_min_p(scores, params), params).softmax(dim=-1), params)


def _keep_min_p(scores: torch.Tensor, params: abc.Sequence[SamplingParams]) -> torch.Tensor:
    """Rule out what is less than min_p times as probable as the likeliest token, whose score is 0."""
    if not any(p.min_p for p in params):
        return scores
    lowest = _column([math.log(p.min_p) if p.min_p else -math.inf for p in params], scores)
    return scores.masked_fill(scores < lowest, -torch.inf)


def _keep_top_k(scores: torch.Tensor, params: abc.Sequence[SamplingParams]) -> torch.Tensor:
    """Rule out what scores below the k-th likeliest token of its row; ties with that one stay."""
    vocab_size = scores.shape[-1]
    ks = [min(p.top_k, vocab_size) if p.top_k is not None and p.top_k > 0 else vocab_size for p in params]
    filtered = [row for row, k in enumerate(ks) if k < vocab_size]
    if not filtered:
        return scores
    rows = _on_device(filtered, scores)
    ranked = scores[rows].topk(max(ks[row] for row in filtered), dim=-1).values
    lowest = torch.full_like(scores[:, :1], -torch.inf)
    lowest[rows] = ranked.gather(-1, _on_device([ks[row] - 1 for row in filtered], scores)[:, None])
    return scores.masked_fill(scores < lowest, -torch.inf)


def _keep_top_p(probabilities: torch.Tensor, params: abc.Sequence[SamplingParams]) -> torch.Tensor:
    """Rule out what is less likely than the last token needed to reach top_p; ties with that one stay."""
    filtered = [row for row, p in enumerate(params) if p.top_p < 1]
    if not filtered:
        return probabilities
    rows = _on_device(filtered, probabilities)
    top_p = _column([params[row].top_p for row in filtered], probabilities).double()
    ranked, mass = _likeliest_that_reach(top_p, probabilities[rows])
    # A token is needed if those likelier than it do not reach top_p; so the likeliest always is.
    needed = mass - ranked < top_p
    lowest = torch.zeros_like(probabilities[:, :1])
    lowest[rows] = ranked.gather(-1, needed.sum(dim=-1, keepdim=True).clamp(min=1) - 1)
    return probabilities.masked_fill(probabilities < lowest, 0)


def _likeliest_that_reach(
    top_p: torch.Tensor, probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first columns of the sorted rows, at least to where each reaches top_p, and their cumulative mass.

    A language model's mass sits in few tokens: the ranks beyond them are not worth sorting a vocabulary for.
    """
    vocab_size = probabilities.shape[-1]
    num_ranks = _FIRST_RANKS
    while True:
        ranked = probabilities.topk(min(num_ranks, vocab_size), dim=-1).values
        mass = ranked.double().cumsum(dim=-1)
        if num_ranks >= vocab_size or bool((mass[:, -1:] >= top_p).all()):
            return ranked, mass
        num_ranks *= 16


def _column(values: abc.Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)[:, None]


def _on_device(rows: abc.Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(rows), like.device)
