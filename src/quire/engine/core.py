"""The engine: schedule, forward, sample, hand out, for any number of callers and threads."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from quire.debug import debug_enabled
from quire.engine.admission import (
    Prompt,
    Prompts,
    check_params,
    check_prompt,
    check_text,
    list_params,
    list_prompts,
    max_length,
)
from quire.engine.audit import audit_all, audit_sample
from quire.engine.chat import Messages, render_chats
from quire.engine.logits import logit_rules
from quire.engine.logprobs import TokenLogprobs, logprobs_of_choices, prompt_logprobs
from quire.engine.params import SamplingParams
from quire.engine.progress import progress_bar
from quire.engine.request import Delta, Reader, Request, RequestOutput, interrupted_request, raise_first_error
from quire.engine.runner import run
from quire.engine.sampler import sample
from quire.engine.scheduler import Chunk, Scheduler
from quire.engine.sequence import Sequence
from quire.engine.text import TextStream
from quire.engine.turns import turns_of
from quire.errors import ArgumentError, OutOfPages, PageStateError, UnsupportedError
from quire.pages import PageAllocator, PageTable
from quire.spec import check_size

if TYPE_CHECKING:
    from quire.hf import PagedModel

DEFAULT_MAX_BATCH_TOKENS = 2048
DEFAULT_MAX_NUM_SEQS = 128
SILENCE = 1.0  # seconds without news after which a sleeping thread sees whether anyone still runs steps


@dataclass
class EngineStats:
    """What an engine has done so far.

    Attributes:
        steps: packed forwards.
        computed_tokens: tokens that went through the model, those computed again included.
        admitted_tokens: known tokens of the sequences that began to run, those that began again included.
        cached_tokens: how many of these were found in pages, and not computed.
        generated_tokens: tokens handed out.
        peak_pages: most pages of `model.bytes_per_page` that its sequences held at once; a shared page counts once.
        peak_unused_slots: slots of those pages that held no token at that moment.
    """

    steps: int = 0
    computed_tokens: int = 0
    admitted_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    peak_pages: int = 0
    peak_unused_slots: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of admitted tokens that was found in pages; 0.0 before the first."""
        return self.cached_tokens / self.admitted_tokens if self.admitted_tokens else 0.0


