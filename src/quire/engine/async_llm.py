"""An engine for coroutines: one thread runs the steps, any number of coroutines wait for what their requests gain."""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from os import PathLike
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel

from quire.assets import DEMO_MODEL
from quire.engine.admission import Prompt
from quire.engine.chat import Messages
from quire.engine.core import Engine
from quire.engine.llm import LLM
from quire.engine.params import BeamSearchParams, SamplingParams
from quire.engine.reader import Reader
from quire.engine.request import Delta, Request, RequestOutput
from quire.errors import ArgumentError, QuireError, UnsupportedError
from quire.hf import PagedModel


class AsyncLLM:
    """A language model on pages for coroutines; all that wait at once are served in one batch.

        async with quire.AsyncLLM() as llm:  # or quire.AsyncLLM("path/to/model")
            async for output in llm.generate("def fibonacci(n):", quire.SamplingParams(max_tokens=64)):
                print(output.text)  # so far
            output = await llm.generate("import os")  # whole

    **Names** are those of vLLM's AsyncLLM: `generate` gives RequestOutputs that grow, the last one `finished`; several
    tokens that came while nobody looked make one output. There are no request ids to think up: what `generate`
    returns stands for the request, and cancelling the coroutine that waits for it, closing it or dropping it aborts
    the request.

    **Threads.** A thread of its own runs the steps, from the first request on and only while there are requests. An
    event loop never waits for a step, and is woken once for all of its coroutines' tokens of a step. Coroutines may
    belong to any number of loops. `engine` may be used from other threads meanwhile, as may other engines on its model:
    see Engine.

    **Failures.** What fails for one request is raised to the coroutine that waits for it, and to no other. A step that
    fails in this thread, as when memory runs out, ends all requests of this AsyncLLM: each coroutine gets a QuireError
    whose `__cause__` is what was raised. Later requests are served.

    Args:
        model: what LLM takes, or an Engine, whose batch the coroutines then join.
        options: as for LLM; none beside an Engine.
    Attributes:
        engine: the LLM, or the Engine given: stats, prefix cache, model. Its methods wait for steps: call them in
            another thread, as by asyncio.to_thread.
    Raises:
        ArgumentError: options beside an Engine; and what LLM raises.
    """

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel | PagedModel | Engine = DEMO_MODEL,
        **options: Any,
    ) -> None:
        if isinstance(model, Engine) and options:
            raise ArgumentError(
                f"{', '.join(options)} must be left out, as an Engine has them already; got {options!r:.60}. "
                "Fix: give them to the Engine"
            )
        self.engine = model if isinstance(model, Engine) else LLM(model, **options)
        self._worker = _Worker(self.engine)
        finalizer = weakref.finalize(self, self._worker.close)
        finalizer.atexit = False  # _close_all waits for the thread then

    def __repr__(self) -> str:
        return f"AsyncLLM({self.engine!r})"

    def generate(self, prompt: Prompt, params: SamplingParams | BeamSearchParams | None = None) -> Answer:
        """Complete a prompt, or search its likeliest texts.

        Args:
            prompt: text, or token ids, as for `Engine.generate`.
            params: default: SamplingParams(), what the model's config says. With BeamSearchParams the answer is that of
                `Engine.beam_search`; as any beam may still be given up, iterating it gives one output, the whole.
        Returns:
            An Answer, to be awaited or iterated: nothing is done before. The prompt is checked and encoded in a thread
            of the event loop's executor, so that a long one holds up no other coroutine.
        """

        def make() -> list[Request]:
            intake = self.engine._intake  # self: the answer keeps the AsyncLLM
            if isinstance(params, BeamSearchParams):
                return intake.make_beam_requests([prompt], params)
            return intake.make_requests([prompt], params)

        return Answer(self._worker, make)

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> Answer:
        """Write the next turn of a conversation, by the tokenizer's chat template; see `Engine.chat`.

        Args:
            messages: one conversation, [{"role": "user", "content": "…"}, …].
            params: default: SamplingParams(), what the model's config says.
        Returns:
            An Answer, as of `generate`.
        """
        return Answer(self._worker, lambda: self.engine._intake.make_chat_requests(messages, params))

    def shutdown(self) -> None:
        """Abort what has not finished, and wait for the step that runs now; coroutines get what they have so far.

        Afterwards requests are refused. `async with` calls this, and the interpreter at its exit.

        Raises:
            UnsupportedError: this thread holds `model.lock` or is inside a step, which would never end.
        """
        self.engine._turns.check_may_wait()
        self._worker.close()
        self._worker.join()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.shutdown)


