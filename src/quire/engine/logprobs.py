"""How likely tokens were, by the model's own distribution."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from quire.engine.request import Request
    from quire.engine.scheduler import Chunk
    from quire.engine.sequence import Sequence

_ROWS_AT_ONCE = 64  # rows of a vocabulary that are normalised together: a chunk of prompt has thousands


@dataclass(frozen=True)
class Logprob:
    """How likely a token was.

    Attributes:
        logprob: natural logarithm of its probability under the model, before penalties, temperature and filters.
        rank: 1 for the likeliest; equally likely tokens have the same.
        decoded_token: its text alone; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


class TokenLogprobs(NamedTuple):
    """A token at one position, first, and the likeliest ones there, from the likeliest down."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]

    def as_dict(self, decode: Callable[[int], str | None]) -> dict[int, Logprob]:
        """By token id; the token itself comes first, also where it is among the likeliest."""
        return {
            token: Logprob(logprob, rank, decode(token))
            for token, logprob, rank in zip(self.token_ids, self.logprobs, self.ranks, strict=True)
        }


def logprobs_of_choices(
    logits: torch.Tensor, sequences: abc.Sequence[Sequence], choices: abc.Sequence[int | Exception]
) -> dict[int, TokenLogprobs]:
    """How likely the chosen token was, by row, for the sequences that report it."""
    asked = {
        row: choice
        for row, (sequence, choice) in enumerate(zip(sequences, choices, strict=True))
        if sequence.logprobs is not None and not isinstance(choice, Exception)
    }
    if not asked:
        return {}
    nums = [sequences[row].params.logprobs or 0 for row in asked]
    return dict(zip(asked, token_logprobs(logits[list(asked)], list(asked.values()), nums), strict=True))


def prompt_logprobs(
    logits: torch.Tensor, chunks: abc.Sequence[Chunk]
) -> list[tuple[Request, list[TokenLogprobs]]]:
    """How likely the tokens behind each chunk's `prompt_rows` were, whose logits follow one another."""
    found = []
    for chunk in chunks if len(logits) else ():
        rows = chunk.prompt_rows
        if len(rows):
            start = chunk.sequence.num_computed + 1
            tokens = chunk.sequence.tokens[start + rows.start : start + rows.stop].tolist()
            num = chunk.sequence.params.prompt_logprobs or 0
            found.append((chunk.request, token_logprobs(logits[: len(rows)], tokens, [num] * len(rows))))
            logits = logits[len(rows) :]
    return found


def token_logprobs(
    logits: torch.Tensor, tokens: abc.Sequence[int], nums: abc.Sequence[int]
) -> list[TokenLogprobs]:
    """How likely each row's token was, and which were the likeliest; a row's answer is the same in any batch.

    Args:
        logits: fp32 [rows, vocab_size], on any device; not changed.
        tokens: one per row.
        nums: how many of the likeliest to report, per row; -1: all.
    Cost: a softmax and a partial sort per row, a host sync for every 64 rows and each different num.
    """
    vocab_size = logits.shape[-1]
    ks = [vocab_size if num < 0 else min(num, vocab_size) for num in nums]
    found = []
    for start in range(0, len(tokens), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        # Not logsumexp: PyTorch sums a single row on several threads, and then in another order.
        found += _of_some_rows(logits[rows].log_softmax(dim=-1), tokens[rows], ks[rows])
    return found


def _of_some_rows(
    logprobs: torch.Tensor, tokens: abc.Sequence[int], ks: abc.Sequence[int]
) -> list[TokenLogprobs]:
    own = logprobs.gather(-1, torch.tensor(tokens, device=logprobs.device)[:, None])
    own_ranks = (logprobs > own).sum(dim=-1) + 1
    found = [
        TokenLogprobs([token], [logprob], [rank])
        for token, logprob, rank in zip(tokens, own.squeeze(-1).tolist(), own_ranks.tolist(), strict=True)
    ]
    for k in set(ks) - {0}:  # each by itself: which of tied tokens are among k depends on k
        rows = [row for row, its_k in enumerate(ks) if its_k == k]
        values, ids = (logprobs if len(rows) == len(ks) else logprobs[rows]).topk(k, dim=-1)
        ranks = torch.searchsorted(-values, -values) + 1  # those strictly likelier come before
        for row, *likeliest in zip(rows, ids.tolist(), values.tolist(), ranks.tolist(), strict=True):
            for own_list, others in zip(found[row], likeliest, strict=True):
                own_list += others
    return found
