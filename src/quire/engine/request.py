"""A request while it lives, and what comes back from it."""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.engine.logprobs import Logprob, TokenLogprobs
from quire.engine.sequence import FinishReason, Sequence
from quire.errors import QuireError

if TYPE_CHECKING:
    from quire.engine.reader import Reader


@dataclass(frozen=True)
class CompletionOutput:
    """What one sequence of a request generated.

    Attributes:
        index: its place among the sequences of the request.
        text: the generated text, by default without stop string and special tokens.
        token_ids: every generated token, the one that ended the sequence included.
        finish_reason: "stop" (end-of-text, stop token or stop string), "length" (max_tokens or the
            model's longest sequence), "abort"; None of a sequence that has not ended, see `AsyncLLM`.
        cumulative_logprob: the sum of the generated tokens' logprobs; None unless SamplingParams.logprobs asked, or of
            a beam search.
        logprobs: for each generated token those of it, first, and of the likeliest, by token id; None unless asked.
        score: of a beam search, by which its texts are ordered: cumulative_logprob divided by the number of generated
            tokens, the one that ended it included, to the power of length_penalty.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    score: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """One request: finished, but for those that an `AsyncLLM` shows on their way.

    Attributes:
        prompt: the prompt's text; None when token ids were given.
        outputs: one per sample, or the texts of a beam search, the best first; `text`, `token_ids` and `finish_reason`
            are the first one's.
        time_to_first_token, seconds: from the request's arrival to its end, or to now; time_to_first_token is None
            when no token was generated.
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
    def finish_reason(self) -> FinishReason | None:
        """Why the first sequence ended; None before."""
        return self.outputs[0].finish_reason

    @property
    def finished(self) -> bool:
        """Whether all sequences have ended."""
        return all(output.finish_reason is not None for output in self.outputs)


@dataclass(frozen=True)
class Delta:
    """What a sequence of a request gained since it was last looked at. A beam search has one alone: its best text.

    Attributes:
        index: position of the prompt among those of the same `stream` call, else 0.
        text: new text; "" while a character or a possible stop string is incomplete.
        token_ids: new tokens.
        output: the whole result, with the last delta of a request that has finished.
        sequence: which sequence of the request.
        logprobs: for each new token those of it, first, and of the likeliest, by token id; None unless
            SamplingParams.logprobs asked.
    """

    request_id: int
    index: int
    text: str
    token_ids: list[int]
    output: RequestOutput | None = None
    sequence: int = 0
    logprobs: list[dict[int, Logprob]] | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ended; None before the last delta of its request."""
        return None if self.output is None else self.output.outputs[self.sequence].finish_reason


# Seconds by which a request may arrive later and still be as urgent as one a priority above it.
HEAD_START = 60.0


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
        reader: whom it tells what it gains; None: nobody.
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
        self.reader: Reader | None = None
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

    def tell(self) -> None:
        """Tell the reader that it has gained a token, has finished or has failed; with the engine's lock for tokens."""
        reader = self.reader  # which its caller may take away meanwhile
        if reader is not None:
            reader.note(self)

    def abort(self) -> None:
        """Finish every sequence that has not; what fails on the way is left for the request's caller."""
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                try:
                    sequence.finish("abort")
                except Exception as error:
                    self.error = self.error or error

    def output(self) -> RequestOutput:
        """What has come of it so far: the result, once it has finished."""
        first = self.sequences[0]
        began = [
            sequence.first_token_at for sequence in self.sequences if sequence.first_token_at is not None
        ]
        return self._output(
            first.tokens[: first.num_prompt_tokens].tolist(),
            [_completion(index, sequence) for index, sequence in enumerate(self.sequences)],
            min(began, default=None),
            self._ended_at(),
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
            else [None, *(found.as_dict(self.sequences[0].decode) for found in self.prompt_logprobs)],
        )

    def _ended_at(self) -> float:
        if self.finished:
            return max(sequence.finished_at for sequence in self.sequences)
        return time.perf_counter()


def _completion(index: int, sequence: Sequence) -> CompletionOutput:
    tokens = sequence.tokens[sequence.num_prompt_tokens :].tolist()
    found, shown = sequence.logprobs, sequence.shown_logprobs()
    return CompletionOutput(
        index,
        sequence.text,
        tokens,
        sequence.finish_reason,
        cumulative_logprob=None if found is None else sum(each.logprobs[0] for each in found),
        logprobs=None if shown is None else list(shown),
    )


def interrupted_request(request_id: int, error: BaseException) -> QuireError:
    """What the caller of a request sees after the thread that ran the step was interrupted as it added a token."""
    interrupted = QuireError(
        f"request {request_id} must get its tokens whole; got {type(error).__name__} while one was added. "
        "Fix: ask for it again"
    )
    interrupted.__cause__ = error
    return interrupted