class Answer:
    """A request of one coroutine: its whole result when awaited, what it gains when iterated.

    Await it for the RequestOutput, which costs one wake-up; iterate it for RequestOutputs that grow, whose lists are
    copied each time; iterate `deltas()` for what is new alone. It may be awaited after a part of it was iterated, and
    more than once.

    Cancelling a wait, also by a timeout, aborts the request, as do `aclose` and dropping the answer; its pages are free
    after the step that runs now. A coroutine that waits while another calls `aclose` gets what came until then.

    Raises:
        ArgumentError: when first awaited: a prompt or parameters that cannot be served.
        UnsupportedError: several coroutines wait for it at once; it is awaited after it was closed; the AsyncLLM is
            shut down.
        Exception: what ended the request, as a logits processor's; QuireError where a step failed.
    """

    def __init__(self, worker: _Worker, make: Callable[[], list[Request]]) -> None:
        self._worker = worker
        self._make: Callable[[], list[Request]] | None = make  # and keeps the AsyncLLM until the end
        self._reader: _AnswerReader | None = None  # from the first wait to the end
        self._output: RequestOutput | None = None  # the whole one
        self._is_closed = False
        self._is_awaited = False

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_closed:
            raise StopAsyncIteration
        _, output = await self._next(with_output=True)
        assert output is not None
        return output

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._whole().__await__()

    async def _whole(self) -> RequestOutput:
        while self._output is None:
            if self._is_closed:
                raise UnsupportedError(
                    "an answer must be awaited before it ends by a failure, by cancelling or by aclose; got one that "
                    "has. Fix: generate again"
                )
            await self._next(whole=True)
        return self._output

    def deltas(self) -> AsyncIterator[Delta]:
        """What the request gains, as `Engine.stream` hands it out; the last delta has the whole output."""
        return _Deltas(self)

    async def aclose(self) -> None:
        """Abort the request if it has not finished; iterating then ends."""
        self._close()

    def __del__(self) -> None:
        self._close()

    async def _next(
        self, *, whole: bool = False, with_output: bool = False
    ) -> tuple[list[Delta], RequestOutput | None]:
        """Wait for news and read it; whole: wait for the end."""
        if self._is_awaited:
            raise UnsupportedError(
                "an answer must be awaited by one coroutine at a time; got a second one. Fix: share what the first gets"
            )
        self._is_awaited, reader = True, self._reader
        try:
            if reader is None:
                reader = await self._begin()
            await reader.news(whole=whole)
            with self._worker.lock:
                deltas = reader.read()
                output = deltas[-1].output if deltas else None
                if output is not None:
                    self._output = output
                    self._close()
                elif with_output:
                    output = reader.request.output()
            return deltas, output
        except BaseException:  # the request's own failure, or the coroutine is cancelled
            self._close()
            raise
        finally:
            self._is_awaited = False
            if self._is_closed and reader is not None:
                reader.leave()

    async def _begin(self) -> _AnswerReader:
        assert self._make is not None
        requests = await asyncio.get_running_loop().run_in_executor(None, self._make)
        if len(requests) != 1:
            raise ArgumentError(
                f"messages must be one conversation; got {len(requests)}. Fix: chat once for each, asyncio.gather"
            )
        if self._is_closed:
            raise UnsupportedError(
                "an answer must not be closed before its request is made; got aclose. Fix: cancel"
            )
        self._reader = self._worker.start(requests[0])
        return self._reader

    def _close(self) -> None:
        self._is_closed = True
        self._make = None
        reader, self._reader = self._reader, None
        if reader is not None:
            self._worker.give_up(reader.request)
            if not self._is_awaited:
                reader.leave()


