"""JSON of a schema: a grammar library rules out, at each token, what would break it."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from quire.engine import Engine
from quire.errors import ArgumentError

MAX_SCHEMA_CHARS = 1 << 16
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class Grammars:
    """Makes the logits processors of an engine.

    Cost: the first grammar waits up to a second, in which the library reads the vocabulary.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def of_schema(self, schema: Mapping[str, Any], num_samples: int) -> JsonProcessor:
        """A processor for one request, whose texts are JSON of a schema; takes a while, so not in an event loop.

        Raises:
            ArgumentError: a schema that is too large, or that the library does not know.
        """
        try:
            written = json.dumps(schema)
        except (RecursionError, ValueError) as error:
            raise _wrong_schema(f"one that JSON cannot hold: {error!s:.100}") from error
        if len(written) > MAX_SCHEMA_CHARS:
            raise _wrong_schema(f"{len(written)} characters, of at most {MAX_SCHEMA_CHARS}")
        tokenizer = self._read_tokenizer()
        try:
            # Without the choice of spaces a model cannot write them for ever.
            grammar = LLMatcher.grammar_from_json_schema(written, overrides={"whitespace_flexible": False})
            wrong = LLMatcher.validate_grammar(grammar, tokenizer)
        except Exception as error:  # the library raises Python's kinds
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            raise _wrong_schema(f"{wrong!s:.200}")
        return JsonProcessor(LLMatcher(tokenizer, grammar), num_samples)

    def _read_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                model = self._engine.model
                # A model may have more rows than its tokenizer has tokens, and ends its texts at any of several.
                self._tokenizer = from_tokenizer(
                    self._engine.tokenizer, n_vocab=model.vocab_size, eos_token=list(model.eos_token_ids)
                )
            return self._tokenizer


class JsonProcessor:
    """Allows the tokens after which a text can still become JSON of a schema; at its end, those that end a text.

    The samples of a request share it. A matcher is kept for each text by its tokens, so that one more token costs one
    step of the grammar; a text that has no matcher, as after an interruption, is read again.
    """

    def __init__(self, matcher: LLMatcher, num_samples: int) -> None:
        self._fresh = matcher
        self._num_samples = num_samples
        self._matchers: dict[tuple[int, ...], LLMatcher] = {}

    def __call__(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Rule out, in place, what cannot follow."""
        text = tuple(token_ids)
        # Taken out meanwhile: where Ctrl-C comes before the end, nobody finds a matcher that is half way.
        matcher = self._matchers.pop(text[:-1], None) if text else None
        rest = token_ids[-1:]
        if matcher is None:
            matcher, rest = self._fresh.deep_copy(), token_ids
        matcher.consume_tokens(rest)
        allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) != 0
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0]
            raise _wrong_schema(f"one that no token goes on with after {len(token_ids)}: {reason:.100}")
        self._matchers[text] = matcher
        if len(self._matchers) > self._num_samples:
            del self._matchers[next(iter(self._matchers))]
        return logits.masked_fill_(~allowed.to(logits.device), -torch.inf)


def _wrong_schema(got: str) -> ArgumentError:
    return ArgumentError(
        f"response_format must have a JSON schema that llguidance knows; got {got}. Fix: a simpler schema"
    )
