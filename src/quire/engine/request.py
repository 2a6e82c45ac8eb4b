"""A request while it lives, what comes back from it, and who has read how much of it."""

from __future__ import annotations

import functools
import time
from collections import abc
from collections.abc import Iterable
from dataclasses import dataclass, replace

from quire.engine.logprobs import Logprob, TokenLogprobs
from quire.engine.sequence import FinishReason, Sequence
from quire.errors import QuireError


@dataclass(frozen=True)
class CompletionOutput:
    """What one sequence of a request generated.

    Attributes:
        index: its place among the sequences of the request.
        text: the generated text, by default without stop string and special tokens.
        token_ids: every generated token, the one that ended the sequence included.
        finish_reason: "stop" (end-of-text, stop token or stop string), "length" (max_tokens or the
            model's longest sequence), "abort".
        cumulative_logprob: the sum of the generated tokens' logprobs; None unless SamplingParams.logprobs asked, or of
            a beam search.
        logprobs: for each generated token those of it, first, and of the likeliest, by token id; None unless asked.
        score: of a beam search, by which its texts are ordered: cumulative_logprob divided by the number of generated
            tokens, the one that ended it included, to the power of length_penalty.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    score: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """One finished request.

    Attributes:
        prompt: the prompt's text; None when token ids were given.
        outputs: one per sample, or the texts of a beam search, the best first; `text`, `token_ids` and `finish_reason`
            are the first one's.
        time_to_first_token, seconds: from the request's arrival; time_to_first_token is None when no
            token was generated.
        preemptions: how often the request gave its pages back and was computed again.
        num_cached_tokens: tokens of the prompt that were found in pages and not computed.
        hit: the same in a sentence, and why no more were found; "" where the request never ran.
        prompt_logprobs: for each token of the prompt those of it, first, and of the likeliest, by token id; None for
            the first, before which there is nothing. None unless SamplingParams.prompt_logprobs asked. Of a
            request aborted inside its prompt, those so far.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    time_to_first_token: float | None
    seconds: float
    preemptions: int
    num_cached_tokens: int = 0
    hit: str = ""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def text(self) -> str:
        """The first sequence's text."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first sequence's tokens."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sequence ended."""
        return self.outputs[0].finish_reason


@dataclass(frozen=True)
class Delta:
    """What a sequence of a request gained since it was last looked at. A beam search has one alone: its best text.

    Attributes:
        index: position of the prompt among those of the same `stream` call, else 0.
        text: new text; "" while a character or a possible stop string is incomplete.
        token_ids: new tokens.
        output: the whole result, with the last delta of a request that has finished.
        sequence: which sequence of the request.
    """

    request_id: int
    index: int
    text: str
    token_ids: list[int]
    output: RequestOutput | None = None
    sequence: int = 0

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ended; None before the last delta of its request."""
        return None if self.output is None else self.output.outputs[self.sequence].finish_reason


HEAD_START = (
    60.0  # seconds by which a request may arrive later and still be as urgent as one a priority above it
)


class Request:
    """A prompt of a caller: a group of sequences that begin with it, and that run and give up pages together.

    Its request_id is the seq_id of its first sequence. A beam search is a `BeamRequest`.

    Args:
        sequences: at least one.
        prompt: the prompt's text, if it was text.
        index: position of the prompt in its caller's list.
    Attributes:
        priority: lower runs first; counts from the next `arrive` on.
        urgency: sorts requests, the one to be served first before the others; fixed by arrival and priority.
        prompt_logprobs: how likely the prompt's tokens were, from the second on, as far as they were computed; None
            where nobody asked. Until all are here, no more than the first len(prompt_logprobs) tokens of the prompt
            may be taken from pages that someone else computed.
        leader: while it runs, the sequence that computes the prompt for all of them; None once each computes its own
            tokens, as one alone does from the beginning.
    """

    def __init__(
        self,
        sequences: abc.Sequence[Sequence],
        prompt: str | None = None,
        index: int = 0,
    ) -> None:
        self._sequences = list(sequences)
        self.request_id = sequences[0].seq_id
        self.prompt = prompt
        self.index = index
        self.preemptions = 0
        self.num_cached_tokens = 0
        self.hit = ""  # how much of the prompt was found in pages, and why no more
        self.leader: Sequence | None = None
        self.error: Exception | None = None  # what ended it, for its caller to see
        self.prompt_logprobs: list[TokenLogprobs] | None = (
            None if sequences[0].params.prompt_logprobs is None else []
        )
        self.priority = 0
        self.arrive()

    def arrive(self) -> None:
        """Count from now: a request of lower priority that arrives within its head start is more urgent."""
        self.arrived = time.perf_counter()
        self.urgency = (self.arrived + self.priority * HEAD_START, self.arrived)

    @property
    def sequences(self) -> abc.Sequence[Sequence]:
        """Its sequences, those that have finished included."""
        return self._sequences

    @property
    def streamed(self) -> abc.Sequence[Sequence]:
        """The sequences whose tokens are handed out as they come."""
        return self._sequences

    @property
    def num_to_come(self) -> int:
        """How many sequences will begin as forks of those it has, each with a page of its own."""
        return 0

    @property
    def finished(self) -> bool:
        """Whether all sequences have."""
        for sequence in self.sequences:  # noqa: SIM110  # asked of every request in every step
            if sequence.finish_reason is None:
                return False
        return True

    def live(self) -> list[Sequence]:
        """The sequences that have not finished."""
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether logits of its prompt are still wanted, so that the prompt has to be computed."""
        wanted = self.sequences[0].num_prompt_tokens - 1
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < wanted

    def abort(self) -> None:
        """Finish every sequence that has not; what fails on the way is left for the request's caller."""
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                try:
                    sequence.finish("abort")
                except Exception as error:
                    self.error = self.error or error

    def output(self) -> RequestOutput:
        """The result of a finished request."""
        first = self.sequences[0]
        began = [
            sequence.first_token_at for sequence in self.sequences if sequence.first_token_at is not None
        ]
        return self._output(
            first.tokens[: first.num_prompt_tokens].tolist(),
            [_completion(index, sequence) for index, sequence in enumerate(self.sequences)],
            min(began, default=None),
            max(sequence.finished_at for sequence in self.sequences),
        )

    def _output(
        self,
        prompt_token_ids: list[int],
        outputs: list[CompletionOutput],
        first_token_at: float | None,
        finished_at: float,
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=outputs,
            time_to_first_token=None if first_token_at is None else first_token_at - self.arrived,
            seconds=finished_at - self.arrived,
            preemptions=self.preemptions,
            num_cached_tokens=self.num_cached_tokens,
            hit=self.hit,
            prompt_logprobs=None
            if self.prompt_logprobs is None
            else [None, *_as_dicts(self.sequences[0], self.prompt_logprobs)],
        )