class _Deltas:
    """Iterates what an answer gains."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._read: deque[Delta] = deque()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._read:
            if self._answer._is_closed:
                raise StopAsyncIteration
            self._read += (await self._answer._next())[0]
        return self._read.popleft()


class _AnswerReader(Reader):
    """Reads one request for a coroutine, which is woken through the mailbox of its loop."""

    def __init__(self, request: Request, worker: _Worker) -> None:
        super().__init__([request])
        self.request = request
        self._worker = worker

    def note(self, request: Request) -> None:
        """A request has gained something."""
        super().note(request)
        if request.finished:
            self._worker.forget(request)

    def leave(self) -> None:
        """Hear of the request no more; they would keep each other."""
        self.request.reader = None

    async def news(self, *, whole: bool) -> None:
        """Sleep until there is news; whole: until the request has ended."""
        loop, worker = asyncio.get_running_loop(), self._worker
        with worker.lock:
            self.whole = whole
            if self.has_news():
                return
            mailbox, waiter = worker.mailbox(loop), loop.create_future()

            def wake() -> None:
                self.wake = None
                if not mailbox.post(waiter):
                    worker.give_up(self.request)

            self.wake = wake
        await waiter


class _Mailbox:
    """Wakes a loop once for all of its coroutines that have news.

    Args:
        lock: held by whoever posts.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, lock: threading.RLock) -> None:
        self._loop = loop
        self._lock = lock
        self._posted: list[asyncio.Future[None]] = []

    def post(self, waiter: asyncio.Future[None]) -> bool:
        """Make a future of the loop done, soon; False where the loop is closed, so that nobody waits any more."""
        if self._loop.is_closed():
            return False
        self._posted.append(waiter)
        if len(self._posted) == 1:
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # closed since
                return False
        return True

    def _deliver(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
        for waiter in posted:
            if not waiter.done():
                waiter.set_result(None)


class _Worker:
    """The thread that runs steps while a request of a coroutine lives.

    It waits in the engine like every other caller's thread, so that steps may also be run by these. It keeps the
    engine, and nobody but the thread keeps it when its AsyncLLM is gone.

    Attributes:
        lock: the engine's lock for tokens.
        wake: see `Waiter`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.lock = engine._news
        self.wake: Callable[[], object] | None = None
        self._arrived = threading.Condition(self.lock)
        self._live: dict[Request, None] = {}
        self._is_closed = False
        self._thread: threading.Thread | None = None
        # By the id of a loop, which its mailbox keeps.
        self._mailboxes: weakref.WeakValueDictionary[int, _Mailbox] = weakref.WeakValueDictionary()
        _workers.add(self)

    def has_news(self) -> bool:
        """Whether the thread has nothing more to wait for."""
        return self._is_closed or not self._live

    def look(self) -> None:
        """Let every request tell again, where an interrupted thread may not have."""
        for request in list(self._live):
            if request.finished or request.error is not None:
                request.tell()

    def start(self, request: Request) -> _AnswerReader:
        """Queue a request.

        Raises:
            UnsupportedError: the worker is closed.
        """
        with self.lock:
            if self._is_closed:
                raise UnsupportedError(
                    "an AsyncLLM must not be shut down when a request is made; got one that is. "
                    "Fix: make another AsyncLLM"
                )
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="quire steps", daemon=True)
                thread.start()
                self._thread = thread
            reader = _AnswerReader(request, self)
            self._live[request] = None
            self._engine._enqueue(request)
            self._arrived.notify()
        return reader

    def mailbox(self, loop: asyncio.AbstractEventLoop) -> _Mailbox:
        """The one mailbox of a loop; with the lock held."""
        mailbox = self._mailboxes.get(id(loop))
        if mailbox is None:
            mailbox = self._mailboxes[id(loop)] = _Mailbox(loop, self.lock)
        return mailbox

    def forget(self, request: Request) -> None:
        """Run no steps for a request any more; with the lock held."""
        self._live.pop(request, None)
        if self.wake is not None and self.has_news():
            self.wake()

    def give_up(self, request: Request) -> None:
        """Abort a request if it has not finished; never waits for a step, so finalizers may call it."""
        with self.lock:
            self.forget(request)
        self._engine._give_up([request])

    def close(self) -> None:
        """Let the thread end what lives, and end."""
        with self.lock:
            self._is_closed = True
            self._arrived.notify()
            if self.wake is not None:
                self.wake()

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self.lock:
                while self.has_news() and not self._is_closed:
                    self._arrived.wait()
                if self._is_closed:
                    break
            try:
                self._engine._drive(self)
            except BaseException as error:  # of a step: without its requests it would be run again for ever
                self._fail(error)
        live, engine = list(self._live), self._engine
        if live:
            engine._turns.run(lambda: engine._end(live), engine._scheduler)

    def _fail(self, error: BaseException) -> None:
        with self.lock:
            live = list(self._live)
            for request in live:
                if not request.finished:
                    request.error = _failed_step(request.request_id, error)
        self._engine._give_up(live)


def _failed_step(request_id: int, error: BaseException) -> QuireError:
    failed = QuireError(
        f"request {request_id} must be served by steps that do not fail; got {type(error).__name__}: "
        f"{error!s:.200}. Fix: see __cause__, and ask again"
    )
    failed.__cause__ = error
    return failed


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End every thread before the interpreter does: one that is in a step then would crash."""
    for worker in list(_workers):
        worker.close()
    for worker in list(_workers):
        worker.join()
