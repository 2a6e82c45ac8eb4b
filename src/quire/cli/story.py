"""What pages are for, in one short run: requests that come and go, share a beginning, fork, and run out of pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quire.cli.measure import Watch
from quire.cli.prompts import PROMPTS
from quire.engine import LLM, RequestOutput, SamplingParams
from quire.engine.request import Request

MOST_TOKENS = 48
POOL_SHARE = (
    0.45  # of the pages that all requests would take together: some have to wait, or give theirs back
)


class Arrival(NamedTuple):
    """A request of the story: after how many steps it comes, and what it asks for."""

    step: int
    prompt: str
    n: int = 1


# B is a long page of code. What comes after it is another question about the same page.
SHARED = PROMPTS[1]
ARRIVALS = (
    Arrival(0, SHARED + "        return self.width"),
    Arrival(3, PROMPTS[0]),
    Arrival(6, SHARED + "        # The area"),
    Arrival(9, PROMPTS[7], n=2),
    Arrival(12, PROMPTS[2]),
    Arrival(15, PROMPTS[4][:1200]),
)


@dataclass(frozen=True)
class Told:
    """What happened.

    Attributes:
        outputs: each request's, in the order of arrival.
        same: how many of them wrote what they write alone, without company and with nothing found in pages.
        cached_tokens: tokens of prompts that were found in pages.
        shared_pages: most pages that had several owners after a step.
        preemptions: how often a request gave its pages back and resumed.
    """

    outputs: Sequence[RequestOutput]
    same: int
    cached_tokens: int
    shared_pages: int
    preemptions: int

    def __str__(self) -> str:
        return (
            f"{len(self.outputs)} requests came one after another: {self.cached_tokens} tokens of their prompts were "
            f"found in pages, up to {self.shared_pages} pages had several owners, requests gave their pages back "
            f"{self.preemptions} ×; {self.same}/{len(self.outputs)} wrote what they write alone"
        )


def stage(llm: LLM, max_tokens: int) -> LLM:
    """An engine on the same weights, with fewer pages than the story's requests need at once."""
    size = llm.model.page_size
    needed = 0
    for arrival, tokens in zip(ARRIVALS, _token_ids(llm), strict=True):
        pages = -(-(len(tokens) + max_tokens) // size)
        needed += pages + (arrival.n - 1) * (-(-max_tokens // size) + 1)
    shared = len(llm.tokenizer(SHARED)["input_ids"]) // size
    longest = max(-(-(len(tokens) + max_tokens) // size) for tokens in _token_ids(llm)) + 4
    pool = max(longest, int(POOL_SHARE * (needed - shared))) * len(llm.model.groups)
    return LLM(llm.model.model, tokenizer=llm.tokenizer, page_size=size, num_pages=pool)


def tell(engine: LLM, max_tokens: int, watch: Watch) -> Told:
    """Run the story.

    Args:
        engine: as `stage` makes it.
        watch: called after every step with its number and the requests that have come so far.
    """
    engine.reset_prefix_cache()
    coming = list(ARRIVALS)
    requests: list[Request] = []
    step = shared = 0
    while coming or engine.has_unfinished:
        while coming and (coming[0].step <= step or not engine.has_unfinished):
            arrival = coming.pop(0)
            request_id = engine.add_request(arrival.prompt, _params(arrival, max_tokens))
            requests.append(engine.requests[request_id])
        engine.step()
        step += 1
        shared = max(shared, sum(len(owners) > 1 for owners in engine.table.page_owners()))
        watch(step, requests)
    outputs = [request.output() for request in requests]
    same = 0
    for arrival, output in zip(ARRIVALS, outputs, strict=True):
        engine.reset_prefix_cache()
        [alone] = engine.generate(arrival.prompt, _params(arrival, max_tokens))
        same += [o.token_ids for o in alone.outputs] == [o.token_ids for o in output.outputs]
    return Told(
        outputs=outputs,
        same=same,
        cached_tokens=sum(output.num_cached_tokens for output in outputs),
        shared_pages=shared,
        preemptions=sum(output.preemptions for output in outputs),
    )


def _token_ids(llm: LLM) -> list[list[int]]:
    ids: list[list[int]] = llm.tokenizer([arrival.prompt for arrival in ARRIVALS])["input_ids"]
    return ids


def _params(arrival: Arrival, max_tokens: int) -> SamplingParams:
    """Greedy, but for several samples of one prompt, which are drawn."""
    return SamplingParams(
        n=arrival.n,
        temperature=0.0 if arrival.n == 1 else 0.8,
        top_p=1.0,
        top_k=0,
        seed=0,
        repetition_penalty=1.0,
        min_tokens=0,
        max_tokens=max_tokens,
    )
