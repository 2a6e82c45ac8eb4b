"""Any schedule of arrivals, aborts and steps, of one engine or two on any pool: every request gets its own tokens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.errors import ArgumentError

from .fakes import FakeModel

VOCAB = 50


class EngineMachine(RuleBasedStateMachine):
    """Drives engines over a model whose tokens depend on everything its pages hold."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        num_slots=st.integers(24, 64),
        max_batch_tokens=st.integers(1, 24),
        max_num_seqs=st.integers(2, 6),
        num_engines=st.integers(1, 2),
    )
    def start(self, page_size, num_slots, max_batch_tokens, max_num_seqs, num_engines):
        self.model = FakeModel(num_pages=-(-num_slots // page_size), page_size=page_size, vocab_size=VOCAB)
        self.engines = [
            Engine(self.model, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs)
            for _ in range(num_engines)
        ]
        self.expected: dict[tuple[Engine, int], list[int]] = {}
        self.got: dict[tuple[Engine, int], list[int]] = {}
        self.first_served: dict[Engine, list[int]] = {engine: [] for engine in self.engines}

    @rule(
        arrivals=st.lists(
            st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), st.integers(4, 20)),
            min_size=1,
            max_size=4,
        ),
        data=st.data(),
    )
    def arrive(self, arrivals, data):
        engine = data.draw(st.sampled_from(self.engines))
        for prompt, max_tokens in arrivals:
            pages = -(-(len(prompt) + max_tokens - 1) // self.model.page_size)
            if pages > self.model.num_pages:
                with pytest.raises(ArgumentError, match="the pool has"):
                    engine.add_request(prompt, SamplingParams(max_tokens=max_tokens))
                continue
            request_id = engine.add_request(prompt, SamplingParams(max_tokens=max_tokens))
            self.expected[engine, request_id] = self.model.continuation(prompt, max_tokens)
            self.got[engine, request_id] = []

    @precondition(lambda self: any(engine.requests for engine in self.engines))
    @rule(data=st.data())
    def abort(self, data):
        live = [(engine, request_id) for engine in self.engines for request_id in sorted(engine.requests)]
        engine, request_id = data.draw(st.sampled_from(live))
        assert engine.abort(request_id)
        assert request_id not in engine.table.seq_ids
        del self.expected[engine, request_id], self.got[engine, request_id]

    @rule(times=st.integers(1, 8), data=st.data())
    def step(self, times, data):
        engine = data.draw(st.sampled_from(self.engines))
        for _ in range(times):
            self._step(engine)

    @invariant()
    def pages_belong_to_live_requests_and_to_no_two_of_them(self):
        held = []
        for engine in self.engines:
            held += [page for seq_id in engine.table.seq_ids for page in engine.table.pages(seq_id)]
            assert set(engine.table.seq_ids) <= set(engine.requests)
        assert len(set(held)) == len(held) == self.model.allocator.num_owned

    @invariant()
    def limits_hold(self):
        for engine in self.engines:
            assert max(self.model.step_sizes, default=0) <= engine._scheduler.max_batch_tokens
            assert len(engine.table.seq_ids) <= engine._scheduler.max_num_seqs

    @invariant()
    def older_requests_stand_before_younger_ones(self):
        for engine in self.engines:
            scheduler = engine._scheduler
            order = [request.request_id for request in [*scheduler.running, *scheduler.waiting]]
            assert order == sorted(order)

    def teardown(self):
        if not hasattr(self, "engines"):
            return
        # Every round of steps computes at least one token of the oldest request of all, and nothing takes its pages:
        # so this many rounds are enough, or the engines run in circles.
        live = [request for engine in self.engines for request in engine.requests.values()]
        for _ in range(sum(len(request.sequences[0].tokens) + 40 for request in live)):
            for engine in self.engines:
                self._step(engine)
        assert not any(engine.has_unfinished for engine in self.engines)
        assert self.got == self.expected
        assert self.model.allocator.num_available == self.model.num_pages
        for served in self.first_served.values():
            assert served == sorted(served), "a younger request was let in first"

    def _step(self, engine):
        for delta in engine.step():
            got = self.got[engine, delta.request_id]
            got += delta.token_ids
            if delta.output is not None:
                assert delta.output.token_ids == got
                assert delta.finish_reason == "length"
        served = self.first_served[engine]
        served += [request_id for request_id in engine.table.seq_ids if request_id not in served]


EngineMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
TestEngine = EngineMachine.TestCase