def _completion(index: int, sequence: Sequence) -> CompletionOutput:
    assert sequence.finish_reason is not None
    tokens = sequence.tokens[sequence.num_prompt_tokens :].tolist()
    found = sequence.logprobs
    return CompletionOutput(
        index,
        sequence.text,
        tokens,
        sequence.finish_reason,
        cumulative_logprob=None if found is None else sum(each.logprobs[0] for each in found),
        logprobs=None if found is None else _as_dicts(sequence, found),
    )


def _as_dicts(sequence: Sequence, found: abc.Sequence[TokenLogprobs]) -> list[dict[int, Logprob]]:
    decode = functools.cache(sequence.decode)  # a text repeats its likely tokens
    return [each.as_dict(decode) for each in found]


class Reader:
    """Reads what a caller's requests gain, every token once.

    Each caller reads only its own requests, whichever thread ran the step. Hold the engine's lock for tokens while
    reading.
    """

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self.requests = list(requests)  # those not yet read to their end
        self._seen: dict[Sequence, tuple[int, int]] = {}  # tokens and characters

    def has_news(self) -> bool:
        """Whether `read` would give anything."""
        return any(
            request.finished or any(len(s.tokens) > self._seen_of(s)[0] for s in request.streamed)
            for request in self.requests
        )

    def read(self) -> list[Delta]:
        """What came since the last time, in the order of arrival.

        Raises:
            Exception: what ended a request before its time, once; the next call goes on.
        """
        raise_first_error(self.requests)
        deltas = []
        for request in tuple(self.requests):
            deltas += self._read_request(request)
            if request.finished:
                self.forget(request)
        return deltas

    def forget(self, request: Request) -> None:
        """Read no more of a request, if it was read here at all."""
        if request in self.requests:
            self.requests.remove(request)
        for sequence in request.sequences:
            self._seen.pop(sequence, None)

    def _read_request(self, request: Request) -> list[Delta]:
        deltas = []
        for index, sequence in enumerate(request.streamed):
            tokens, chars = self._seen_of(sequence)
            text, token_ids = sequence.text[chars:], sequence.tokens[tokens:].tolist()
            if text or token_ids:
                deltas.append(Delta(request.request_id, request.index, text, token_ids, sequence=index))
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


def interrupted_request(request_id: int, error: BaseException) -> QuireError:
    """What the caller of a request sees after the thread that ran the step was interrupted as it added a token."""
    interrupted = QuireError(
        f"request {request_id} must get its tokens whole; got {type(error).__name__} while one was added. "
        "Fix: ask for it again"
    )
    interrupted.__cause__ = error
    return interrupted


def raise_first_error(requests: Iterable[Request]) -> None:
    """Raise what ended one of these requests before its time, so that its caller sees it once."""
    for request in requests:
        if request.error is not None:
            error, request.error = request.error, None
            raise error
