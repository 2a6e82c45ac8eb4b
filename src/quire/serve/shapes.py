"""What came back from the engine, as objects of OpenAI's two APIs: whole, or in chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from quire.engine import CompletionOutput, Delta, RequestOutput
from quire.serve.logprobs import TextLogprobs, chat_logprobs
from quire.serve.protocol import ChatBody, CompletionBody

Object = dict[str, Any]


class Shape(ABC):
    """The objects that answer one body. A choice is one text: sample i of prompt p has the index p · n + i.

    Args:
        body: what was asked.
        model: the name that the answer gives.
    Attributes:
        num_texts: how many texts were asked for.
    """

    kind = chunk_kind = prefix = ""

    def __init__(self, body: ChatBody | CompletionBody, model: str, num_prompts: int) -> None:
        self.num_texts = num_prompts * body.n
        self._n = body.n
        self._model = model
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._begun: set[int] = set()
        options = body.stream_options
        self._include_usage = options is not None and options.include_usage

    def whole(self, outputs: Sequence[RequestOutput]) -> Object:
        """The one answer of a request that does not stream."""
        choices = [
            self._choice(prompt * self._n + text.index, output, text)
            for prompt, output in enumerate(outputs)
            for text in output.outputs
        ]
        return {**self._head(self.kind), "choices": choices, "usage": self._usage(outputs)}

    def chunks(self, prompt: int, delta: Delta) -> Iterator[Object]:
        """What a prompt's answer gained, as chunks of a stream."""
        index = prompt * self._n + delta.sequence
        yield from self._begin(index)
        gained = self._gained(index, delta)
        if gained is not None:
            yield self._chunk([{"index": index, **gained, "finish_reason": None}])
        for text in () if delta.output is None else delta.output.outputs:
            index = prompt * self._n + text.index
            yield from self._begin(index)  # one that was aborted before its first token
            yield self._chunk([{"index": index, **self._nothing(), "finish_reason": text.finish_reason}])

    def last_chunks(self, outputs: Sequence[RequestOutput]) -> Iterator[Object]:
        """What follows the texts of a stream."""
        if self._include_usage:
            yield {**self._head(self.chunk_kind), "choices": [], "usage": self._usage(outputs)}

    def _begin(self, index: int) -> Iterator[Object]:
        if index not in self._begun:
            self._begun.add(index)
            first = self._first(index)
            if first is not None:
                yield self._chunk([{"index": index, **first, "finish_reason": None}])

    def _chunk(self, choices: list[Object]) -> Object:
        chunk: Object = {**self._head(self.chunk_kind), "choices": choices}
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _head(self, kind: str) -> Object:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self, outputs: Sequence[RequestOutput]) -> Object:
        asked = sum(len(output.prompt_token_ids) for output in outputs)
        generated = sum(self._num_generated(text) for output in outputs for text in output.outputs)
        cached = sum(output.num_cached_tokens for output in outputs)
        return {
            "prompt_tokens": asked,
            "completion_tokens": generated,
            "total_tokens": asked + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _num_generated(self, text: CompletionOutput) -> int:
        return len(text.token_ids)

    @abstractmethod
    def _choice(self, index: int, output: RequestOutput, text: CompletionOutput) -> Object: ...

    @abstractmethod
    def _first(self, index: int) -> Object | None: ...

    @abstractmethod
    def _gained(self, index: int, delta: Delta) -> Object | None: ...

    @abstractmethod
    def _nothing(self) -> Object: ...


class ChatShape(Shape):
    """Objects of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, body: ChatBody, model: str) -> None:
        super().__init__(body, model, 1)
        self._num_top = body.top_logprobs or 0

    def _choice(self, index: int, output: RequestOutput, text: CompletionOutput) -> Object:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text.text},
            "logprobs": None if text.logprobs is None else chat_logprobs(text.logprobs, self._num_top),
            "finish_reason": text.finish_reason,
        }

    def _first(self, index: int) -> Object:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def _gained(self, index: int, delta: Delta) -> Object | None:
        if not delta.text and not delta.logprobs:
            return None
        found = None if delta.logprobs is None else chat_logprobs(delta.logprobs, self._num_top)
        return {"delta": {"content": delta.text}, "logprobs": found}

    def _nothing(self) -> Object:
        return {"delta": {}, "logprobs": None}


class TextShape(Shape):
    """Objects of /v1/completions.

    Args:
        decode: (token ids, whether to leave special tokens out) → text; for what an echo says of a prompt.
    """

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, body: CompletionBody, model: str, decode: Callable[[Sequence[int], bool], str]
    ) -> None:
        super().__init__(body, model, len(body.prompt))
        self._body = body
        self._decode = decode
        self._logprobs: dict[int, TextLogprobs] = {}

    def _choice(self, index: int, output: RequestOutput, text: CompletionOutput) -> Object:
        generated = self._num_generated(text)
        found = None
        if text.logprobs is not None:
            token_ids: list[int] = []
            known: list[Any] = []
            if self._body.echo:
                token_ids += output.prompt_token_ids
                known += output.prompt_logprobs or [None] * len(token_ids)
            token_ids += text.token_ids[:generated]
            known += text.logprobs[:generated]
            found = self._logprobs_of(index).next(token_ids, known)
        return {
            "index": index,
            "text": self._echo(index) + (text.text if generated else ""),
            "logprobs": found,
            "finish_reason": text.finish_reason if generated else "length",
        }

    def _first(self, index: int) -> Object | None:
        echo = self._echo(index)
        return {"text": echo, "logprobs": None} if echo else None

    def _gained(self, index: int, delta: Delta) -> Object | None:
        if self._body.max_tokens == 0 or not (delta.text or delta.logprobs):
            return None
        found = delta.logprobs
        shown = None if found is None else self._logprobs_of(index).next(delta.token_ids, found)
        return {"text": delta.text, "logprobs": shown}

    def _nothing(self) -> Object:
        return {"text": "", "logprobs": None}

    def _num_generated(self, text: CompletionOutput) -> int:
        return min(
            len(text.token_ids), self._body.max_tokens
        )  # no tokens at all are asked of the engine as one

    def _echo(self, index: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self._body.prompt[index // self._n]
        return prompt if isinstance(prompt, str) else self._decode(prompt, self._body.skip_special_tokens)

    def _logprobs_of(self, index: int) -> TextLogprobs:
        if index not in self._logprobs:
            self._logprobs[index] = TextLogprobs(lambda token: self._decode([token], False))
        return self._logprobs[index]
