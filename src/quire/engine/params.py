"""What a caller asks for: how tokens are chosen, and when they end."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from numbers import Integral
from typing import Any, Final, Literal, TypeGuard, TypeVar

import torch

from quire.errors import ArgumentError

T = TypeVar("T")
LogitsProcessor = Callable[..., torch.Tensor]


class Unset(Enum):
    """The value of a field that nobody set. An enum's member stays the same object when it is copied or pickled."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return self.value


UNSET: Final[Any] = Unset.UNSET  # Any: a field keeps the type of the values that a caller may give

# What a field is that neither the caller nor the model's generation_config sets.
OWN_DEFAULTS: Final[Mapping[str, Any]] = {
    "temperature": 0.0,
    "top_k": None,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "max_tokens": 128,
    "min_tokens": 0,
}


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when they end.

    The model's logits of a step become a token in this order:

    1. penalties: repetition, then frequency, then presence;
    2. logit_bias;
    3. logits_processors, in their order;
    4. masks: allowed_token_ids, bad_words, min_tokens. Nothing before them can bring a token back;
    5. temperature 0 takes the likeliest token, whatever min_p, top_k and top_p say. Above 0: temperature, min_p, top_k,
       top_p, and a draw from what is left.

    Names and meaning are vLLM's, some defaults are not. logprobs are those of the model's own distribution, before all
    of this.

    **Defaults.** temperature, top_k, top_p, min_p, repetition_penalty, max_tokens and min_tokens are `unset` unless
    they are given. The model's generation_config then says them, so that `llm.generate(prompt)` chooses tokens as
    `model.generate` does; where it is silent, the default named below holds. A given value always wins, None included.

    Args:
        temperature: 0.0 takes the likeliest token (greedy); above 0 the logits are divided by it and a token is
            drawn. Unset: 0.0, unless the generation_config has do_sample, then its temperature, or 1.0.
        top_k: draw from the k likeliest tokens only; None, 0 or -1: from all. Unset: the generation_config's; where
            that has do_sample and no top_k, 50, as for transformers; else from all.
        top_p: draw from the smallest set of likeliest tokens whose probabilities reach top_p; 1.0: from all.
        seed: makes the draws of this request repeatable, whatever else is in the batch. None takes a
            seed from PyTorch's global generator, so `torch.manual_seed` repeats a whole run.
        max_tokens: most tokens to generate; None: as many as the model's length and the pool allow. Unset: 128, or
            what the generation_config's max_new_tokens or max_length leave, as far as the pool allows.
        stop: a string, or several, at which the text ends; the string itself is cut off.
        stop_token_ids: tokens that end the text, beside the model's own end-of-text tokens.
        ignore_eos: go on past the model's end-of-text tokens.
        min_p: draw from tokens at least min_p times as probable as the likeliest one; 0.0: from all.
        repetition_penalty: above 1, tokens of the prompt and of the generated text become less likely: their logits
            are divided by it where positive, else multiplied; 1.0: nothing.
        presence_penalty: subtracted from the logits of tokens generated before, -2 to 2.
        frequency_penalty: the same times the number of times that the token was generated, -2 to 2.
        min_tokens: nothing ends the text within so many tokens: stop tokens and the model's end-of-text tokens are
            ruled out, stop strings do not count. The first token that may end it is the next one.
        logit_bias: {token id: what is added to its logit}.
        allowed_token_ids: the only tokens that may be chosen; None: all.
        bad_words: texts that must not be generated, as the tokenizer writes them with and without a space before:
            the last token of such a text is ruled out where the others have just been generated.
        logprobs: how many of the likeliest tokens to report for each generated token, beside that token itself;
            -1: all; None: nothing.
        prompt_logprobs: the same for each token of the prompt but the first. The logits of a whole chunk of prompt are
            in memory at once, fp32 [tokens, vocab_size].
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string, or the stop token's text, that ended the text.
        logits_processors: functions (generated token ids, logits) or (prompt token ids, generated token ids, logits)
            that return logits: lists of int and a float32 tensor [vocab_size] on the model's device, which they
            may change. A step that was interrupted calls them again with the same tokens. What one raises ends
            its request alone and is raised to the request's caller. They run inside the step: all requests wait.
        n: how many samples of the prompt to draw, `RequestOutput.outputs`. The prompt is computed once and its pages
            are stored once. Each sample draws from its own generator: sample i draws what a request with n=1 and
            seed + i draws, so sample 0 draws what it would alone. Without a seed each takes one from PyTorch's global
            generator, in their order. With temperature 0 it must be 1, as for vLLM: all samples would be the same.
        cache_salt: a secret of a tenant: a prompt finds only pages of requests with the same salt, so that nobody
            can time another tenant's prompts; None: pages of all requests without one.
    Raises:
        ArgumentError: a value out of range or of the wrong type.
    """

    temperature: float = UNSET
    top_k: int | None = UNSET
    top_p: float = UNSET
    seed: int | None = None
    max_tokens: int | None = UNSET
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_p: float = UNSET
    repetition_penalty: float = UNSET
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = UNSET
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Collection[int] | None = None
    bad_words: Sequence[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logits_processors: Sequence[LogitsProcessor] | None = None
    cache_salt: str | None = None
    n: int = 1

    def __post_init__(self) -> None:
        if self.temperature is not UNSET and not (
            _is_number(self.temperature) and 0 <= self.temperature < math.inf
        ):
            raise ArgumentError(
                f"temperature must be a finite number of at least 0; got {self.temperature!r}. "
                "Fix: temperature=0.0 for the likeliest token, 1.0 for the model's own distribution"
            )
        if not (_is_int(self.n) and self.n >= 1):
            raise ArgumentError(f"n must be an int of at least 1; got {self.n!r}. Fix: n=1 for one sample")
        if self.n > 1 and self.temperature == 0:  # an unset one is known with the model's generation_config
            raise ArgumentError(
                f"n must be 1 with temperature 0, where all samples are the same; got {self.n}. "
                "Fix: temperature=1.0, or n=1"
            )
        if _is_given(self.top_k) and not (_is_int(self.top_k) and self.top_k >= -1):
            raise ArgumentError(
                f"top_k must be None or an int of at least 1 (0 and -1: all); got {self.top_k!r}. "
                "Fix: top_k=None draws from all tokens"
            )
        if self.top_p is not UNSET and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ArgumentError(
                f"top_p must be above 0 and at most 1; got {self.top_p!r}. "
                "Fix: top_p=1.0 draws from all tokens"
            )
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed < 2**63):
            raise ArgumentError(
                f"seed must be None or an int from 0 to 2**63 - 1; got {self.seed!r}. Fix: seed=0"
            )
        if _is_given(self.max_tokens) and not (_is_int(self.max_tokens) and self.max_tokens >= 1):
            raise ArgumentError(
                f"max_tokens must be None or an int of at least 1; got {self.max_tokens!r}. Fix: max_tokens=1"
            )
        self._check_logits_numbers()
        self._check_logits_lists()
        self._check_what_is_shown()
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

    def with_defaults(self, defaults: Mapping[str, Any] = OWN_DEFAULTS) -> SamplingParams:
        """The same with no field left unset: those that are take these values, or else Quire's own.

        Args:
            defaults: by the names of fields; of those that may be unset.
        Raises:
            ArgumentError: n above 1 where the temperature becomes 0, or a default that is out of range.
        """
        taken = {
            name: defaults.get(name, own)
            for name, own in OWN_DEFAULTS.items()
            if getattr(self, name) is UNSET
        }
        return replace(self, **taken) if taken else self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty for None."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _check_logits_numbers(self) -> None:
        if self.min_p is not UNSET and not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ArgumentError(
                f"min_p must be from 0 to 1; got {self.min_p!r}. Fix: min_p=0.0 draws from all tokens"
            )
        if self.repetition_penalty is not UNSET and not (
            _is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf
        ):
            raise ArgumentError(
                f"repetition_penalty must be a finite number above 0; got {self.repetition_penalty!r}. "
                "Fix: repetition_penalty=1.0 for none"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not (_is_number(value) and -2 <= value <= 2):
                raise ArgumentError(f"{name} must be from -2 to 2; got {value!r}. Fix: {name}=0.0 for none")
        if self.min_tokens is UNSET:
            return
        if not (_is_int(self.min_tokens) and self.min_tokens >= 0):
            raise ArgumentError(
                f"min_tokens must be an int of at least 0; got {self.min_tokens!r}. Fix: min_tokens=0"
            )
        if _is_given(self.max_tokens) and self.min_tokens > self.max_tokens:
            raise ArgumentError(
                f"min_tokens must be at most max_tokens, {self.max_tokens}; got {self.min_tokens}. "
                "Fix: a larger max_tokens"
            )

    def _check_logits_lists(self) -> None:
        bias = {} if self.logit_bias is None else self.logit_bias
        if not (
            isinstance(bias, Mapping)
            and all(is_token_id(token) for token in bias)
            and all(_is_number(value) and math.isfinite(value) for value in bias.values())
        ):
            raise ArgumentError(
                f"logit_bias must be a dict of token ids to finite numbers; got {bias!r:.60}. "
                "Fix: {token_id: -100.0}; allowed_token_ids and bad_words rule tokens out"
            )
        allowed = self.allowed_token_ids
        if allowed is not None and not (
            _is_collection(allowed) and len(allowed) and all(map(is_token_id, allowed))
        ):
            raise ArgumentError(
                f"allowed_token_ids must be None or a list of at least one int; got {allowed!r:.60}. "
                "Fix: None allows all"
            )
        words = () if self.bad_words is None else self.bad_words
        if not (_is_collection(words) and all(map(_is_text, words))):
            raise ArgumentError(
                f"bad_words must be None or a list of non-empty strings; got {words!r:.60}. Fix: bad_words=['word']"
            )
        processors = () if self.logits_processors is None else self.logits_processors
        if not (_is_collection(processors) and all(map(callable, processors))):
            raise ArgumentError(
                f"logits_processors must be None or a list of functions; got {processors!r:.60}. "
                "Fix: logits_processors=[function]"
            )
        for processor in processors:
            takes_prompt(processor)

    def _check_what_is_shown(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not (_is_int(value) and value >= -1):
                raise ArgumentError(
                    f"{name} must be None or an int of at least 0, or -1 for all tokens; got {value!r}. "
                    f"Fix: {name}=1"
                )
        for name in ("skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name} must be a bool; got {getattr(self, name)!r}. Fix: {name}=True")


@dataclass(frozen=True)
class BeamSearchParams:
    """How the likeliest texts of a prompt are searched, as transformers' `generate` does with num_beams.

    In every step each of beam_width texts, the beams, is continued by every token, and the best beam_width of all
    continuations go on. A text ends with an end-of-text token of the model, or at max_tokens. It counts if it is
    one of the best beam_width continuations of its step. The best beam_width of those that count come back, ordered by
    score: the sum of the tokens' logprobs, divided by the number of tokens to the power of length_penalty.

    Args:
        beam_width: how many texts are followed, and how many come back; fewer where the model has fewer. With 1
            it is greedy search.
        max_tokens: most tokens to generate.
        length_penalty: above 0 long texts are preferred, below 0 short ones; from -50 to 50.
        early_stopping: when the search ends before max_tokens. True: once beam_width texts have ended. False: once,
            besides, the best beam scores no better than the worst of them by its present length. "never": once it
            can score no better at any length.
    Raises:
        ArgumentError: a value out of range or of the wrong type.
    """

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if not (_is_int(value) and value >= 1):
                raise ArgumentError(f"{name} must be an int of at least 1; got {value!r}. Fix: {name}=4")
        if not (_is_number(self.length_penalty) and -50 <= self.length_penalty <= 50):
            raise ArgumentError(
                f"length_penalty must be from -50 to 50; got {self.length_penalty!r}. "
                "Fix: 1.0 compares texts by their mean logprob, 0.0 by the sum"
            )
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ArgumentError(
                f"early_stopping must be True, False or 'never'; got {self.early_stopping!r}. "
                "Fix: early_stopping=False"
            )


def is_token_id(value: object) -> bool:
    """An int, also one of NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def takes_prompt(processor: LogitsProcessor) -> bool:
    """Whether a logits processor takes the prompt's tokens before the generated ones and the logits.

    Raises:
        ArgumentError: it takes neither two arguments nor three.
    """
    try:
        signature = inspect.signature(processor)
    except (TypeError, ValueError):  # compiled code may not tell
        return False
    for arguments in (2, 3):
        try:
            signature.bind(*[None] * arguments)
        except TypeError:
            continue
        return arguments == 3
    raise ArgumentError(
        "logits_processors must take (generated token ids, logits), or the prompt's token ids before them; got "
        f"{processor!r:.60} with parameters {signature}. Fix: def processor(token_ids, logits): return logits"
    )


def _is_given(value: T | None) -> TypeGuard[T]:
    return value is not None and value is not UNSET


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_collection(values: object) -> bool:
    """Several values, which can be read more than once."""
    return isinstance(values, Collection) and not isinstance(values, (str, bytes, Mapping))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
