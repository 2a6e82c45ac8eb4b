"""How likely tokens were, in the shapes of OpenAI's two APIs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quire.engine import Logprob

_LEAST = -9999.0  # what OpenAI says of a token that could not come; JSON has no infinity


def chat_logprobs(found: Sequence[dict[int, Logprob]], num_top: int) -> dict[str, Any]:
    """Of a chat: each token, and the likeliest ones at its place, from the likeliest down."""
    return {"content": [_chat_token(each, num_top) for each in found]}


def _chat_token(found: dict[int, Logprob], num_top: int) -> dict[str, Any]:
    own = next(iter(found.values()))  # the first is the token itself
    likeliest = sorted(found.values(), key=lambda each: each.rank)[:num_top]
    return {**_chat_entry(own), "top_logprobs": [_chat_entry(each) for each in likeliest]}


def _chat_entry(each: Logprob) -> dict[str, Any]:
    token = each.decoded_token or ""
    # A token of a part of a character is shown with a stand-in, whose bytes are not the token's.
    of_token = None if "\ufffd" in token else list(token.encode())
    return {"token": token, "logprob": max(each.logprob, _LEAST), "bytes": of_token}


class TextLogprobs:
    """Of a completion: lists side by side, with the place of each token in the text.

    Args:
        decode: a token's text alone, for the first token of a prompt, of which no logprob is known.
    """

    def __init__(self, decode: Callable[[int], str]) -> None:
        self._decode = decode
        self._offset = 0

    def next(self, token_ids: Sequence[int], found: Sequence[dict[int, Logprob] | None]) -> dict[str, Any]:
        """The lists of the tokens that follow those of the last call."""
        tokens, logprobs, tops, offsets = [], [], [], []
        for token_id, each in zip(token_ids, found, strict=True):
            own = None if each is None else next(iter(each.values()))
            token = self._decode(token_id) if own is None else own.decoded_token or ""
            tokens.append(token)
            logprobs.append(None if own is None else max(own.logprob, _LEAST))
            tops.append(None if each is None else _by_text(each))
            offsets.append(self._offset)
            self._offset += len(token)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _by_text(found: dict[int, Logprob]) -> dict[str, float]:
    """Several tokens may have one text, as parts of characters have: the likeliest of them stands for all."""
    shown: dict[str, float] = {}
    for each in found.values():
        token = each.decoded_token or ""
        shown[token] = max(each.logprob, shown.get(token, _LEAST))
    return shown
