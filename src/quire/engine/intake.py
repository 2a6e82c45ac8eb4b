"""From what a caller gives to requests: text is encoded, prompts and parameters are checked, nothing is queued yet."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import abc
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from quire.engine.admission import (
    P,
    PlainPrompt,
    Prompt,
    check_params,
    check_prompt,
    check_text,
    list_params,
    max_length,
)
from quire.engine.beams import Beam, BeamRequest, beam_sampling_params
from quire.engine.chat import Messages, render_chats
from quire.engine.defaults import fill_from, warn_of_what_is_not_applied
from quire.engine.encodings import unpacked_one
from quire.engine.logits import logit_rules
from quire.engine.params import BeamSearchParams, SamplingParams
from quire.engine.request import Request
from quire.engine.sequence import Sequence
from quire.engine.text import TextStream
from quire.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from quire.hf import PagedModel


class Intake:
    """Makes the requests of one engine, from any thread.

    Args:
        model: what the requests will be served with.
        tokenizer: encodes and decodes text; None: prompts and results are token ids.
    Raises:
        UnsupportedError: a tokenizer without a `tokenizers` backend.
    """

    def __init__(self, model: PagedModel, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._decoder = None if tokenizer is None else _decoder_of(tokenizer)
        self._encoding = _encoding_lock(tokenizer)
        warn_of_what_is_not_applied(model.generation_config)
        self._seq_ids = itertools.count()

    def make_requests(
        self,
        listed: abc.Sequence[Prompt],
        params: SamplingParams | abc.Sequence[SamplingParams] | None,
        *,
        special_tokens: bool = True,
    ) -> list[Request]:
        """One request per prompt, none of them queued yet, so that a bad one is found before any work."""
        each = list_params(SamplingParams() if params is None else params, len(listed), SamplingParams)
        return self._make_all(listed, each, self._make_request, special_tokens=special_tokens)

    def make_chat_requests(
        self,
        messages: Messages | abc.Sequence[Messages],
        params: SamplingParams | abc.Sequence[SamplingParams] | None,
    ) -> list[Request]:
        """One request per conversation, whose prompt is what the tokenizer's chat template makes of it."""
        with self._encoding:
            prompts = render_chats(self.tokenizer, messages)
        return self.make_requests(prompts, params, special_tokens=False)

    def make_beam_requests(
        self, listed: abc.Sequence[Prompt], params: BeamSearchParams | abc.Sequence[BeamSearchParams]
    ) -> list[Request]:
        """One search per prompt."""
        each = list_params(params, len(listed), BeamSearchParams)
        return self._make_all(listed, each, self._make_beam_request)

    def _make_all(
        self,
        listed: abc.Sequence[Prompt],
        params: abc.Sequence[P],
        make: Callable[[PlainPrompt, P, abc.Sequence[int], int], Request],
        *,
        special_tokens: bool = True,
    ) -> list[Request]:
        plain: list[PlainPrompt] = [unpacked_one(prompt) for prompt in listed]
        texts = [prompt for prompt in plain if isinstance(prompt, str)]
        encoded = iter(self._encode(texts, special_tokens=special_tokens))
        requests = []
        for index, (prompt, its_params) in enumerate(zip(plain, params, strict=True)):
            token_ids = next(encoded) if isinstance(prompt, str) else prompt
            try:
                check_prompt(prompt, token_ids, self.model)
                requests.append(make(prompt, its_params, token_ids, index))
            except ArgumentError as error:
                if len(listed) == 1:
                    raise
                raise type(error)(f"prompts[{index}]: {error}") from error
        return requests

    def _make_request(
        self, prompt: PlainPrompt, params: SamplingParams, token_ids: abc.Sequence[int], index: int
    ) -> Request:
        check_params(params, self.model)
        if params.stop_strings and self._decoder is None:
            raise ArgumentError(
                f"stop must be None, as this engine has no tokenizer to read text with; got {params.stop!r}. "
                "Fix: stop_token_ids, or pass a tokenizer"
            )
        params = self._fill(params, len(token_ids))
        eos = self.model.eos_token_ids
        longest = max_length(len(token_ids), params, self.model)
        stop_token_ids = frozenset((*params.stop_token_ids, *(() if params.ignore_eos else eos)))
        rules = logit_rules(
            params,
            ending_ids=(*params.stop_token_ids, *eos),
            bad_words=self._encode_bad_words(params.bad_words or ()),
            vocab_size=self.model.vocab_size,
        )
        sequences = [
            Sequence(
                next(self._seq_ids),
                token_ids,
                params,
                max_length=longest,
                stop_token_ids=stop_token_ids,
                text=self._make_text(token_ids, params),
                rules=rules,
                index=sample_index,
            )
            for sample_index in range(params.n)
        ]
        return Request(sequences, prompt if isinstance(prompt, str) else None, index)

    def _fill(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """Parameters with no field left unset."""
        filled, may_give_way = fill_from(self.model.generation_config, params, num_prompt_tokens)
        if may_give_way:
            unbounded = replace(filled, max_tokens=None)
            room = max_length(num_prompt_tokens, unbounded, self.model) - num_prompt_tokens
            if filled.max_tokens is not None and room < filled.max_tokens:
                filled = replace(filled, max_tokens=room, min_tokens=min(filled.min_tokens, room))
        return filled

    def _make_beam_request(
        self, prompt: PlainPrompt, params: BeamSearchParams, token_ids: abc.Sequence[int], index: int
    ) -> Request:
        internal = beam_sampling_params(params)
        longest = max_length(len(token_ids), params, self.model)
        first = Beam(next(self._seq_ids), token_ids, internal, max_length=longest, stop_token_ids=frozenset())
        return BeamRequest(
            first,
            params,
            eos_token_ids=self.model.eos_token_ids,
            new_seq_id=self._seq_ids.__next__,
            make_text=lambda: self._make_text(token_ids, internal),
            prompt=prompt if isinstance(prompt, str) else None,
            index=index,
        )

    def _make_text(self, token_ids: abc.Sequence[int], params: SamplingParams) -> TextStream | None:
        if self._decoder is None:
            return None
        return TextStream(
            self._decoder,
            token_ids,
            params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )

    def _encode_bad_words(self, words: abc.Sequence[str]) -> list[list[int]]:
        """The tokens of each text that must not come up, as it is written at the start of a text and after a space."""
        if words and self.tokenizer is None:
            raise ArgumentError(
                f"bad_words must be None, as this engine has no tokenizer to read them with; got {words!r:.60}. "
                "Fix: logit_bias, or pass a tokenizer"
            )
        bare = [word.lstrip() or word for word in words]
        token_ids = self._encode([text for word in bare for text in (word, f" {word}")], special_tokens=False)
        for word, ids in zip(words, token_ids[::2], strict=True):
            if not ids:
                raise ArgumentError(
                    f"bad_words must be texts that the tokenizer writes with tokens; got {word!r:.60}, "
                    "for which it has none. Fix: leave it out"
                )
        return token_ids

    def _encode(self, texts: list[str], *, special_tokens: bool = True) -> list[list[int]]:
        if not texts:
            return []
        if self.tokenizer is None:
            raise ArgumentError(
                f"prompt must be token ids, as this engine has no tokenizer; got {texts[0]!r:.60}. "
                "Fix: pass a tokenizer"
            )
        for index, text in enumerate(texts):
            check_text(text, index)
        with self._encoding:
            token_ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=special_tokens)["input_ids"]
            if special_tokens:
                token_ids = [self._begin_once(text, ids) for text, ids in zip(texts, token_ids, strict=True)]
        return token_ids

    def _begin_once(self, text: str, token_ids: list[int]) -> list[int]:
        """The tokens of a text without the one that the tokenizer put before it, where the text begins with it itself.

        Such is a text that a chat template has made, which the model has never seen to begin twice.
        """
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None or token_ids[:2] != [bos, bos]:
            return token_ids
        own: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return token_ids[1:] if own[:1] == [bos] and token_ids[1 : 1 + len(own)] == own else token_ids


_encoding_locks: weakref.WeakValueDictionary[int, threading.RLock] = weakref.WeakValueDictionary()
_encoding_locks_lock = threading.Lock()


def _encoding_lock(tokenizer: Any) -> threading.RLock:
    """One lock per tokenizer, for all engines that have it: it may change its settings while it encodes."""
    with _encoding_locks_lock:
        lock = _encoding_locks.get(id(tokenizer))  # whose engine keeps the tokenizer, too
        if lock is None:
            lock = _encoding_locks[id(tokenizer)] = threading.RLock()
        return lock


def _decoder_of(tokenizer: Any) -> Tokenizer:
    """The `tokenizers.Tokenizer` inside a transformers tokenizer.

    Raises:
        UnsupportedError: a tokenizer written in Python alone, which has none.
    """
    decoder = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(decoder, Tokenizer):
        raise UnsupportedError(
            "tokenizer must be a transformers tokenizer with a `tokenizers` backend, which decodes token by "
            f"token; got {type(tokenizer).__name__}. "
            "Fix: PreTrainedTokenizerFast(tokenizer_file='tokenizer.json')"
        )
    return decoder
