"""The engine: schedule, forward, sample, hand out, for any number of callers and threads."""

from __future__ import annotations

import os
import threading
import time
from collections import abc
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from quire.debug import debug_enabled
from quire.engine.admission import Prompt, Prompts, check_priority, list_prompts
from quire.engine.audit import audit_all, audit_counts, audit_sample
from quire.engine.beams import BeamRequest, add_candidates
from quire.engine.chat import Messages
from quire.engine.intake import Intake
from quire.engine.launch import LaunchedStep, choose_on_device, rows_of, who_chooses
from quire.engine.logprobs import TokenLogprobs, logprobs_of_choices, prompt_logprobs
from quire.engine.params import BeamSearchParams, SamplingParams
from quire.engine.progress import progress_bar
from quire.engine.rates import Rates
from quire.engine.reader import Reader, Waiter, raise_first_error
from quire.engine.request import Delta, Request, RequestOutput, interrupted_request
from quire.engine.runner import run
from quire.engine.sampler import sample
from quire.engine.scheduler import Chunk, Scheduler
from quire.engine.sequence import Sequence
from quire.engine.snapshot import Snapshot, take
from quire.engine.stats import EngineStats
from quire.engine.trace import DEFAULT_MAX_TRACE_BYTES, Trace
from quire.engine.turns import turns_of
from quire.errors import ArgumentError, OutOfPages, PageStateError, UnsupportedError
from quire.hf.transfer import to_device
from quire.pages import PageAllocator, PageTable
from quire.pages.balance import settle
from quire.spans import span
from quire.spec import check_size

if TYPE_CHECKING:
    from quire.hf import PagedModel

