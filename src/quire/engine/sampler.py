"""Logits to tokens, all rows at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quire.engine.request import Request


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """Choose the next token of each request as its parameters say.

    A request that draws takes exactly one number from its own generator, and no row is mixed with
    another: its tokens depend on its logits and its seed only, not on the batch it is in.

    Args:
        logits: fp32 [len(requests), vocab_size], on any device; not changed.
        requests: whose logits these are, row by row.
    Returns:
        Token ids. Greedy ties go to the token `torch.argmax` takes.
    Cost: greedy rows one pass; rows that draw a softmax and a cumulative sum, and a sort of the
        vocabulary when a row has top_p or only some have top_k. One host sync.
    Source: top-k, arXiv:1805.04833 §5.4; top-p (nucleus), arXiv:1904.09751 §3.1.
    """
    drawing = [row for row, request in enumerate(requests) if request.generator is not None]
    if len(drawing) == len(requests):
        return _draw(logits, requests).tolist()
    tokens = logits.argmax(dim=-1)
    if drawing:
        rows = torch.tensor(drawing, device=logits.device)
        tokens[rows] = _draw(logits[rows], [requests[row] for row in drawing])
    return tokens.tolist()


def _draw(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    params = [request.params for request in requests]
    temperature = _column([p.temperature for p in params], logits)
    # The maximum goes first: it becomes 0, and dividing by a tiny temperature cannot overflow to +inf.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperature

    top_ks = [p.top_k for p in params if p.top_k is not None]
    tokens = None
    if any(p.top_p < 1 for p in params) or 0 < len(top_ks) < len(params):
        scores, tokens = scores.sort(dim=-1, descending=True, stable=True)
    elif top_ks:
        scores, tokens = scores.topk(min(max(top_ks), scores.shape[-1]), dim=-1)
    if top_ks:
        rank = torch.arange(scores.shape[-1], device=scores.device)
        kept = _column([p.top_k or scores.shape[-1] for p in params], rank)
        scores = scores.masked_fill(rank >= kept, -torch.inf)

    probabilities = scores.softmax(dim=-1).double()
    mass = probabilities.cumsum(dim=-1)
    if any(p.top_p < 1 for p in params):
        # A token stays if those likelier than it do not reach top_p; so the likeliest always stays.
        top_p = _column([p.top_p for p in params], mass)
        probabilities = probabilities.masked_fill(mass - probabilities >= top_p, 0)
        mass = probabilities.cumsum(dim=-1)

    # u is uniform in [0, total mass): the token drawn is the first whose cumulative mass exceeds u.
    uniform = torch.cat([torch.rand(1, dtype=torch.float64, generator=r.generator) for r in requests])
    u = uniform.to(mass.device)[:, None] * mass[:, -1:]
    last_possible = (mass < mass[:, -1:]).sum(dim=-1, keepdim=True)  # where rounding must not go beyond
    drawn = torch.searchsorted(mass, u, right=True).minimum(last_possible)
    return (drawn if tokens is None else tokens.gather(-1, drawn)).squeeze(-1)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
