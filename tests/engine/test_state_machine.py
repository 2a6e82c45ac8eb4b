"""Any schedule of arrivals, aborts and steps, on any pool: every request gets its own tokens."""

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
    """Drives an engine over a model whose tokens depend on everything its pages hold."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        num_slots=st.integers(24, 64),
        max_batch_tokens=st.integers(1, 24),
        max_num_seqs=st.integers(2, 6),
    )
    def start(self, page_size, num_slots, max_batch_tokens, max_num_seqs):
        self.model = FakeModel(num_pages=-(-num_slots // page_size), page_size=page_size, vocab_size=VOCAB)
        self.engine = Engine(self.model, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs)
        self.expected: dict[int, list[int]] = {}
        self.got: dict[int, list[int]] = {}
        self.first_served: list[int] = []

    @rule(
        arrivals=st.lists(
            st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), st.integers(4, 20)),
            min_size=1,
            max_size=4,
        )
    )
    def arrive(self, arrivals):
        for prompt, max_tokens in arrivals:
            pages = -(-(len(prompt) + max_tokens - 1) // self.model.page_size)
            if pages > self.model.num_pages:
                with pytest.raises(ArgumentError, match="the pool has"):
                    self.engine.add_request(prompt, SamplingParams(max_tokens=max_tokens))
                continue
            request_id = self.engine.add_request(prompt, SamplingParams(max_tokens=max_tokens))
            self.expected[request_id] = self.model.continuation(prompt, max_tokens)
            self.got[request_id] = []

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.engine.requests)))
        assert self.engine.abort(request_id)
        assert request_id not in self.engine.table.seq_ids
        del self.expected[request_id], self.got[request_id]

    @rule(times=st.integers(1, 8))
    def step(self, times):
        for _ in range(times):
            self._step()

    @invariant()
    def pages_belong_to_live_requests_and_to_no_two_of_them(self):
        table = self.engine.table
        held = [page for seq_id in table.seq_ids for page in table.pages(seq_id)]
        assert len(set(held)) == len(held) == table.allocator.num_pages - table.allocator.num_free
        assert set(table.seq_ids) <= set(self.engine.requests)

    @invariant()
    def limits_hold(self):
        assert max(self.model.step_sizes, default=0) <= self.engine._scheduler.max_batch_tokens
        assert len(self.engine.table.seq_ids) <= self.engine._scheduler.max_num_seqs

    @invariant()
    def older_requests_stand_before_younger_ones(self):
        scheduler = self.engine._scheduler
        order = [request.request_id for request in [*scheduler.running, *scheduler.waiting]]
        assert order == sorted(order)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        # Every step computes at least one token of the oldest request, and nothing takes its pages:
        # so this many steps are enough, or the engine runs in circles.
        for _ in range(sum(len(r.sequences[0].tokens) + 40 for r in self.engine.requests.values())):
            self._step()
        assert not self.engine.has_unfinished
        assert self.got == self.expected
        assert self.engine.table.allocator.num_free == self.model.num_pages
        assert self.first_served == sorted(self.first_served), "a younger request was let in first"

    def _step(self):
        for delta in self.engine.step():
            self.got[delta.request_id] += delta.token_ids
            if delta.output is not None:
                assert delta.output.token_ids == self.got[delta.request_id]
                assert delta.finish_reason == "length"
        for request_id in self.engine.table.seq_ids:
            if request_id not in self.first_served:
                self.first_served.append(request_id)


EngineMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
TestEngine = EngineMachine.TestCase
