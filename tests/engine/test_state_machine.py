"""Any schedule of arrivals, aborts, steps and broken steps, of one engine or two on any pool, whose prompts begin alike
or not, for one sample, several or the beams of a search, urgent or not, with one page table or several: everyone gets
their own tokens.
"""

from __future__ import annotations

from array import array
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.engine.core import Engine
from quire.engine.params import BeamSearchParams, SamplingParams
from quire.errors import ArgumentError
from quire.spec import Visibility

from .fakes import FakeModel

VOCAB = 50
COMMON = [7, 3, 7, 1, 0, 2, 2, 5]  # many prompts begin with a part of this, so that their pages are shared
prompts = st.builds(
    lambda common, own: (COMMON[:common] + own) or [9],
    st.integers(0, len(COMMON)),
    st.lists(st.integers(0, VOCAB - 1), max_size=6),
)


ALL = Visibility()
GROUPS = [(ALL,), (Visibility(5),), (Visibility(2), Visibility(7)), (ALL, Visibility(3), Visibility(3))]


def most_pages(
    prompt: list[int],
    params: SamplingParams,
    page_size: int,
    groups: tuple[Visibility, ...],
    step_tokens: int,
) -> int:
    """What a request holds at most: the full pages of its prompt once, the rest for each sample.

    Of a window it holds no more than the pages on which a step's tokens lie with all that they see.
    """
    shared = len(prompt) // page_size
    own = -(-(len(prompt) + params.max_tokens - 1) // page_size) - shared
    width = params.beam_width if isinstance(params, BeamSearchParams) else params.n
    if params.max_tokens == 1:
        width = (
            1  # the one token of each is handed out and never computed: nothing is written beside the prompt
        )
    pages = 0
    for sight in groups:
        in_sight = shared + own
        if sight.chunk_size:
            in_sight = -(-(sight.chunk_size + step_tokens - 1) // page_size)
        elif sight.window_left >= 0:
            in_sight = -(-(sight.window_left + step_tokens - 1) // page_size) + 1
        once, each, one = (min(count, in_sight) for count in (shared, own, shared + own))
        pages += min(once + width * each, width * one)
    return pages


class Broken(Exception):
    pass


class EngineMachine(RuleBasedStateMachine):
    """Drives engines over a model whose tokens depend on everything its pages hold."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        num_slots=st.integers(24, 64),
        max_batch_tokens=st.integers(1, 24),
        max_num_seqs=st.integers(2, 6),
        caching=st.sampled_from([[True], [True, True], [True, False], [False]]),
        groups=st.sampled_from([*GROUPS, None]),
        roomy=st.booleans(),
        num_host_pages=st.sampled_from([0, 1, 5, 100]),
        runs_ahead=st.booleans(),
    )
    def start(
        self,
        page_size,
        num_slots,
        max_batch_tokens,
        max_num_seqs,
        caching,
        groups,
        roomy,
        num_host_pages,
        runs_ahead,
    ):
        # The last has chunks, in whole pages.
        groups = groups or (ALL, Visibility(chunk_size=2 * page_size), Visibility(1))
        num_pages = -(-num_slots // page_size) * (max(1, len(groups) - 1) if roomy else 1)
        self.model = FakeModel(
            num_pages=num_pages,
            page_size=page_size,
            vocab_size=VOCAB,
            groups=groups,
            num_host_pages=num_host_pages,
            runs_ahead=runs_ahead,
        )
        self.max_batch_tokens = max_batch_tokens
        self.engines = [
            Engine(
                self.model,
                max_batch_tokens=max_batch_tokens,
                max_num_seqs=max_num_seqs,
                enable_prefix_caching=enabled,
            )
            for enabled in caching
        ]
        self.expected: dict[tuple[Engine, int], list[list[int]]] = {}  # of each sample
        self.got: dict[tuple[Engine, int], list[list[int]]] = {}
        self.most_pages: dict[tuple[Engine, int], int] = {}
        self.priorities: dict[tuple[Engine, int], int] = {}
        self.first_served: dict[Engine, list[int]] = {engine: [] for engine in self.engines}

    @rule(
        arrivals=st.lists(
            st.tuples(
                prompts,
                st.integers(4, 20),
                st.sampled_from([None, None, "salt"]),
                st.sampled_from([1, 1, 2, 4, -3]),  # below 0: a beam search of that width
                st.integers(0, 3),
                st.sampled_from([0, 0, 0, 1, -1]),
            ),
            min_size=1,
            max_size=4,
        ),
        data=st.data(),
    )
    def arrive(self, arrivals, data):
        engine = data.draw(st.sampled_from(self.engines))
        for prompt, max_tokens, salt, n, seed, priority in arrivals:
            if n < 0:
                params = BeamSearchParams(-n, max_tokens - 3)
            else:
                params = SamplingParams(
                    max_tokens=max_tokens, cache_salt=salt, n=n, temperature=0.0 if n == 1 else 1.0, seed=seed
                )
            of_request = prompt, params, self.model.page_size, self.model.groups
            if most_pages(*of_request, 1) > self.model.num_pages:
                with pytest.raises(ArgumentError, match="the pool has"):
                    engine.add_request(prompt, params, priority=priority)
                continue
            request_id = engine.add_request(prompt, params, priority=priority)
            self.priorities[engine, request_id] = priority
            if n < 0:
                self.expected[engine, request_id] = [text for text, _ in self.model.beams(prompt, params)]
                self.got[engine, request_id] = []
            else:
                self.expected[engine, request_id] = self.model.samples(prompt, params)
                self.got[engine, request_id] = [[] for _ in range(n)]
            self.most_pages[engine, request_id] = most_pages(*of_request, self.max_batch_tokens)

    @precondition(lambda self: any(engine.requests for engine in self.engines))
    @rule(data=st.data())
    def abort(self, data):
        live = [(engine, request_id) for engine in self.engines for request_id in sorted(engine.requests)]
        engine, request_id = data.draw(st.sampled_from(live))
        sequences = engine.requests[request_id].sequences
        assert engine.abort(request_id)
        assert not any(sequence.seq_id in engine.table for sequence in sequences)
        del self.expected[engine, request_id], self.got[engine, request_id]

    @rule(times=st.integers(1, 8), data=st.data())
    def step(self, times, data):
        engine = data.draw(st.sampled_from(self.engines))
        for _ in range(times):
            self._step(engine)

    @rule(written=st.booleans(), data=st.data())
    def break_a_step(self, written, data):
        engine = data.draw(st.sampled_from(self.engines))
        forward = self.model.forward

        def broken(*step):
            if written:
                forward(*step)
            raise Broken

        self.model.forward = broken
        try:
            self._step(engine)
        except Broken:
            assert not engine.table.seq_ids
        finally:
            self.model.forward = forward

    @rule(data=st.data())
    def reset(self, data):
        data.draw(st.sampled_from(self.engines)).reset_prefix_cache()
        assert self.model.allocator.num_cached == 0
        assert (
            self.model.swap is None
            or self.model.swap.allocator.num_free == self.model.swap.allocator.num_pages
        )

    @invariant()
    def every_page_has_as_many_owners_as_live_requests_hold_it(self):
        held = Counter()
        for engine in self.engines:
            live = {s.seq_id for request in engine.requests.values() for s in request.live()}
            assert set(engine.table.seq_ids) <= live
            for owners in engine.table.page_owners():
                assert len(owners) == len(set(owners))
            for seq_id in engine.table.seq_ids:
                held.update(engine.table.all_pages(seq_id))
        allocator = self.model.allocator
        assert held == Counter({p: n for p in range(self.model.num_pages) if (n := allocator.refcount(p))})
        assert len(held) == allocator.num_owned

    @invariant()
    def no_request_holds_more_pages_than_its_samples_need(self):
        for engine in self.engines:
            for request in engine.requests.values():
                live = [s.seq_id for s in request.sequences if s.seq_id in engine.table]
                held = {page for seq_id in live for page in engine.table.all_pages(seq_id)}
                assert len(held) <= self.most_pages[engine, request.request_id]

    @invariant()
    def a_sequence_holds_the_pages_that_its_next_token_sees_and_no_others(self):
        size = self.model.page_size
        for engine in self.engines:
            for request in engine.requests.values():
                for sequence in request.sequences:
                    if sequence.seq_id in engine.table and sequence.num_computed:
                        count = -(-engine.table.length(sequence.seq_id) // size)
                        for group, sight in enumerate(self.model.groups):
                            # Ahead, its next token has a slot already.
                            first = sight.first_key(engine.table.length(sequence.seq_id)) // size
                            assert len(engine.table.pages(sequence.seq_id, 0, group)) == count - first

    @invariant()
    def named_pages_hold_the_tokens_of_their_names(self):
        cache, size = self.model.prefix_cache, self.model.page_size
        slots = self.model.slots.reshape(-1, size, 2)
        for page in range(self.model.num_pages):
            prefix = cache.name_of(page)
            if prefix is not None:
                first = (prefix.num_pages - 1) * size
                assert slots[page, :, 0].tolist() == list(array("q", prefix.tokens))
                assert slots[page, :, 1].tolist() == list(range(first, first + size))
                trunk = prefix.page == page and self.model.groups[0].sees_all
                assert (
                    not trunk
                    or prefix.parent.parent is None
                    or cache.name_of(prefix.parent.page) is prefix.parent
                )

    @invariant()
    def copies_on_the_host_hold_the_tokens_of_their_names(self):
        swap, size = self.model.swap, self.model.page_size
        if swap is None:
            return
        swap.audit()
        assert swap.allocator.num_owned == 0
        assert swap.allocator.num_cached == swap.num_swapped
        for (prefix, _), place in swap._places.items():
            first = (prefix.num_pages - 1) * size
            assert swap.store.slots[place.page, :, 0].tolist() == list(array("q", prefix.tokens))
            assert swap.store.slots[place.page, :, 1].tolist() == list(range(first, first + size))

    @invariant()
    def known_prefixes_have_a_page_or_a_copy_or_follow_one(self):
        """Or links would be kept for ever."""
        num_host_pages = 0 if self.model.swap is None else self.model.swap.allocator.num_pages
        per_page = 1 if self.model.groups[0].sees_all else 100
        assert len(self.model.prefix_cache._links) <= per_page * (self.model.num_pages + num_host_pages)

    @invariant()
    def two_computed_pages_with_the_same_beginning_are_one(self):
        names = [self.model.prefix_cache.name_of(page) for page in range(self.model.num_pages)]
        chains = [
            (prefix.parent, prefix.tokens)
            for page, prefix in enumerate(names)
            if prefix is not None and prefix.page == page
        ]
        assert len(chains) == len(set(chains))

    @invariant()
    def limits_hold(self):
        for engine in self.engines:
            assert max(self.model.step_sizes, default=0) <= engine._scheduler.max_batch_tokens
            assert len(engine._scheduler.running) <= engine._scheduler.max_num_seqs

    @invariant()
    def urgent_requests_stand_before_others_and_older_before_younger_ones(self):
        for engine in self.engines:
            for queue in (engine._scheduler.running, engine._scheduler.waiting):
                order = [(request.priority, request.request_id) for request in queue]
                assert order == sorted(order)
            of_one = [r for r in [*engine._scheduler.running, *engine._scheduler.waiting] if not r.priority]
            assert [r.request_id for r in of_one] == sorted(r.request_id for r in of_one)

    def teardown(self):
        if not hasattr(self, "engines"):
            return
        # Every round of steps computes at least one token of the most urgent request, and nothing takes its pages:
        # so this many rounds are enough, or the engines run in circles.
        live = [request for engine in self.engines for request in engine.requests.values()]
        for _ in range(sum(len(s.tokens) + 40 for request in live for s in request.sequences)):
            for engine in self.engines:
                self._step(engine)
        assert not any(engine.has_unfinished for engine in self.engines)
        assert self.got == self.expected
        assert self.model.allocator.num_available == self.model.num_pages
        for engine, served in self.first_served.items():
            for priority in (-1, 0, 1):
                of_one = [i for i in served if self.priorities[engine, i] == priority]
                assert of_one == sorted(of_one), "a younger request was let in first"

    def _step(self, engine):
        for delta in engine.step():
            got = self.got[engine, delta.request_id]
            if not got:  # a beam search, whose texts come at its end
                got += [completion.token_ids for completion in delta.output.outputs]
                continue
            got[delta.sequence] += delta.token_ids
            if delta.output is not None:
                assert [completion.token_ids for completion in delta.output.outputs] == got
                assert {completion.finish_reason for completion in delta.output.outputs} == {"length"}
        served = self.first_served[engine]
        running = [request.request_id for request in engine._scheduler.running]
        served += [request_id for request_id in running if request_id not in served]


EngineMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
TestEngine = EngineMachine.TestCase
