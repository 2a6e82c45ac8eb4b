"""A body → SamplingParams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire.engine import SamplingParams
from quire.engine.params import LogitsProcessor
from quire.errors import ArgumentError
from quire.serve.protocol import ChatBody, CompletionBody

# Fields that are left to the model's generation_config where a body does not name them.
_OF_THE_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens")


def sampling_params(
    body: ChatBody | CompletionBody, processors: Sequence[LogitsProcessor], *, samples: bool
) -> SamplingParams:
    """What a body asks of the engine.

    samples: whether the model's generation_config does where nothing else is said. Else OpenAI's temperature holds.
    No tokens at all, as for the logprobs of a prompt, are asked as one, which the answer leaves out.

    Raises:
        ArgumentError: values that the engine refuses.
    """
    prompt_logprobs = None
    if isinstance(body, ChatBody):
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    else:
        max_tokens = max(body.max_tokens, 1)
        logprobs = body.logprobs
        prompt_logprobs = logprobs if body.echo else None
    named: dict[str, Any] = {} if samples else {"temperature": 1.0}
    named |= {name: value for name in _OF_THE_MODEL if (value := getattr(body, name)) is not None}
    return SamplingParams(
        n=body.n,
        **named,
        seed=None if body.seed is None else body.seed % 2**63,  # OpenAI's may be negative
        max_tokens=max_tokens,
        stop=body.stop or None,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_biases(body) or None,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=body.skip_special_tokens,
        include_stop_str_in_output=body.include_stop_str_in_output,
        cache_salt=body.cache_salt,
        logits_processors=processors or None,
    )


def _biases(body: ChatBody | CompletionBody) -> dict[int, float]:
    biases = {}
    for token, bias in body.logit_bias.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 12):
            raise ArgumentError(
                f"logit_bias must name tokens by their ids; got {token!r:.60}. Fix: {{'1234': -100}}"
            )
        biases[int(token)] = bias
    return biases
