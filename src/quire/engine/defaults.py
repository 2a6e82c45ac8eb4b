"""What a model's generation_config says of the fields of SamplingParams that a caller left unset."""

from __future__ import annotations

import logging
from typing import Any

from quire.engine.params import UNSET, SamplingParams
from quire.errors import ArgumentError

logger = logging.getLogger("quire")

# A number of likeliest tokens that transformers takes where a generation_config samples and names none.
TRANSFORMERS_TOP_K = 50

# Fields of a generation_config that choose tokens and that SamplingParams has no field for, with what changes nothing.
_NOT_APPLIED: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "penalty_alpha": None,
    "stop_strings": None,
    "watermarking_config": None,
}


def fill_from(config: Any, params: SamplingParams, num_prompt_tokens: int) -> tuple[SamplingParams, bool]:
    """Parameters with no field left unset, as `model.generate` would take them.

    Args:
        config: a transformers GenerationConfig, read anew for each request; None: there is none.
    Returns:
        The parameters, and whether max_tokens is the config's: a length that the caller did not ask for, which
        gives way to the pool.
    Raises:
        ArgumentError: a value of the config that SamplingParams refuses, or a prompt that leaves nothing of the
            config's max_length.
    """
    if config is None:
        return params.with_defaults(), False
    defaults = _choice(config)
    if params.min_tokens is UNSET:
        defaults |= _least(config, num_prompt_tokens)
    if params.max_tokens is UNSET:
        defaults |= _most(config, num_prompt_tokens)
    most = params.max_tokens if params.max_tokens is not UNSET else defaults.get("max_tokens")
    if most is not None and "min_tokens" in defaults:  # what the caller gave, or the shorter length, wins
        defaults["min_tokens"] = min(defaults["min_tokens"], most)
    is_from_config = params.max_tokens is UNSET and "max_tokens" in defaults
    if not any(getattr(params, name) is UNSET for name in defaults):
        return params.with_defaults(), is_from_config
    try:
        return params.with_defaults(defaults), is_from_config
    except ArgumentError as error:
        raise ArgumentError(
            f"{error} (what is unset in SamplingParams is the generation_config's)"
        ) from error


def warn_of_what_is_not_applied(config: Any) -> None:
    """Log a warning that names what a generation_config asks for and SamplingParams cannot say."""
    asked = {
        name: value
        for name, neutral in _NOT_APPLIED.items()
        if (value := getattr(config, name, None)) is not None and value != neutral and value != []
    }
    if asked:
        logger.warning(
            "the model's generation_config asks for %s, which Quire does not apply: texts may differ from "
            "model.generate's. Fix: SamplingParams.logits_processors, or llm.beam_search for num_beams",
            ", ".join(f"{name}={value!r:.40}" for name, value in asked.items()),
        )


def _choice(config: Any) -> dict[str, Any]:
    """How a token is chosen: greedily, whatever else is named, unless the config says do_sample."""
    is_sampling = bool(getattr(config, "do_sample", False))
    defaults = _named(config, "top_k", "top_p", "min_p", "repetition_penalty")
    if is_sampling:
        defaults = (
            {"temperature": 1.0, "top_k": TRANSFORMERS_TOP_K} | _named(config, "temperature") | defaults
        )
    return defaults


def _least(config: Any, num_prompt_tokens: int) -> dict[str, int]:
    named = _named(config, "min_new_tokens", "min_length")
    if "min_new_tokens" in named:
        return {"min_tokens": named["min_new_tokens"]}
    return {"min_tokens": max(named["min_length"] - num_prompt_tokens, 0)} if "min_length" in named else {}


def _most(config: Any, num_prompt_tokens: int) -> dict[str, int]:
    named = _named(config, "max_new_tokens", "max_length")
    if "max_new_tokens" in named:
        return {"max_tokens": named["max_new_tokens"]}
    if "max_length" not in named:
        return {}
    if num_prompt_tokens >= named["max_length"]:
        raise ArgumentError(
            f"prompt must be shorter than {named['max_length']} tokens, the max_length of the model's "
            f"generation_config; got {num_prompt_tokens}. Fix: SamplingParams(max_tokens=64), which wins over it"
        )
    return {"max_tokens": named["max_length"] - num_prompt_tokens}


def _named(config: Any, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}
