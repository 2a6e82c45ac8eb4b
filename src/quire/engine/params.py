"""What a caller asks for: how tokens are chosen, and when they end."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from quire.errors import ArgumentError


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when they end.

    Args:
        temperature: 0.0, the default, takes the likeliest token (greedy, as `model.generate` does);
            above 0 the logits are divided by it and a token is drawn.
        top_k: draw from the k likeliest tokens only; None: from all.
        top_p: draw from the smallest set of likeliest tokens whose probabilities reach top_p; 1.0: from all.
        seed: makes the draws of this request repeatable, whatever else is in the batch. None takes a
            seed from PyTorch's global generator, so `torch.manual_seed` repeats a whole run.
        max_tokens: most tokens to generate; None: as many as the model's length and the pool allow.
        stop: a string, or several, at which the text ends; the string itself is cut off.
        stop_token_ids: tokens that end the text, beside the model's own end-of-text tokens.
        ignore_eos: go on past the model's end-of-text tokens.
        cache_salt: a secret of a tenant: a prompt finds only pages of requests with the same salt, so that nobody
            can time another tenant's prompts; None: pages of all requests without one.
    Raises:
        ArgumentError: a value out of range or of the wrong type, or a filter that greedy choice would ignore.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 128
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ArgumentError(
                f"temperature must be a finite number of at least 0; got {self.temperature!r}. "
                "Fix: temperature=0.0 for the likeliest token, 1.0 for the model's own distribution"
            )
        if self.top_k is not None and not (_is_int(self.top_k) and self.top_k >= 1):
            raise ArgumentError(
                f"top_k must be None or an int of at least 1; got {self.top_k!r}. "
                "Fix: top_k=None draws from all tokens"
            )
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ArgumentError(
                f"top_p must be above 0 and at most 1; got {self.top_p!r}. "
                "Fix: top_p=1.0 draws from all tokens"
            )
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise ArgumentError(
                f"top_k and top_p must be left out when temperature is 0, which draws nothing; got "
                f"top_k={self.top_k}, top_p={self.top_p}. Fix: temperature=1.0 to draw"
            )
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed < 2**63):
            raise ArgumentError(
                f"seed must be None or an int from 0 to 2**63 - 1; got {self.seed!r}. Fix: seed=0"
            )
        if self.max_tokens is not None and not (_is_int(self.max_tokens) and self.max_tokens >= 1):
            raise ArgumentError(
                f"max_tokens must be None or an int of at least 1; got {self.max_tokens!r}. Fix: max_tokens=1"
            )
        stops = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not (_is_collection(stops) and all(isinstance(stop, str) and stop for stop in stops)):
            raise ArgumentError(
                f"stop must be a non-empty string or several; got {self.stop!r}. "
                "Fix: stop=None for no stop string"
            )
        if not (_is_collection(self.stop_token_ids) and all(map(is_token_id, self.stop_token_ids))):
            raise ArgumentError(
                f"stop_token_ids must be a list of ints; got {self.stop_token_ids!r}. "
                "Fix: [tokenizer.convert_tokens_to_ids(token)]"
            )
        if not isinstance(self.ignore_eos, bool):
            raise ArgumentError(f"ignore_eos must be a bool; got {self.ignore_eos!r}. Fix: ignore_eos=True")
        if self.cache_salt is not None and not (isinstance(self.cache_salt, str) and self.cache_salt):
            raise ArgumentError(
                f"cache_salt must be None or a non-empty string; got {self.cache_salt!r}. "
                "Fix: cache_salt=None for pages that all requests may find"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty for None."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def is_token_id(value: object) -> bool:
    """An int, also one of NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_collection(values: object) -> bool:
    """Several values, which can be read more than once."""
    return isinstance(values, Collection) and not isinstance(values, (str, bytes, Mapping))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
