"""What may come in: prompts and parameters, checked once, before a request exists."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from quire.engine.encodings import Array, unpacked, unpacked_one
from quire.engine.params import BeamSearchParams, SamplingParams, is_token_id
from quire.errors import ArgumentError

if TYPE_CHECKING:
    from quire.hf import PagedModel

P = TypeVar("P", SamplingParams, BeamSearchParams)
_EXAMPLES = {
    SamplingParams: "SamplingParams(max_tokens=64)",
    BeamSearchParams: "BeamSearchParams(beam_width=4, max_tokens=64)",
}

Prompt = str | Sequence[int] | Array | Mapping[str, Any]
Prompts = Prompt | Sequence[str] | Sequence[Sequence[int]] | Sequence[Array] | Sequence[Mapping[str, Any]]
PlainPrompt = str | Sequence[int]


def list_prompts(given: Prompts) -> list[PlainPrompt]:
    """A list of prompts, also where one alone was given.

    Raises:
        ArgumentError: neither text nor token ids nor a list of these.
    """
    prompts: Any = unpacked(given)
    is_unpacked = prompts is not given
    if is_unpacked and isinstance(prompts, list) and not prompts:
        return [prompts]  # an encoding of nothing is a prompt of nothing, which is refused
    if isinstance(prompts, str):
        return [prompts]
    if _is_list(prompts):
        if len(prompts) and all(map(is_token_id, prompts)):
            return [prompts]  # one prompt of token ids
        plain = [unpacked_one(item) for item in prompts]
        wrong = [i for i, item in enumerate(plain) if not isinstance(item, str) and not _is_list(item)]
        if not wrong:
            return plain
        item = plain[wrong[0]]
        raise ArgumentError(
            "prompts must be text, token ids or a list of these; got a list with "
            f"{type(item).__name__} {item!r:.60}. Fix: {_fix_of_item(item, wrong[0], len(wrong) == len(prompts))}"
        )
    raise ArgumentError(
        f"prompts must be text, token ids or a list of these; got {type(prompts).__name__}. "
        f"Fix: {_fix('prompts', prompts)}"
    )


def list_params(params: Any, num_prompts: int, kind: type[P]) -> list[P]:
    """Parameters for each prompt.

    Raises:
        ArgumentError: neither one of this kind nor a list with one per prompt.
    """
    if isinstance(params, kind):
        return [params] * num_prompts
    if not isinstance(params, (list, tuple)):
        raise _wrong_params(params, kind)
    if len(params) != num_prompts:
        raise ArgumentError(
            f"params must be one {kind.__name__} or one per prompt, {num_prompts}; got {len(params)}. "
            f"Fix: {kind.__name__}(...) alone holds for all prompts"
        )
    for each in params:
        if not isinstance(each, kind):
            raise _wrong_params(each, kind)
    return list(params)


def check_prompt(prompt: PlainPrompt, token_ids: Sequence[int], model: PagedModel) -> None:
    """Refuse a prompt the model could not read.

    Args:
        prompt: as the caller gave it; empty text is empty, also where a tokenizer would add a token to it.
        token_ids: the prompt's tokens.
    Raises:
        ArgumentError: no tokens, something that is no token id, or no room for a token after it.
    """
    if not _is_list(token_ids):
        raise ArgumentError(
            f"prompt must be text or a list of int token ids; got {type(token_ids).__name__}. "
            f"Fix: {_fix('prompt', token_ids)}"
        )
    if len(prompt) == 0 or len(token_ids) == 0:
        raise ArgumentError(
            f"prompt must not be empty; got {prompt!r}. "
            "Fix: give some text, or the id of the token the model begins with"
        )
    if not all(map(is_token_id, token_ids)):
        wrong = next(token for token in token_ids if not is_token_id(token))
        raise ArgumentError(
            "prompt must be text or a list of int token ids; got a list with "
            f"{type(wrong).__name__} {wrong!r:.60}. Fix: tokenizer(text)['input_ids']"
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


def check_params(params: SamplingParams, model: PagedModel) -> None:
    """Refuse token ids to change or to allow that the model does not have.

    Raises:
        ArgumentError: an id outside the vocabulary.
    """
    for name in ("logit_bias", "allowed_token_ids"):
        token_ids = getattr(params, name)
        if (
            token_ids is not None
            and len(token_ids)
            and not 0 <= min(token_ids) <= max(token_ids) < model.vocab_size
        ):
            wrong = min(token_ids) if min(token_ids) < 0 else max(token_ids)
            raise ArgumentError(
                f"{name} must hold token ids from 0 to {model.vocab_size - 1}; got {wrong}. "
                "Fix: use the tokenizer that belongs to this model"
            )


def check_priority(priority: object) -> None:
    """Refuse what cannot be compared with other priorities.

    Raises:
        ArgumentError: no int, or one that 32 bits do not hold.
    """
    if not (isinstance(priority, int) and not isinstance(priority, bool) and -(2**31) <= priority < 2**31):
        raise ArgumentError(
            f"priority must be an int from -2**31 to 2**31 - 1; got {priority!r:.60}. "
            "Fix: 0 as for all others, 1 for what may wait, -1 for what is urgent"
        )


def check_text(text: str, index: int) -> None:
    """Refuse text that a tokenizer could not encode.

    Raises:
        ArgumentError: half of a surrogate pair, which no encoding writes.
    """
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ArgumentError(
            f"prompt must be text that UTF-8 can hold; got a lone surrogate in prompt {index}, "
            f"{text!r:.40}. Fix: decode its bytes with the right encoding"
        )


def max_length(num_prompt_tokens: int, params: SamplingParams | BeamSearchParams, model: PagedModel) -> int:
    """Most tokens each sequence of a request may reach, its prompt included.

    The last token is handed out but never computed, so it needs no slot. The full pages of a prompt are shared by all
    samples or beams; of a page that it fills in part each that goes on has its own. Where some layers see fewer tokens
    than others, there are pages of each group of layers, and no more than a token sees.

    Raises:
        ArgumentError: they would not fit the whole pool even if nothing else were in it.
    """
    if isinstance(params, BeamSearchParams):
        width, name, several = params.beam_width, "beam_width", "beams"
    else:
        width, name, several = params.n, "n", "samples"
    shared = num_prompt_tokens // model.page_size
    longest = sys.maxsize if model.max_seq_len is None else model.max_seq_len
    if params.max_tokens is not None:
        longest = min(longest, num_prompt_tokens + params.max_tokens)
    else:
        # Without any other limit, a model that gives all pages back would go on for ever: it stops at a pool's length.
        most = model.num_pages if longest == sys.maxsize else -(-longest // model.page_size)
        own = bisect_right(
            range(most + 1), model.num_pages, key=lambda own: _most_pages(shared, own, width, model)
        )
        num_slots = (shared + max(own - 1, 0)) * model.page_size
        longest = max(min(longest, num_slots + 1), num_prompt_tokens + 1)
    own = -(-(longest - 1) // model.page_size) - shared
    pages = _most_pages(shared, own, width if longest - 1 > num_prompt_tokens else 1, model)
    if pages > model.num_pages:
        raise ArgumentError(
            f"prompt of {num_prompt_tokens} tokens plus {longest - num_prompt_tokens} to generate"
            f"{f' in each of {width} {several}' if width > 1 else ''} must fit "
            f"the pool; got a need of {pages} pages of {model.page_size} tokens, the pool has "
            f"{model.num_pages}. "
            f"Fix: a shorter prompt, a smaller max_tokens{f', a smaller {name}' if width > 1 else ''}, "
            "or more memory for pages"
        )
    return longest


def _most_pages(shared: int, own: int, num_samples: int, model: PagedModel) -> int:
    """Most pages that samples hold which share some full pages, and have others of their own, in logical pages each.

    In a group of layers with a window no sample has more pages than are in sight at one token.
    """
    pages = 0
    for sight in model.groups:
        in_sight = sight.most_pages(1, model.page_size)
        alone = min(shared + own, in_sight)
        pages += min(min(shared, in_sight) + num_samples * min(own, in_sight), num_samples * alone)
    return pages


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _fix(name: str, value: object) -> str:
    """What makes token ids, or a list of prompts, of something that is neither."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"bytes({name}).decode()"
    if isinstance(value, Mapping) or not hasattr(value, "__iter__"):
        return "give text, or tokenizer(text)['input_ids']"
    return f"list({name})"


def _fix_of_item(item: object, index: int, like_all: bool) -> str:
    if isinstance(item, Mapping) and "content" in item:
        return "llm.chat(messages)"
    if not hasattr(item, "__iter__"):
        return "one prompt per entry, text or a list of token ids"
    return (
        f"[{_fix('prompt', item)} for prompt in prompts]"
        if like_all
        else f"{_fix(f'prompts[{index}]', item)} as that entry"
    )


def _wrong_params(got: object, kind: type) -> ArgumentError:
    name = kind.__name__
    fix = f"params={_EXAMPLES[kind]}"
    if isinstance(got, Mapping):
        fix = f"{name}(**params)"
    elif type(got) in _EXAMPLES:
        fix = f"llm.{'generate' if kind is BeamSearchParams else 'beam_search'} takes {type(got).__name__}"
    return ArgumentError(
        f"params must be a {name}, or a list with one per prompt; got {type(got).__name__} {got!r:.60}. Fix: {fix}"
    )
