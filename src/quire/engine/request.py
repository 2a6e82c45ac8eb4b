"""What a caller asks for, what a request knows while it lives, and what comes back."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from quire.errors import ArgumentError

if TYPE_CHECKING:
    from quire.engine.text import TextStream

FinishReason = Literal["stop", "length", "abort"]


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
    Raises:
        ArgumentError: a value out of range, or a filter that greedy choice would ignore.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 128
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

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
        if not all(isinstance(stop, str) and stop for stop in self.stop_strings):
            raise ArgumentError(
                f"stop must be a non-empty string or several; got {self.stop!r}. "
                "Fix: stop=None for no stop string"
            )
        if not all(_is_int(token) for token in self.stop_token_ids):
            raise ArgumentError(
                f"stop_token_ids must be ints; got {self.stop_token_ids!r}. "
                "Fix: tokenizer.convert_tokens_to_ids"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty for None."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class RequestOutput:
    """One finished request.

    Attributes:
        prompt: the prompt's text; None when token ids were given.
        text: the generated text, without stop string and special tokens.
        token_ids: every generated token, the one that ended the request included.
        finish_reason: "stop" (end-of-text, stop token or stop string), "length" (max_tokens or the
            model's longest sequence), "abort".
        time_to_first_token, seconds: from the request's arrival; time_to_first_token is None when no
            token was generated.
        preemptions: how often the request gave its pages back and was computed again.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    time_to_first_token: float | None
    seconds: float
    preemptions: int


@dataclass(frozen=True)
class Delta:
    """What a request gained since it was last looked at.

    Attributes:
        index: position of the prompt among those of the same `stream` call, else 0.
        text: new text; "" while a character or a possible stop string is incomplete.
        token_ids: new tokens.
        output: the whole result, once the request has finished.
    """

    request_id: int
    index: int
    text: str
    token_ids: list[int]
    output: RequestOutput | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None while it goes on."""
        return None if self.output is None else self.output.finish_reason


class Request:
    """One request on its way: its tokens, how many of them are in pages, and its sampling state.

    Args:
        max_length: most tokens, prompt included, that the request may reach.
        stop_token_ids: all tokens that end it, the model's own included.
        text: turns the tokens into text; None without a tokenizer.
    """

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_length: int,
        stop_token_ids: frozenset[int],
        prompt: str | None = None,
        text: TextStream | None = None,
        index: int = 0,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.prompt = prompt
        self.params = params
        self.tokens = array("q", prompt_token_ids)  # prompt and generated; one buffer, sliced by the runner
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed = 0  # leading tokens whose keys and values are in pages
        self.max_length = max_length
        self.preemptions = 0
        self.finish_reason: FinishReason | None = None
        self.generator = _seeded_generator(params)
        self._stop_token_ids = stop_token_ids
        self._text = text
        self.arrived = time.perf_counter()
        self._first_token_at: float | None = None
        self._finished_at = self.arrived

    @property
    def num_pending(self) -> int:
        """Known tokens not yet computed: the rest of a prompt, or the token just generated."""
        return len(self.tokens) - self.num_computed

    @property
    def text(self) -> str:
        """Text that is certain by now."""
        return "" if self._text is None else self._text.text

    def accept(self, token: int) -> None:
        """Add a generated token and see whether it ends the request."""
        if self._first_token_at is None:
            self._first_token_at = time.perf_counter()
        self.tokens.append(token)
        if token in self._stop_token_ids or (self._text is not None and self._text.push(token)):
            self.finish("stop")
        elif len(self.tokens) >= self.max_length:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the request and release the text held back so far."""
        if self._text is not None:
            completed_stop_string = self._text.close(cut_off=reason != "stop")
            if completed_stop_string and reason == "length":
                reason = "stop"
        self.finish_reason = reason
        self._finished_at = time.perf_counter()

    def delta(self, tokens_seen: int, chars_seen: int) -> Delta:
        """What came after the first tokens_seen tokens and chars_seen characters of text."""
        return Delta(
            request_id=self.request_id,
            index=self.index,
            text=self.text[chars_seen:],
            token_ids=self.tokens[tokens_seen:].tolist(),
            output=None if self.finish_reason is None else self.output(),
        )

    def output(self) -> RequestOutput:
        """The result of a finished request."""
        assert self.finish_reason is not None
        first = self._first_token_at
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.tokens[: self.num_prompt_tokens].tolist(),
            text=self.text,
            token_ids=self.tokens[self.num_prompt_tokens :].tolist(),
            finish_reason=self.finish_reason,
            time_to_first_token=None if first is None else first - self.arrived,
            seconds=self._finished_at - self.arrived,
            preemptions=self.preemptions,
        )


def _seeded_generator(params: SamplingParams) -> torch.Generator | None:
    if params.temperature == 0:
        return None
    seed = int(torch.randint(2**63 - 1, ()).item()) if params.seed is None else params.seed
    return torch.Generator().manual_seed(seed)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
