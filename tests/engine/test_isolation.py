"""Requests of every kind in a tenth of the pages that they need: each gets what it gets alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest

from quire.engine.core import Engine
from quire.engine.params import BeamSearchParams, SamplingParams
from quire.engine.request import RequestOutput

from .fakes import EOS, FakeModel, byte_tokenizer

PAGE_SIZE = 4
TOKENIZER = byte_tokenizer()
LETTERS = np.zeros(257, dtype=np.float32)
LETTERS[97:105] = 6.0
LETTERS[EOS] = 3.0


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    params: SamplingParams | BeamSearchParams
    priority: int
    fails: bool

    @property
    def num_pages(self) -> int:
        """Most pages that it holds alone: the full ones of its prompt once, the rest for each of its sequences."""
        width = getattr(self.params, "beam_width", 0) or self.params.n
        shared = len(self.prompt) // PAGE_SIZE
        return shared + width * (-(-(len(self.prompt) + self.params.max_tokens - 1) // PAGE_SIZE) - shared)


class OwnFailure(Exception):
    """What a request's own processor raises."""


def fail_after(num_tokens: int):
    def processor(token_ids, logits):
        if len(token_ids) == num_tokens:
            raise OwnFailure
        return logits

    return processor


def ask_for(number: int, seed: int) -> list[Asked]:
    draw = random.Random(seed)
    beginnings = [[draw.randrange(97, 105) for _ in range(draw.randint(6, 40))] for _ in range(6)]
    asked = []
    for _ in range(number):
        beginning = draw.choice(beginnings)
        own = [draw.randrange(97, 105) for _ in range(draw.randint(1, 9))]
        prompt = beginning[: draw.randint(0, len(beginning))] + own
        kind = draw.choice(["greedy", "greedy", "drawn", "drawn", "samples", "beams", "fails"])
        max_tokens = draw.randint(1, 20)
        if kind == "beams":
            params = BeamSearchParams(
                draw.randint(1, 4), max_tokens, draw.choice([0.0, 1.0]), draw.choice([False, True, "never"])
            )
        else:
            params = SamplingParams(
                temperature=0.0 if kind == "greedy" else 0.9,
                n=draw.randint(2, 4) if kind == "samples" else 1,
                seed=draw.randrange(1000),
                max_tokens=max_tokens,
                stop=draw.choice([None, "ab", ["ha", "cde", "ff"]]),
                top_k=draw.choice([None, 6]),
                frequency_penalty=draw.choice([0.0, 0.5]),
                logprobs=draw.choice([None, 1]),
                cache_salt=draw.choice([None, None, None, "salt"]),
                logits_processors=[fail_after(max_tokens // 2)] if kind == "fails" else None,
            )
        asked.append(Asked(prompt, params, draw.choice([0, 0, 0, 0, -1, 1]), kind == "fails"))
    return asked


def make_engine(num_pages: int, **options) -> Engine:
    model = FakeModel(vocab_size=257, num_pages=num_pages, page_size=PAGE_SIZE, eos_token_ids=(EOS,))
    usual = model.rule
    model.rule = lambda history: usual(history) + LETTERS
    return Engine(model, TOKENIZER, **options)


def alone(asked: Asked) -> RequestOutput:
    """What a request gets from an engine of its own; where its processor fails, what it got before."""
    engine = make_engine(asked.num_pages, enable_prefix_caching=False)
    engine.add_request(asked.prompt, asked.params)
    output = None
    while engine.has_unfinished:
        try:
            for delta in engine.step():
                output = delta.output
        except OwnFailure:
            assert not engine.requests
    return output


def serve_all(
    engine: Engine, asked: list[Asked], seed: int
) -> tuple[dict[int, RequestOutput], set[int], int]:
    """Serve all, arriving and being aborted at any step: outputs and aborted requests by place, number of failures."""
    draw = random.Random(seed)
    to_come, live = list(enumerate(asked)), {}
    outputs, aborted, num_failures = {}, set(), 0
    while to_come or engine.has_unfinished:
        for _ in range(draw.choice([0, 0, 1, 5]) * len(asked) // 60):
            if to_come:
                place, each = to_come.pop(0)
                live[engine.add_request(each.prompt, each.params, priority=each.priority)] = place
        if engine.requests and draw.random() < 0.05:
            request_id = draw.choice(sorted(engine.requests))
            assert engine.abort(request_id)
            aborted.add(live[request_id])
        try:
            for delta in engine.step():
                if delta.output is not None:
                    outputs[live[delta.request_id]] = delta.output
        except OwnFailure:
            num_failures += 1
    return outputs, aborted, num_failures


def check(number: int, seed: int, share: int = 10, **options) -> None:
    asked = ask_for(number, seed)
    largest = max(each.num_pages for each in asked)
    num_pages = max(sum(each.num_pages for each in asked) // share, largest)
    engine = make_engine(num_pages, **options)
    outputs, aborted, num_failures = serve_all(engine, asked, seed)
    assert aborted
    assert set(outputs) == set(range(number)) - aborted
    for place, output in outputs.items():
        assert output.outputs == alone(asked[place]).outputs
    assert 0 < num_failures == sum(output.finish_reason == "abort" for output in outputs.values())
    assert engine.model.allocator.num_available == num_pages
    assert not engine.table.seq_ids
    assert not engine.requests
    assert engine.stats.peak_pages > 0.8 * num_pages, "the pool is too large to prove anything"
    assert any(output.preemptions for output in outputs.values())


@pytest.mark.parametrize(
    ("seed", "options"), [(0, {"max_batch_tokens": 24}), (1, {"enable_prefix_caching": False})]
)
def test_sixty_requests_in_a_tenth_of_their_pages_get_what_they_get_alone(seed, options):
    check(60, seed, max_num_seqs=20, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [
        {"share": 20},  # of their pages, many of which are the same
        {"share": 20, "max_batch_tokens": 500},
        {"enable_prefix_caching": False},
    ],
)
def test_a_thousand_requests_in_a_tenth_of_their_pages_get_what_they_get_alone(options):
    check(1000, 7, max_num_seqs=500, **options)
