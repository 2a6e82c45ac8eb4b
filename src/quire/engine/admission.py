"""Which prompts can be served at all: checked once, before a request exists."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quire.engine.request import SamplingParams
from quire.errors import ArgumentError

if TYPE_CHECKING:
    from quire.hf import PagedModel


def check_prompt(prompt: str | Sequence[int], token_ids: Sequence[int], model: PagedModel) -> None:
    """Refuse a prompt the model could not read.

    Args:
        prompt: as the caller gave it; empty text is empty, also where a tokenizer would add a token to it.
        token_ids: the prompt's tokens.
    Raises:
        ArgumentError: no tokens, something that is no token id, or no room for a token after it.
    """
    if len(prompt) == 0 or len(token_ids) == 0:
        raise ArgumentError(
            f"prompt must not be empty; got {prompt!r}. "
            "Fix: give some text, or the id of the token the model begins with"
        )
    if not all(isinstance(token, int) for token in token_ids):
        raise ArgumentError(
            f"prompt must be text or a list of int token ids; got {token_ids!r:.60}. "
            "Fix: tokenizer(text)['input_ids']"
        )
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= model.vocab_size:
        raise ArgumentError(
            f"prompt token ids must be from 0 to {model.vocab_size - 1}; got {low if low < 0 else high}. "
            "Fix: use the tokenizer that belongs to this model"
        )
    if model.max_seq_len is not None and len(token_ids) >= model.max_seq_len:
        raise ArgumentError(
            f"prompt must be shorter than the model's {model.max_seq_len} tokens; got {len(token_ids)}. "
            "Fix: shorten the prompt"
        )


def max_length(num_prompt_tokens: int, params: SamplingParams, model: PagedModel) -> int:
    """Most tokens a request may reach, its prompt included.

    The last token is handed out but never computed, so it needs no slot.

    Raises:
        ArgumentError: the request would not fit the whole pool even if it were alone.
    """
    num_slots = model.num_pages * model.page_size
    longest = sys.maxsize if model.max_seq_len is None else model.max_seq_len
    if params.max_tokens is not None:
        longest = min(longest, num_prompt_tokens + params.max_tokens)
    else:
        longest = max(min(longest, num_slots + 1), num_prompt_tokens + 1)
    pages = -(-(longest - 1) // model.page_size)
    if pages > model.num_pages:
        raise ArgumentError(
            f"prompt of {num_prompt_tokens} tokens plus {longest - num_prompt_tokens} to generate must fit "
            f"the pool; got a need of {pages} pages of {model.page_size} tokens, the pool has "
            f"{model.num_pages}. "
            "Fix: a shorter prompt, a smaller max_tokens, or more memory for pages"
        )
    return longest
