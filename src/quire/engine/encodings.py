"""What tokenizers, NumPy, torch and vLLM's users hand over as a prompt → text or lists of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from quire.errors import ArgumentError


class Array(Protocol):
    """A NumPy array or a torch tensor of token ids."""

    def tolist(self) -> Any: ...


# What a tokenizer returns of a text beside its ids, and that says nothing to a decoder-only model.
_BESIDE_IDS = {
    "attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping", "length", "overflowing_tokens",
    "num_truncated_tokens",
}  # fmt: skip


def unpacked(prompts: Any) -> Any:
    """Token ids out of an encoding or an array, a list or a list of lists; anything else as it is.

    Tokens that an attention mask rules out are padding, and left out.

    Raises:
        ArgumentError: an encoding that holds more than text, or a mask that is not one of padding.
    """
    if isinstance(prompts, Mapping):
        if "input_ids" in prompts:
            return _ids_of(prompts)
        if set(prompts) in ({"prompt"}, {"prompt_token_ids"}):  # as vLLM's users write them
            [value] = prompts.values()
            return unpacked(value)
    if hasattr(prompts, "tolist") and hasattr(prompts, "ndim"):
        return prompts.tolist()
    return prompts


def unpacked_one(prompt: Any) -> Any:
    """The same of one prompt, also where it is the only row of a batch."""
    plain = unpacked(prompt)
    is_row_alone = isinstance(plain, list) and len(plain) == 1 and isinstance(plain[0], list)
    return plain[0] if plain is not prompt and is_row_alone else plain


def _ids_of(encoding: Mapping[str, Any]) -> Any:
    more = sorted(set(encoding) - _BESIDE_IDS - {"input_ids"})
    if more:
        raise ArgumentError(
            f"a prompt must be text alone; got {', '.join(map(str, more))} beside input_ids. "
            "Fix: encoding['input_ids'], if the model needs no more"
        )
    ids, mask = _plain(encoding["input_ids"]), _plain(encoding.get("attention_mask"))
    if mask is None or not isinstance(ids, list):
        return ids
    try:
        rows = zip(ids, mask, strict=True)
        if ids and isinstance(ids[0], list):
            return [_without_padding(row, of_row) for row, of_row in rows]
        return _without_padding(ids, mask)
    except ArgumentError:
        raise
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            "attention_mask must have the shape of input_ids; got another one. Fix: leave it out if nothing is padded"
        ) from error


def _plain(values: Any) -> Any:
    """Arrays as lists, also those of a list."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return [_plain(value) for value in values] if isinstance(values, (list, tuple)) else values


def _without_padding(ids: list[int], mask: list[int]) -> list[int]:
    kept = [place for place, (_, is_kept) in enumerate(zip(ids, mask, strict=True)) if is_kept]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise ArgumentError(
            "attention_mask must rule out padding alone, before or after a text; got one with a gap. "
            "Fix: leave the tokens of the gap out of input_ids"
        )
    return [ids[place] for place in kept]