DEFAULT_MAX_BATCH_TOKENS = 2048
DEFAULT_MAX_NUM_SEQS = 128
SILENCE = 1.0  # seconds after which a sleeping thread sees whether anyone has run a step meanwhile


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
        self._intake = Intake(model, tokenizer)
        self.table = PageTable(model.allocator, model.page_size, model.groups)
        self.requests: dict[int, Request] = {}
        self.stats = EngineStats()
        self._scheduler = Scheduler(
            self.table,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            prefix_cache=model.prefix_cache if enable_prefix_caching else None,
            swap=model.swap,
        )
        self._debug = debug_enabled()
        # Pages come and go on other streams with a swap, and debug mode looks at every step's.
        self._runs_ahead = model.runs_ahead and model.swap is None and not self._debug
        self._ahead: LaunchedStep | None = None  # launched, and its tokens not handed out yet
        self._turns = turns_of(model.lock)
        self._turns.join(self, self._scheduler)
        self._news = threading.RLock()  # held while tokens are handed out, and while they are read
        self._reader = Reader()  # what `step` has returned of the requests of `add_request`
        self._driver: int | None = None  # the thread in _drive's loop
        self._num_turns = 0  # of steps, those with nothing to run included
        self._sleepers: dict[int, Waiter] = {}  # by thread: what it waits for while another runs steps
        self._made_at = time.perf_counter()
        self._rates = Rates()
        self._trace: Trace | None = None

    def __repr__(self) -> str:
        waiting = len(self.requests) - self.num_running
        return f"{type(self).__name__}({self.num_running} running, {waiting} waiting, {self.model!r})"

    @property
    def num_running(self) -> int:
        """Requests that hold pages; the others of `requests` wait."""
        return len(self._scheduler.running)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.requests or self._reader.requests)

    def add_request(
        self, prompt: Prompt, params: SamplingParams | BeamSearchParams | None = None, *, priority: int = 0
    ) -> int:
        """Queue a prompt, to be served by `step`.

        Args:
            prompt: text, or token ids, as for `generate`.
            params: default: SamplingParams(). With BeamSearchParams the one delta of the request is its result.
            priority: lower runs first, and takes pages and places from what runs with a higher one. None waits for
                ever: for each step of priority a request lets only those pass that arrive within a minute after it.
                Requests of one priority, also those of `generate` and `stream` with 0, run in the order of arrival.
        Returns:
            The request's id, for `abort` and to tell its deltas apart.
        Raises:
            ArgumentError: a prompt that is empty, not of this vocabulary, longer than the model
                allows, or that could not finish even with the whole pool to itself; no other
                request is touched.
        """
        check_priority(priority)
        if isinstance(params, BeamSearchParams):
            [request] = self._intake.make_beam_requests([prompt], params)
        else:
            [request] = self._intake.make_requests([prompt], params)
        request.priority = priority
        with self._news:
            self._reader.add(request)
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
        has_run = self._run_step()
        with self._news:
            if not has_run:
                self._reader.look()  # news that an interrupted step did not tell
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
        return self._turns.run(lambda: self._end([request]), self._scheduler)

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

    def snapshot(self) -> Snapshot:
        """Who owns which pages, and how it goes, as of a moment between two steps: waits for the step that runs.

        `llm.snapshot().svg()` is a picture; a notebook shows it. Within a step, as in a logits processor, it is as of
        now.

        Cost: a turn of O(num_pages + pages held) in NumPy: 1 ms for 10,000 pages.
        """
        return self._turns.look(lambda: take(self))

    @contextmanager
    def tracing(
        self, path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_TRACE_BYTES
    ) -> Iterator[None]:
        """Write a trace of the steps in a block to a file, for https://ui.perfetto.dev and `quire pages`.

        Each step by its parts, with its requests and tokens; counters of pages and requests; now and then a snapshot.
        It holds no text and no tokens. On a GPU "wait" is the time until a step's tokens have arrived; "launch" is
        then of the step after it.

        Args:
            path: overwritten. After every step it is a whole JSON file, also where the process is killed.
            max_bytes: when so many are written the trace ends, with a warning of the logger "quire".
        Raises:
            ArgumentError: no regular file can be written there, someone else writes a trace there, or max_bytes is too
                small.
            UnsupportedError: this engine writes a trace already.
        Cost: some tenths of a millisecond and about 2 KiB per step; outside of the block nothing.
        """
        trace = Trace(path, max_bytes=max_bytes)
        try:
            with self._news:
                if self._trace is not None:
                    raise UnsupportedError(
                        f"an engine must write one trace at a time; got {os.fspath(path)!r} while one is written to "
                        f"{self._trace.path!r}. Fix: call tracing again after the first block"
                    )
                self._trace = trace
            yield
        finally:
            if self._trace is trace:
                self._trace = None
            trace.close()

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
            prompts: text, token ids, or a list of these. Token ids may be lists, what a tokenizer returns, NumPy arrays
                or torch tensors, of which each row is a prompt; what an attention mask rules out is left out.
            params: for all prompts, or one per prompt; default: SamplingParams(), what the model's config says.
            progress: show a progress bar on stderr; None: when stderr is a terminal.
        Returns:
            One output per prompt, in their order; also for a single prompt a list.
        Raises:
            ArgumentError: a prompt that cannot be served (see `add_request`), named by its index
                and before any work is done; also where the rules of a request left no token to choose.
            Exception: what a logits processor of one of these requests raised; the rest of them are aborted.
        """
        return self._complete(self._intake.make_requests(list_prompts(prompts), params), progress)

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
        return self._complete(self._intake.make_chat_requests(messages, params), progress)

    def _complete(self, requests: list[Request], progress: bool | None) -> list[RequestOutput]:
        with progress_bar(len(requests), shown=progress) as advance:
            with self._serving(requests, whole=advance is None) as reader:
                if advance is None:
                    self._drive(reader)
                else:
                    for deltas in self._read(reader):
                        advance(deltas)
                raise_first_error(requests)
            return [request.output() for request in requests]

    def beam_search(
        self,
        prompts: Prompts,
        params: BeamSearchParams | abc.Sequence[BeamSearchParams],
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Search the likeliest texts of prompts, all of them served together, and with the requests of other threads.

        The beams of a prompt share its pages, and those of the texts that they have in common; a page is copied when
        two of them write it, and a beam that is given up gives its pages back in the same step.

        Args:
            prompts: text, token ids, or a list of these. Token ids may be lists, what a tokenizer returns, NumPy arrays
                or torch tensors, of which each row is a prompt; what an attention mask rules out is left out.
            params: for all prompts, or one per prompt.
            progress: as for `generate`.
        Returns:
            One output per prompt, in their order. `outputs` holds the texts found, the best first, each with its
            `score` and `cumulative_logprob`; at most beam_width, fewer where so few tokens are possible.
        Raises:
            ArgumentError: a prompt that cannot be served, beams that would not fit the pool, or logits that are no
                numbers.
        Cost: a softmax and a partial sort of the vocabulary per beam and step, and one copy of the results to the host.
        """
        return self._complete(self._intake.make_beam_requests(list_prompts(prompts), params), progress)

    def stream(
        self, prompts: Prompts, params: SamplingParams | abc.Sequence[SamplingParams] | None = None
    ) -> Generator[Delta, None, None]:
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
        return self._stream(self._intake.make_requests(list_prompts(prompts), params))

    def stream_chat(
        self,
        messages: Messages | abc.Sequence[Messages],
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
    ) -> Generator[Delta, None, None]:
        """Write the next turn of conversations, as `chat` does, and hand out each token as it comes.

        Args:
            messages, params: as for `chat`.
        Returns:
            An iterator of deltas, as of `stream`; `delta.index` tells the conversations apart.
        Raises:
            ArgumentError, UnsupportedError: as `chat`, at the call.
        """
        return self._stream(self._intake.make_chat_requests(messages, params))

    def _stream(self, requests: list[Request]) -> Generator[Delta, None, None]:
        with self._serving(requests) as reader:
            for deltas in self._read(reader):
                yield from deltas

    def _read(self, reader: Reader) -> Iterator[list[Delta]]:
        while reader.requests:
            self._drive(reader)
            with self._news:
                deltas = reader.read()
            yield deltas

    @contextmanager
    def _serving(self, requests: list[Request], *, whole: bool = False) -> Iterator[Reader]:
        reader = Reader(requests, whole=whole)
        try:
            with self._news:
                for request in requests:
                    self._enqueue(request)
            yield reader
        finally:
            for request in requests:
                request.reader = None
            self._give_up(requests)

    def _drive(self, reader: Waiter) -> None:
        """Run steps until a reader has news, or sleep until then while another thread runs them."""
        self._turns.check_may_wait()
        thread = threading.get_ident()
        try:
            with self._news:
                while not reader.has_news() and self._driver not in (None, thread):
                    self._sleep(reader)
                if reader.has_news():
                    return
                self._driver = thread
            while not reader.has_news():
                if not self._run_step() and not reader.has_news():
                    with self._news:
                        reader.look()
                    self._turns.wait()
        finally:
            with self._news:
                if self._driver in (None, thread):
                    self._hand_over()

    def _hand_over(self) -> None:
        """Let a sleeping thread run the steps, one that does not leave at once with its news; with _news held."""
        self._driver = None
        for thread, reader in self._sleepers.items():
            if not reader.has_news():
                self._driver = thread
                if reader.wake is not None:
                    reader.wake()
                break

    def _sleep(self, reader: Waiter) -> None:
        """Sleep until a reader has news or this thread is to run steps; with _news held."""
        thread = threading.get_ident()
        condition = threading.Condition(self._news)  # its own: nobody is woken for another's tokens
        num_turns = self._num_turns
        reader.wake = condition.notify
        self._sleepers[thread] = reader
        try:
            # Whoever was interrupted as it left or before it told its news, or whose thread is gone, wakes nobody.
            if not condition.wait(SILENCE):
                reader.look()
                if num_turns == self._num_turns and not self._turns.has_owner:
                    self._driver = None  # two drivers do no harm
        finally:
            reader.wake = None
            self._sleepers.pop(thread, None)

    def _run_step(self) -> bool:
        """Schedule, forward, sample, hand out; False when nothing can run."""
        self._num_turns += 1
        return self._turns.run(
            self._step_in_turn if self._trace is None else self._traced_step, self._scheduler
        )

    def _traced_step(self) -> bool:
        trace = self._trace
        if trace is None:  # its block has just ended
            return self._step_in_turn()
        with trace.step(self):
            return self._step_in_turn()

    def _step_in_turn(self) -> bool:
        try:
            audit_counts(self.table.allocator, self._num_turns, whole=self._debug)
            start = time.perf_counter()
            step, self._ahead = self._ahead, None
            if step is None or not step.is_current:
                with span("schedule"):
                    chunks = self._schedule()
                if not chunks:
                    return False
                step = self._launch(chunks)
            self._ahead = self._launch_ahead(step)
            with span("hand out"):
                self._hand_out_all(step)
            if self._ahead is not None and not self._ahead.is_current:
                self._ahead = None
            end = time.perf_counter()
            self._rates.count(start, end, self.stats.generated_tokens)
            if self.model.swap is not None:
                num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
                self.model.swap.costs.observe(num_tokens, end - start)
            return True
        except BaseException as error:
            if isinstance(error, PageStateError):
                self.model.prefix_cache.clear()  # or the next step would find the same page again
            try:
                self._recover()
            except ArgumentError as wrong:  # pages that someone else freed; what the step found says more
                raise error from wrong
            raise

    def _launch(self, chunks: list[Chunk], input_ids: torch.Tensor | None = None) -> LaunchedStep:
        self._count(chunks)
        self._audit(chunks)
        logits = run(self.model, chunks, self.table, input_ids)
        self._scheduler.release_sources()
        if not self._runs_ahead:
            return LaunchedStep(chunks, logits)
        return choose_on_device(chunks, logits, ahead=int(input_ids is not None))

    def _launch_ahead(self, step: LaunchedStep) -> LaunchedStep | None:
        """Launch the next step while this one runs; None where its tokens must be known first."""
        if step.tokens is None:
            return None
        with span("schedule"):
            chunks = self._scheduler.schedule_ahead([chunk for chunk in step.chunks if chunk.is_current])
        if not chunks:
            return None
        tokens = step.tokens
        if len(chunks) < len(tokens):
            tokens = tokens[to_device(torch.tensor(rows_of(step, chunks)), tokens.device)]
        return self._launch(chunks, tokens)

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
                f"the pool must have pages for the most urgent request; got {allocator.num_available} free of "
                f"{allocator.num_pages}, with none held by another running request. "
                "Fix: free what else was allocated from engine.table.allocator"
            )

    def _hand_out_all(self, step: LaunchedStep) -> None:
        """Choose what follows each sequence whose tokens are all computed, and hand it out."""
        if step.arrive is not None:
            with span("wait"):
                tokens = step.arrive()
            chosen = [(c, token) for c, token in zip(step.chunks, tokens, strict=True) if c.is_current]
            with self._news:
                self._scheduler.advance([chunk for chunk, _ in chosen])
                interruptions = [
                    self._hand_out(chunk.request, chunk.sequence, token, None) for chunk, token in chosen
                ]
            _raise_first(interruptions)
            return
        chunks, logits = step.chunks, step.logits
        complete = [chunk for chunk in chunks if chunk.is_last]
        choosing, rows, beams = who_chooses(complete)
        sequences = [sequence for _, sequence in choosing]
        # Samples of one prompt choose their first tokens from the same row.
        of_last = logits[: len(complete)] if len(rows) == len(complete) and not beams else logits[rows]
        with span("sample"):
            choices = sample(of_last, sequences) if sequences else []
        logprobs = logprobs_of_choices(of_last, sequences, choices)
        of_prompts = prompt_logprobs(logits[len(complete) :], chunks)
        add_candidates(logits, beams)
        with self._news:
            for request, found in of_prompts:
                assert request.prompt_logprobs is not None
                request.prompt_logprobs += found
            self._scheduler.advance(chunks)
            for search in {request.request_id: request for _, request, _ in beams}.values():
                if search.is_ready:
                    self._regroup(search)
            interruptions = [
                self._hand_out(request, sequence, choice, logprobs.get(place))
                for place, ((request, sequence), choice) in enumerate(zip(choosing, choices, strict=True))
            ]
        _raise_first(interruptions)

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
        request.tell()  # before it is forgotten: interrupted here, `_recover` finds it and tells again
        if sequence.finish_reason is not None:
            self._scheduler.finish(request, sequence)
            if request.finished:
                self._rates.end(request)
                del self.requests[request.request_id]
        if request.error is not None:
            self._end([request])
        return interruption

    def _regroup(self, search: BeamRequest) -> None:
        """Let the best continuations of beams go on, and hand the result out once the search has ended."""
        try:
            regrouping = search.regroup()
        except Exception as error:
            search.error = error
            self._end([search])
            search.tell()
            return
        self._scheduler.regroup(regrouping.forks, regrouping.ended)
        search.accept(regrouping.generation)
        if search.finished:
            self.stats.generated_tokens += sum(len(each.tokens) for each in regrouping.generation.hypotheses)
            self._scheduler.remove(search)
            del self.requests[search.request_id]
            search.tell()

    def _end(self, requests: list[Request]) -> bool:
        """Abort what has not finished of requests, in a turn; returns whether any had not.

        Interrupted, Ctrl-C, it does the rest when the turn ends.
        """
        try:
            with self._news:
                live = [request for request in requests if request.request_id in self.requests]
                aborts = not all(request.finished for request in live)
                for request in live:
                    self._scheduler.remove(request)
                    request.abort()
                    request.tell()
                    del self.requests[request.request_id]  # last: until then it is found again
            return aborts
        except BaseException as error:
            if not isinstance(error, Exception):
                self._turns.defer(lambda: self._end(requests))
                settle(self.table.allocator)
            raise

    def _give_up(self, requests: list[Request]) -> None:
        """Abort what has not finished of requests, after the step that runs now; never waits."""
        if not all(request.finished for request in requests):
            # Deferred: the garbage collector may run this in the middle of a step.
            self._turns.defer(lambda: self._end(requests))

    def _recover(self) -> None:
        """Bring queues and pages in order after a step that broke off, wherever that was; in a turn."""
        self._ahead = None
        try:
            self._scheduler.preempt_all()
        finally:
            settle(self.table.allocator)
        self._end([request for request in list(self.requests.values()) if request.finished])

    def _count(self, chunks: abc.Sequence[Chunk]) -> None:
        if self._trace is not None:
            self._trace.note(chunks)
        stats = self.stats
        stats.steps += 1
        stats.computed_tokens += sum(chunk.num_tokens for chunk in chunks)
        admitted, cached, returned = self._scheduler.hits.take_counts()
        stats.admitted_tokens += admitted
        stats.cached_tokens += cached
        stats.returned_tokens += returned
        if self.model.swap is not None:
            stats.swapped_pages = self.model.swap.num_swapped
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

    def _enqueue(self, request: Request) -> None:
        """Make a request live; with _news held, so that none is seen half there."""
        request.arrive()
        self.requests[request.request_id] = request
        self._scheduler.add(request)


def _raise_first(interruptions: abc.Iterable[BaseException | None]) -> None:
    for interruption in interruptions:
        if interruption is not None:
            raise interruption