class Engine:
    """Serves requests with one model, a step at a time.

    **Threads.** Every method may be called from any thread. `generate` and `stream` of all threads join one batch: one
    of them runs the steps, the others sleep until their requests have news. When the stepping thread has its result, is
    interrupted or fails, a sleeping one takes over. A thread that holds `model.lock`, or runs inside a step (a forward
    hook), may call `add_request` and nothing else, but for `abort` inside a step. Requests that arrive during a step
    join the next one.

    **Engines on one model** draw pages from `model.allocator` and take turns; see `Turns` for who gives pages to
    whom when none are left. An engine that is dropped gives its pages back.

    **Shared beginnings.** A prompt whose beginning is in pages, from a request that runs or has ended, of this or
    another engine on the model, shares the full pages of it and computes the rest. Pages stay after their request
    until their memory is needed; those unused the longest go first.

    **Windows.** Layers with a window or attention chunks give back, after each step, the pages that no later token of
    the sequence sees.

    **Failures.** An exception inside a step, Ctrl-C included, is raised by whoever ran it and leaks nothing: running
    requests give their pages back and are computed again by the next step. What fails for one
    request alone is raised to the caller of that request.

    Args:
        model: a model on pages.
        tokenizer: a fast transformers tokenizer; None: prompts and results are token ids.
        max_batch_tokens: most tokens in one step; more let prompts in faster, fewer keep steps short.
        max_num_seqs: most requests running at once; one of several sequences counts once.
        enable_prefix_caching: find pages by what they hold, and let others find this engine's.
    Attributes:
        table: who owns which page: `table.page_owners()`, by seq_id; a request's first sequence has its request_id.
        requests: the live requests, waiting or running, by request_id.
        stats: totals since the engine was made.
    Raises:
        ArgumentError: a limit below one, a switch that is no bool, or a model that is not on pages.
        UnsupportedError: a tokenizer without a `tokenizers` backend.
    """

    def __init__(
        self,
        model: PagedModel,
        tokenizer: Any = None,
        *,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
        enable_prefix_caching: bool = True,
    ) -> None:
        check_size("max_batch_tokens", max_batch_tokens)
        check_size("max_num_seqs", max_num_seqs)
        if not isinstance(enable_prefix_caching, bool):
            raise ArgumentError(
                f"enable_prefix_caching must be a bool; got {enable_prefix_caching!r}. "
                "Fix: enable_prefix_caching=False"
            )
        if not isinstance(getattr(model, "allocator", None), PageAllocator):
            raise ArgumentError(
                f"model must be a PagedModel; got {type(model).__name__}. "
                "Fix: Engine(PagedModel(model)), or LLM(model)"
            )
        self.model = model
        self.tokenizer = tokenizer
        self._decoder = None if tokenizer is None else decoder_of(tokenizer)
        self.table = PageTable(model.allocator, model.page_size, model.groups)
        self.requests: dict[int, Request] = {}
        self.stats = EngineStats()
        self._scheduler = Scheduler(
            self.table,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            prefix_cache=model.prefix_cache if enable_prefix_caching else None,
        )
        self._debug = debug_enabled()
        self._turns = turns_of(model.lock)
        self._turns.join(self, self._scheduler)
        self._seq_ids = itertools.count()
        self._encoding = _encoding_lock(tokenizer)
        self._news = threading.Condition()  # held while tokens are handed out, and while they are read
        self._reader = Reader()  # what `step` has returned of the requests of `add_request`
        self._driver: int | None = None  # the thread in _drive's loop
        self._sleepers: list[Callable[[], bool]] = []  # what the others there wait for

    def __repr__(self) -> str:
        num_running = len(self._scheduler.running)
        num_waiting = len(self.requests) - num_running
        return f"{type(self).__name__}({num_running} running, {num_waiting} waiting, {self.model!r})"

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.requests or self._reader.requests)

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a prompt, to be served by `step`.

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
        request = self._make_request(prompt, list_params(params, 1)[0], token_ids)
        with self._news:
            self._reader.requests.append(request)
            self._enqueue(request)
        return request.request_id

    def step(self) -> list[Delta]:
        """Run one packed forward over what the scheduler chooses.

        Returns:
            What the requests of `add_request` gained since the last call, whoever ran the steps; requests of `generate`
            and `stream` are served too and read by their own callers. Empty when none gained a token, also because
            other engines on this model hold the pages for now.
        Raises:
            OutOfPages: someone beside the engines holds so many pages that nothing can run.
            UnsupportedError: this thread holds `model.lock`, or is inside a step.
            PageStateError: a page of the step is not what its sequence computed, as when someone freed it twice. One
                page is checked in each step, with QUIRE_DEBUG=1 all. The prefix cache is cleared then, and the next
                step computes the running requests again.
        """
        self._run_step()
        with self._news:
            return self._reader.read()

    def abort(self, request_id: int) -> bool:
        """End a request and free its pages, after the step that runs now.

        Returns:
            False when it had ended already. Inside a step, where the request ends after that step, True: the step
            may end it first.
        Raises:
            ArgumentError: request_id is no int.
            UnsupportedError: this thread holds `model.lock` outside a step.
        """
        if not isinstance(request_id, int):
            raise ArgumentError(
                f"request_id must be an int that add_request returned; got {request_id!r:.60}. "
                "Fix: call abort once per request"
            )
        request = self.requests.get(request_id)
        if request is None:
            return False
        in_turn = self._turns.in_turn  # called from within a step, which may be using the request
        if not in_turn:
            self._turns.check_may_wait()
        with self._news:
            self._reader.forget(request)
        if in_turn:
            self._turns.defer(lambda: self._end([request]))
            return True
        aborted = self._turns.run(lambda: self._end([request]), self._scheduler)
        self._wake()
        return aborted

    def reset_prefix_cache(self) -> None:
        """Forget what pages hold, for all engines on this model: no later request finds a page computed before.

        Call it when the weights were changed in place. Requests that run meanwhile go on with the pages that they have,
        which nobody finds any more. Called inside a step, it takes place after that step.

        Raises:
            UnsupportedError: this thread holds `model.lock` outside a step.
        """
        if self._turns.in_turn:
            self._turns.defer(self.model.prefix_cache.clear)
        else:
            self._turns.run(self.model.prefix_cache.clear, self._scheduler)

    def explain_hit(self, request: int | RequestOutput) -> str:
        """How much of a request's prompt was found in pages, and why no more: a sentence about when it began to run.

        Args:
            request: a live request's id, or what came back from one.
        Raises:
            ArgumentError: no such request is live.
        """
        found = request if isinstance(request, RequestOutput) else self.requests.get(request)
        if found is None:
            raise ArgumentError(
                f"request must be the id of a live request, or a RequestOutput; got {request!r:.60}. "
                "Fix: explain_hit(output) once it has ended"
            )
        return found.hit or "nothing was looked for: the request has not run"

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them served together, and with those of other threads.

        Args:
            prompts: text, a list of texts, token ids, or a list of such lists.
            params: for all prompts, or one per prompt; default: SamplingParams(), greedy.
            progress: show a progress bar on stderr; None: when stderr is a terminal.
        Returns:
            One output per prompt, in their order; also for a single prompt a list.
        Raises:
            ArgumentError: a prompt that cannot be served (see `add_request`), named by its index
                and before any work is done; also where the rules of a request left no token to choose.
            Exception: what a logits processor of one of these requests raised; the rest of them are aborted.
        """
        return self._complete(self._make_requests(list_prompts(prompts), params), progress)

    def chat(
        self,
        messages: Messages | abc.Sequence[Messages],
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Write the next turn of conversations, by the tokenizer's chat template.

        Args:
            messages: a conversation, [{"role": "user", "content": "…"}, …], or a list of them.
            params, progress: as for `generate`; params for all conversations, or one per conversation.
        Returns:
            One output per conversation, in their order; `prompt` is the text that the template made of it, which holds
            the tokens that a text begins with where the template writes them: none are added.
        Raises:
            ArgumentError: messages of another form, or that the template refuses; a prompt that cannot be served.
            UnsupportedError: the engine has no tokenizer, or a tokenizer without a chat template.
        """
        with self._encoding:
            prompts = render_chats(self.tokenizer, messages)
        return self._complete(self._make_requests(prompts, params, special_tokens=False), progress)

    def _complete(self, requests: list[Request], progress: bool | None) -> list[RequestOutput]:
        with self._serving(requests), progress_bar(len(requests), shown=progress) as advance:
            if advance is None:
                self._drive(lambda: _are_settled(requests))
            else:
                for deltas in self._read(requests):
                    advance(deltas)
            raise_first_error(requests)
        return [request.output() for request in requests]

    def stream(
        self, prompts: Prompts, params: SamplingParams | abc.Sequence[SamplingParams] | None = None
    ) -> Iterator[Delta]:
        """Complete prompts, and hand out each token as it comes.

        Args:
            prompts, params: as for `generate`.
        Returns:
            An iterator of deltas, `delta.index` telling the prompts apart; a request's texts joined
            are its `output.text`. This thread works only while the iterator is advanced; closing it, or
            dropping it, aborts what has not finished and frees its pages.
        Raises:
            ArgumentError: as `generate`, at the call.
        """
        return self._stream(self._make_requests(list_prompts(prompts), params))

    def _stream(self, requests: list[Request]) -> Iterator[Delta]:
        with self._serving(requests):
            for deltas in self._read(requests):
                yield from deltas

    def _read(self, requests: list[Request]) -> Iterator[list[Delta]]:
        reader = Reader(requests)
        while reader.requests:
            self._drive(reader.has_news)
            with self._news:
                deltas = reader.read()
            yield deltas

    @contextmanager
    def _serving(self, requests: list[Request]) -> Iterator[None]:
        try:
            with self._news:
                for request in requests:
                    self._enqueue(request)
            yield
        finally:
            if not all(request.finished for request in requests):
                # Deferred: the garbage collector may run this in the middle of a step.
                self._turns.defer(lambda: self._end(requests))

    def _drive(self, has_news: Callable[[], bool]) -> None:
        """Run steps until has_news, or sleep until then while another thread runs them."""
        self._turns.check_may_wait()
        thread = threading.get_ident()
        try:
            with self._news:
                while not has_news() and self._driver not in (None, thread):
                    self._sleep(has_news)
                if has_news():
                    return
                self._driver = thread
            while not has_news():
                if not self._run_step() and not has_news():
                    self._turns.wait()
        finally:
            if self._driver == thread:
                self._driver = None
                with self._news:
                    self._news.notify_all()  # one of them runs the next step

    def _sleep(self, has_news: Callable[[], bool]) -> None:
        self._sleepers.append(has_news)
        try:
            # A driver that was interrupted as it left, or whose thread is gone, wakes nobody. Two drivers do no harm.
            if not self._news.wait(SILENCE) and not self._turns.has_owner:
                self._driver = None
        finally:
            self._sleepers.remove(has_news)

    def _wake(self) -> None:
        with self._news:
            if any(has_news() for has_news in self._sleepers):
                self._news.notify_all()

    def _run_step(self) -> bool:
        """Schedule, forward, sample, hand out; False when nothing can run."""
        has_run = self._turns.run(self._step_in_turn, self._scheduler)
        self._wake()
        return has_run

    def _step_in_turn(self) -> bool:
        try:
            chunks = self._schedule()
            if chunks:
                self._count(chunks)
                self._audit(chunks)
                logits = run(self.model, chunks, self.table)
                self._scheduler.release_sources()
                complete = [chunk for chunk in chunks if chunk.is_last]
                rows: list[int] = []
                choosing: list[tuple[Request, Sequence]] = []
                for row, chunk in enumerate(complete):
                    for sequence in chunk.choosing:
                        rows.append(row)
                        choosing.append((chunk.request, sequence))
                sequences = [sequence for _, sequence in choosing]
                # Samples of one prompt choose their first tokens from the same row.
                of_last = logits[: len(complete)] if len(rows) == len(complete) else logits[rows]
                choices = sample(of_last, sequences) if complete else []
                logprobs = logprobs_of_choices(of_last, sequences, choices)
                of_prompts = prompt_logprobs(logits[len(complete) :], chunks)
                with self._news:
                    for request, found in of_prompts:
                        assert request.prompt_logprobs is not None
                        request.prompt_logprobs += found
                    self._scheduler.advance(chunks)
                    interruptions = [
                        self._hand_out(request, sequence, choice, logprobs.get(place))
                        for place, ((request, sequence), choice) in enumerate(
                            zip(choosing, choices, strict=True)
                        )
                    ]
                for interruption in interruptions:
                    if interruption is not None:
                        raise interruption
            return bool(chunks)
        except BaseException as error:
            if isinstance(error, PageStateError):
                self.model.prefix_cache.clear()  # or the next step would find the same page again
            try:
                self._recover()
            except ArgumentError as wrong:  # pages that someone else freed; what the step found says more
                raise error from wrong
            raise

    def _schedule(self) -> list[Chunk]:
        scheduler = self._scheduler
        while scheduler.has_requests:  # Checked before schedule(): a request may arrive during it.
            chunks = scheduler.schedule()
            if chunks:
                self._turns.forget_wait(scheduler)
                return chunks
            if not self._turns.take_pages(scheduler):
                self._check_that_pages_will_come()
                break
        return []

    def _check_that_pages_will_come(self) -> None:
        if not self._turns.others_hold_pages(self._scheduler):
            allocator = self.table.allocator
            raise OutOfPages(
                f"the pool must have pages for the oldest request; got {allocator.num_available} free of "
                f"{allocator.num_pages}, with none held by another running request. "
                "Fix: free what else was allocated from engine.table.allocator"
            )

    def _hand_out(
        self, request: Request, sequence: Sequence, choice: int | Exception, logprobs: TokenLogprobs | None
    ) -> BaseException | None:
        """Add a token to its sequence, or end the request with what failed; returns what interrupted that, Ctrl-C.

        The other requests still get their tokens.
        """
        if sequence.finish_reason is not None:  # another sequence of the request has just failed
            return None
        if isinstance(choice, Exception):
            request.error = choice
            self._end([request])
            return None
        self.stats.generated_tokens += 1
        interruption: BaseException | None = None
        try:
            if sequence.logprobs is not None and logprobs is not None:
                sequence.logprobs.append(logprobs)
            sequence.accept(choice)
        except Exception as error:
            request.error = error
        except BaseException as error:  # the token may be added, but its text lost and its stop unseen
            interruption = error
            request.error = interrupted_request(request.request_id, error)
        if sequence.finish_reason is not None:
            self._scheduler.finish(request, sequence)
            if request.finished:
                del self.requests[request.request_id]
        if request.error is not None:
            self._end([request])
        return interruption

    def _end(self, requests: list[Request]) -> bool:
        """Abort what has not finished of requests, in a turn; returns whether any had not."""
        with self._news:
            live = [request for request in requests if request.request_id in self.requests]
            aborts = not all(request.finished for request in live)
            for request in live:
                self._scheduler.remove(request)
                del self.requests[request.request_id]
                request.abort()
        return aborts

    def _recover(self) -> None:
        """Bring the queues in order after a step that broke off, wherever that was; in a turn."""
        self._scheduler.preempt_all()
        self._end([request for request in list(self.requests.values()) if request.finished])

    def _count(self, chunks: abc.Sequence[Chunk]) -> None:
        stats = self.stats
        stats.steps += 1
        stats.computed_tokens += sum(chunk.num_tokens for chunk in chunks)
        admitted, cached = self._scheduler.hits.take_counts()
        stats.admitted_tokens += admitted
        stats.cached_tokens += cached
        if self.table.allocator.num_owned > stats.peak_pages:
            pages, filled = self.table.occupancy()
            if pages > stats.peak_pages:
                stats.peak_pages = pages
                stats.peak_unused_slots = pages * self.table.page_size - filled

    def _audit(self, chunks: abc.Sequence[Chunk]) -> None:
        cache = self._scheduler.hits.cache
        if self._debug:
            audit_all(chunks, self.table, cache)
        else:
            audit_sample(chunks, self.table, cache, self.stats.steps)

    def _make_requests(
        self,
        listed: abc.Sequence[Prompt],
        params: SamplingParams | abc.Sequence[SamplingParams] | None,
        *,
        special_tokens: bool = True,
    ) -> list[Request]:
        """One request per prompt, none of them queued yet, so that a bad one is found before any work."""
        each = list_params(params, len(listed))
        texts = [prompt for prompt in listed if isinstance(prompt, str)]
        encoded = iter(self._encode(texts, special_tokens=special_tokens))
        requests = []
        for index, (prompt, its_params) in enumerate(zip(listed, each, strict=True)):
            token_ids = next(encoded) if isinstance(prompt, str) else prompt
            try:
                requests.append(self._make_request(prompt, its_params, token_ids, index))
            except ArgumentError as error:
                if len(listed) == 1:
                    raise
                raise type(error)(f"prompts[{index}]: {error}") from error
        return requests

    def _make_request(
        self, prompt: Prompt, params: SamplingParams, token_ids: abc.Sequence[int], index: int = 0
    ) -> Request:
        check_prompt(prompt, token_ids, self.model)
        check_params(params, self.model)
        if params.stop_strings and self._decoder is None:
            raise ArgumentError(
                f"stop must be None, as this engine has no tokenizer to read text with; got {params.stop!r}. "
                "Fix: stop_token_ids, or pass a tokenizer"
            )
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
        return token_ids

    def _enqueue(self, request: Request) -> None:
        """Make a request live; with _news held, so that none is seen half there."""
        request.arrived = time.perf_counter()
        self.requests[request.request_id] = request
        self._scheduler.add(request)


_encoding_locks: weakref.WeakValueDictionary[int, threading.RLock] = weakref.WeakValueDictionary()
_encoding_locks_lock = threading.Lock()


def _encoding_lock(tokenizer: Any) -> threading.RLock:
    """One lock per tokenizer, for all engines that have it: it may change its settings while it encodes."""
    with _encoding_locks_lock:
        lock = _encoding_locks.get(id(tokenizer))  # whose engine keeps the tokenizer, too
        if lock is None:
            lock = _encoding_locks[id(tokenizer)] = threading.RLock()
        return lock


def _are_settled(requests: list[Request]) -> bool:
    """Whether all have finished, or one has failed."""
    return all(request.finished for request in requests) or any(request.error for request in requests)


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
