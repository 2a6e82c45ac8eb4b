"""What a caller's requests have gained, who has read how much of it, and who is to be woken for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from quire.engine.request import Delta, Request
from quire.engine.sequence import Sequence


class Waiter(Protocol):
    """What a thread may wait for while others run steps; `Reader` says what its members mean."""

    wake: Callable[[], object] | None

    def has_news(self) -> bool: ...

    def look(self) -> None: ...


class Reader:
    """Reads what a caller's requests gain, every token once.

    Each caller reads only its own requests, whichever thread ran the step. Hold the engine's lock for tokens while
    calling anything here.

    Args:
        requests: those to read, none of them queued yet; each tells its reader what it gains.
        whole: news is only that all requests have finished, or that one has failed.
    Attributes:
        requests: those not yet read to their end, in the order of arrival.
        wake: called as soon as there is news, with the lock held; None while nobody sleeps.
    Cost: what a request gains costs the same however many others are read here.
    """

    def __init__(self, requests: Iterable[Request] = (), *, whole: bool = False) -> None:
        self.requests: dict[Request, None] = {}
        self.whole = whole
        self.wake: Callable[[], object] | None = None
        self._unfinished: set[Request] = set()
        self._fresh: dict[Request, None] = {}  # have gained something since they were read
        self._has_failed = False
        self._seen: dict[Sequence, tuple[int, int]] = {}  # tokens and characters
        for request in requests:
            self.add(request)

    def add(self, request: Request) -> None:
        """Read a request too, one that is not queued yet."""
        self.requests[request] = None
        self._unfinished.add(request)
        request.reader = self

    def note(self, request: Request) -> None:
        """A request has gained a token, has finished or has failed."""
        if request not in self.requests:
            return
        self._fresh[request] = None
        if request.finished:
            self._unfinished.discard(request)
        self._has_failed |= request.error is not None
        if self.wake is not None and self.has_news():
            self.wake()

    def look(self) -> None:
        """Note what requests have gained that nobody told, as whoever Ctrl-C interrupted; looks at all of them."""
        for request in tuple(self.requests):
            if (
                request.finished
                or request.error is not None
                or any(len(sequence.tokens) > self._seen_of(sequence)[0] for sequence in request.streamed)
            ):
                self.note(request)

    def has_news(self) -> bool:
        """Whether `read` would give anything; of a `whole` one: whether its caller need not wait any more."""
        if self.whole:
            return self._has_failed or not self._unfinished
        return bool(self._fresh)

    def read(self) -> list[Delta]:
        """What came since the last time, in the order of arrival.

        Raises:
            Exception: what ended a request before its time, once; the next call goes on.
        """
        fresh = sorted(self._fresh, key=lambda request: request.request_id)
        raise_first_error(fresh)
        deltas = []
        for request in fresh:
            deltas += self._read_request(request)
            del self._fresh[request]
            if request.finished:
                self.forget(request)
        return deltas

    def forget(self, request: Request) -> None:
        """Read no more of a request, if it was read here at all."""
        self.requests.pop(request, None)
        self._fresh.pop(request, None)
        self._unfinished.discard(request)
        for sequence in request.sequences:
            self._seen.pop(sequence, None)

    def _read_request(self, request: Request) -> list[Delta]:
        deltas = []
        for index, sequence in enumerate(request.streamed):
            tokens, chars = self._seen_of(sequence)
            text, token_ids = sequence.text[chars:], sequence.tokens[tokens:].tolist()
            if text or token_ids:
                shown = sequence.shown_logprobs()
                new = shown if shown is None else shown[tokens - sequence.num_prompt_tokens :]
                deltas.append(
                    Delta(request.request_id, request.index, text, token_ids, sequence=index, logprobs=new)
                )
                self._seen[sequence] = (tokens + len(token_ids), chars + len(text))
        if request.finished:
            output = request.output()
            if deltas:
                last = deltas.pop()
            elif request.streamed:
                last = Delta(request.request_id, request.index, "", [])
            else:
                last = Delta(request.request_id, request.index, output.text, output.token_ids)
            deltas.append(replace(last, output=output))
        return deltas

    def _seen_of(self, sequence: Sequence) -> tuple[int, int]:
        return self._seen.get(sequence) or (sequence.num_prompt_tokens, 0)


def raise_first_error(requests: Iterable[Request]) -> None:
    """Raise what ended one of these requests before its time, so that its caller sees it once."""
    for request in requests:
        if request.error is not None:
            error, request.error = request.error, None
            raise error
