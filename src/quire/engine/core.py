"""The loop: schedule, forward, sample, hand out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from quire.debug import debug_enabled
from quire.engine.admission import check_prompt, max_length
from quire.engine.request import Delta, Request, SamplingParams
from quire.engine.runner import build_step
from quire.engine.sampler import sample
from quire.engine.scheduler import Chunk, Scheduler
from quire.engine.text import TextStream
from quire.errors import ArgumentError, OutOfPages, UnsupportedError
from quire.pages import PageAllocator, PageTable
from quire.spec import check_size

if TYPE_CHECKING:
    from quire.hf import PagedModel

DEFAULT_MAX_BATCH_TOKENS = 2048
DEFAULT_MAX_NUM_SEQS = 128

Prompt = str | Sequence[int]


@dataclass
class EngineStats:
    """What an engine has done so far.

    Attributes:
        steps: packed forwards.
        computed_tokens: tokens that went through the model, those computed again included.
        generated_tokens: tokens handed out.
        peak_pages: most pages in use at once.
        peak_unused_slots: slots of those pages that held no token at that moment.
    """

    steps: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    peak_pages: int = 0
    peak_unused_slots: int = 0


class Engine:
    """Serves requests with one model, a step at a time.

    Not thread-safe: one thread adds, steps and aborts. An exception inside a step, Ctrl-C included,
    leaks nothing: running requests give their pages back and would be computed again by the next step.

    Args:
        model: a model on pages; the engine owns all of its pages.
        tokenizer: a fast transformers tokenizer; None: prompts and results are token ids.
        max_batch_tokens: most tokens in one step; more let prompts in faster, fewer keep steps short.
        max_num_seqs: most requests running at once.
    Attributes:
        table: who owns which page: `table.page_owners()`, by request_id.
        requests: the live requests, waiting or running, by request_id.
        stats: totals since the engine was made.
    Raises:
        ArgumentError: a limit below one.
        UnsupportedError: a tokenizer without a `tokenizers` backend.
    """

    def __init__(
        self,
        model: PagedModel,
        tokenizer: Any = None,
        *,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
    ) -> None:
        check_size("max_batch_tokens", max_batch_tokens)
        check_size("max_num_seqs", max_num_seqs)
        self.model = model
        self.tokenizer = tokenizer
        self._decoder = None if tokenizer is None else decoder_of(tokenizer)
        self.table = PageTable(PageAllocator(model.num_pages), model.page_size)
        self.requests: dict[int, Request] = {}
        self.stats = EngineStats()
        self._scheduler = Scheduler(
            self.table,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            poison=model.poison if debug_enabled() else None,
        )
        self._request_ids = itertools.count()
        self._unread: list[Delta] = []  # of a step that failed after it had drawn tokens

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.requests or self._unread)

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a prompt.

        Args:
            prompt: text, or token ids.
            params: default: SamplingParams().
        Returns:
            The request's id, for `abort` and to tell its deltas apart.
        Raises:
            ArgumentError: a prompt that is empty, not of this vocabulary, longer than the model
                allows, or that could not finish even with the whole pool to itself; no other
                request is touched.
        """
        token_ids = self._encode([prompt])[0] if isinstance(prompt, str) else prompt
        request = self._make_request(prompt, params or SamplingParams(), token_ids)
        self._enqueue(request)
        return request.request_id

    def step(self) -> list[Delta]:
        """Run one packed forward over what the scheduler chooses.

        Returns:
            What each request gained that got a token in this step, or in a failed one before; empty when none
            did.
        Raises:
            OutOfPages: someone outside this engine holds so many pages that nothing can run.
        """
        try:
            chunks = self._scheduler.schedule()
            if not chunks:
                self._check_idle()
                return self._take_unread()
            self._count(chunks)
            return self._advance(chunks)
        except BaseException:
            self._scheduler.preempt_all()
            raise

    def abort(self, request_id: int) -> bool:
        """End a request now and free its pages; False when it had ended already."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        request.finish("abort")
        self._release(request)
        return True

    def _advance(self, chunks: Sequence[Chunk]) -> list[Delta]:
        logits = self.model.forward(build_step(chunks, self.table))
        complete = [chunk.request for chunk in chunks if chunk.is_last]
        tokens = sample(logits, complete) if complete else []
        for chunk in chunks:
            chunk.request.num_computed += chunk.num_tokens
        failure: Exception | None = None
        for request, token in zip(complete, tokens, strict=True):
            tokens_seen, chars_seen = len(request.tokens), len(request.text)
            try:
                request.accept(token)
            except Exception as error:  # the other tokens are drawn: whose they are, they reach
                failure = failure or error
            if request.finish_reason is not None:
                self._release(request)
            self._unread.append(request.delta(tokens_seen, chars_seen))
        self.stats.generated_tokens += len(tokens)
        if failure is not None:
            raise failure
        return self._take_unread()

    def _take_unread(self) -> list[Delta]:
        deltas, self._unread = self._unread, []
        return deltas

    def _count(self, chunks: Sequence[Chunk]) -> None:
        stats, allocator = self.stats, self.table.allocator
        stats.steps += 1
        stats.computed_tokens += sum(chunk.num_tokens for chunk in chunks)
        pages = allocator.num_pages - allocator.num_free
        if pages > stats.peak_pages:
            stats.peak_pages = pages
            stats.peak_unused_slots = pages * self.table.page_size - sum(
                self.table.length(seq_id) for seq_id in self.table.seq_ids
            )

    def _check_idle(self) -> None:
        if self.requests:
            allocator = self.table.allocator
            raise OutOfPages(
                f"the pool must have pages for the oldest request; got {allocator.num_free} free of "
                f"{allocator.num_pages}, with none held by a running request. "
                "Fix: free what else was allocated from engine.table.allocator"
            )

    def _make_request(
        self, prompt: Prompt, params: SamplingParams, token_ids: Sequence[int], index: int = 0
    ) -> Request:
        check_prompt(prompt, token_ids, self.model)
        if params.stop_strings and self._decoder is None:
            raise ArgumentError(
                f"stop must be None, as this engine has no tokenizer to read text with; got {params.stop!r}. "
                "Fix: stop_token_ids, or pass a tokenizer"
            )
        eos = () if params.ignore_eos else self.model.eos_token_ids
        return Request(
            next(self._request_ids),
            token_ids,
            params,
            max_length=max_length(len(token_ids), params, self.model),
            stop_token_ids=frozenset((*params.stop_token_ids, *eos)),
            prompt=prompt if isinstance(prompt, str) else None,
            text=None if self._decoder is None else TextStream(self._decoder, token_ids, params.stop_strings),
            index=index,
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self.tokenizer is None:
            raise ArgumentError(
                f"prompt must be token ids, as this engine has no tokenizer; got {texts[0]!r:.60}. "
                "Fix: pass a tokenizer"
            )
        for index, text in enumerate(texts):
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise ArgumentError(
                    f"prompt must be text that UTF-8 can hold; got a lone surrogate in prompt {index}, "
                    f"{text!r:.40}. Fix: decode its bytes with the right encoding"
                )
        token_ids: list[list[int]] = self.tokenizer(texts)["input_ids"]
        return token_ids

    def _enqueue(self, request: Request) -> None:
        request.arrived = time.perf_counter()
        self.requests[request.request_id] = request
        self._scheduler.add(request)

    def _release(self, request: Request) -> None:
        self._scheduler.remove(request)
        del self.requests[request.request_id]


def decoder_of(tokenizer: Any) -> Tokenizer:
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
