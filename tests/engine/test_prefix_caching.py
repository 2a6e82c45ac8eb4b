"""Prompts that find their beginning in pages: from whom, what is computed all the same, and what nobody may find."""

from __future__ import annotations

import pytest

from quire.engine.core import Engine
from quire.engine.params import SamplingParams
from quire.engine.stats import EngineStats
from quire.errors import ArgumentError, PageStateError, UnsupportedError

from .fakes import FakeModel, ask, drain, fork

PAGE = 4
PARAMS = SamplingParams(max_tokens=6)


def make_engine(**options) -> Engine:
    return Engine(FakeModel(**{"num_pages": 64, "page_size": PAGE} | options))


# From whom


def test_a_prompt_finds_the_full_pages_of_one_that_has_ended():
    engine = make_engine()
    assert ask(engine, range(10))[0].num_cached_tokens == 0
    output, steps = ask(engine, [*range(10), 11, 12])
    assert output.num_cached_tokens == 2 * PAGE
    assert steps == [4, 1, 1, 1, 1, 1]
    assert (engine.stats.admitted_tokens, engine.stats.cached_tokens) == (22, 8)
    assert engine.stats.hit_rate == 8 / 22
    assert engine.stats.computed_tokens == sum(engine.model.step_sizes)
    engine.stats = EngineStats()  # as whoever measures a part of a run does
    assert engine.stats.hit_rate == 0.0
    ask(engine, range(8))
    assert (engine.stats.admitted_tokens, engine.stats.cached_tokens) == (8, 7)


def test_a_prompt_finds_the_pages_of_one_that_runs_and_shares_them_with_it():
    engine = make_engine()
    first = engine.add_request(list(range(10)), PARAMS)
    engine.step()
    second = engine.add_request([*range(8), 30], PARAMS)
    engine.step()
    pages = [engine.table.pages(request_id) for request_id in (first, second)]
    assert pages[0][:2] == pages[1][:2]
    assert engine.model.step_sizes == [10, 1 + 1]
    outputs = drain(engine)
    assert outputs[first].token_ids == engine.model.continuation(range(10), 6)
    assert outputs[second].token_ids == engine.model.continuation([*range(8), 30], 6)
    assert [outputs[i].num_cached_tokens for i in (first, second)] == [0, 8]


def test_the_next_turn_of_a_conversation_finds_the_answer_of_the_last_one():
    engine = make_engine()
    said = ask(engine, range(6), SamplingParams(max_tokens=11))[0].token_ids
    output, steps = ask(engine, [*range(6), *said, 40, 41])
    assert output.num_cached_tokens == 16  # the last generated token was never computed
    assert steps[0] == 3


def test_a_preempted_request_finds_its_own_pages_again():
    engine = make_engine()
    request_id = engine.add_request(list(range(10)), PARAMS)
    for _ in range(3):
        engine.step()
    engine._scheduler.preempt_all()
    engine.step()
    assert engine.model.step_sizes == [10, 1, 1, 13 - 12]
    output = drain(engine)[request_id]
    assert output.token_ids == engine.model.continuation(range(10), 6)
    assert output.num_cached_tokens == 0, "of its prompt nothing was found when it first ran"
    assert output.preemptions == 1


def test_a_prompt_of_an_aborted_request_is_found_as_far_as_it_was_computed():
    model = FakeModel(page_size=PAGE)
    engine = Engine(model, max_batch_tokens=10)
    aborted = engine.add_request(list(range(30)), PARAMS)
    engine.step()
    engine.abort(aborted)
    assert ask(engine, range(30))[0].num_cached_tokens == 8


def test_prompts_that_begin_alike_and_arrive_together_compute_the_beginning_once():
    engine = make_engine()
    prompts = [[*range(20), n] for n in range(5)]
    outputs = engine.generate(prompts, PARAMS)
    assert [o.token_ids for o in outputs] == [engine.model.continuation(p, 6) for p in prompts]
    assert engine.model.step_sizes[:2] == [21, 1 + 4]
    assert [output.num_cached_tokens for output in outputs] == [0, 20, 20, 20, 20]


def test_any_number_of_prompts_that_are_there_as_a_whole_begin_in_one_step():
    engine = make_engine()
    ask(engine, range(8))
    outputs = engine.generate([list(range(8))] * 5, PARAMS)
    assert engine.model.step_sizes[6:] == [5] * 6
    assert [output.num_cached_tokens for output in outputs] == [7] * 5


def test_two_engines_on_one_model_find_each_others_pages():
    model = FakeModel(page_size=PAGE)
    first, second = Engine(model), Engine(model)
    ask(first, range(12))
    assert ask(second, range(14))[0].num_cached_tokens == 12


def test_an_engine_without_prefix_caching_finds_and_leaves_nothing():
    model = FakeModel(page_size=PAGE)
    without, with_it = Engine(model, enable_prefix_caching=False), Engine(model)
    ask(without, range(12))
    assert model.allocator.num_free == model.num_pages
    ask(with_it, range(12))
    assert ask(without, range(12))[0].num_cached_tokens == 0
    with pytest.raises(ArgumentError, match=r"enable_prefix_caching must be a bool; got 1\. Fix: "):
        Engine(model, enable_prefix_caching=1)


def test_a_salt_keeps_tenants_apart():
    engine = make_engine()
    for salt, cached in [(None, 0), ("a", 0), ("b", 0), ("a", 8), (None, 8), ("b", 8)]:
        params = SamplingParams(max_tokens=2, cache_salt=salt)
        assert ask(engine, range(10), params)[0].num_cached_tokens == cached


@pytest.mark.parametrize("salt", ["", 1, b"a"])
def test_a_salt_must_be_text(salt):
    with pytest.raises(ArgumentError, match=r"cache_salt must be None or a non-empty string; got .* Fix: "):
        SamplingParams(cache_salt=salt)


# What is computed and written all the same


@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_a_prompt_that_is_there_as_a_whole_computes_its_last_token_and_writes_no_page_that_was_found(
    page_size,
):
    engine = make_engine(page_size=page_size)
    ask(engine, range(8))
    cache = engine.model.prefix_cache
    pages = cache.match(list(range(8))).pages()
    before = engine.model.slots.copy()
    assert len(pages) == 8 // page_size
    output, steps = ask(engine, range(8))
    assert output.num_cached_tokens == 7
    assert steps[0] == 1
    assert cache.match(list(range(8))).pages() == pages
    slots = [page * page_size + i for page in pages for i in range(page_size)]
    assert (engine.model.slots[slots] == before[slots]).all()


def test_no_step_writes_a_slot_of_a_named_page():
    engine = make_engine(num_pages=12)
    forward = engine.model.forward

    def watched(step):
        for slot in step.slot_mapping.tolist():
            assert engine.model.prefix_cache.name_of(slot // PAGE) is None
        return forward(step)

    engine.model.forward = watched
    prompts = [list(range(n)) for n in (4, 8, 8, 9, 12, 4)]
    outputs = engine.generate(prompts + prompts, PARAMS)
    assert [o.token_ids for o in outputs] == [engine.model.continuation(p, 6) for p in prompts + prompts]


def test_where_no_page_is_left_for_the_copy_the_last_page_is_computed_again():
    engine = make_engine(num_pages=2)
    params = SamplingParams(max_tokens=1)
    ask(engine, range(8), params)
    output, steps = ask(engine, range(8), params)
    assert (output.num_cached_tokens, steps) == (4, [4])


def test_two_that_computed_the_same_page_hold_one_in_the_end():
    engine = make_engine()
    ids = [engine.add_request(list(range(8)), SamplingParams(max_tokens=9)) for _ in range(2)]
    for _ in range(6):
        engine.step()
    first, second = [engine.table.pages(request_id) for request_id in ids]
    assert first[:3] == second[:3], "two of the prompt, and one that both have generated"
    expected = engine.model.continuation(range(8), 9)
    assert [output.token_ids for output in drain(engine).values()] == [expected] * 2


def test_sequences_of_a_request_share_their_prompt_again_after_they_were_preempted():
    engine = make_engine(num_pages=8)  # 4 of the prompt, 2 for each sequence
    request_id = engine.add_request([1] * 16, PARAMS)
    engine.step()
    fork(engine, request_id, 9)
    engine.step()
    engine._scheduler.preempt_all()
    first, second = drain(engine)[request_id].outputs
    assert first.token_ids == engine.model.continuation([1] * 16, 6)
    assert second.token_ids == [9, *engine.model.continuation([1] * 16 + [9], 5)]


# Pages under pressure


def test_cached_pages_make_room_for_whoever_needs_them_and_those_used_last_stay():
    engine = make_engine(num_pages=8)
    params = SamplingParams(max_tokens=1)
    ask(engine, [1] * 12, params)
    ask(engine, [2] * 12, params)
    ask(engine, [1] * 13, params)  # used again
    assert engine.model.allocator.num_cached == 6
    ask(
        engine, [3] * 16, params
    )  # two pages are free, two must be dropped: the end of the one unused the longest
    cache = engine.model.prefix_cache
    assert [cache.match([n] * 16).num_pages for n in (1, 2, 3)] == [3, 1, 4]


def test_a_prompt_fits_also_where_the_pages_that_it_finds_are_all_that_is_left():
    engine = make_engine(num_pages=5)
    ask(engine, range(16), SamplingParams(max_tokens=1))
    holder = engine.model.allocator.allocate(1)
    output, _ = ask(engine, range(14), SamplingParams(max_tokens=2))
    assert output.num_cached_tokens == 12
    engine.model.allocator.free(holder)
    assert engine.model.allocator.num_available == 5


def test_what_a_waiting_prompt_finds_is_not_searched_from_its_beginning_in_every_step():
    engine = make_engine(num_pages=300, page_size=1)
    ask(engine, [5] * 100, SamplingParams(max_tokens=1))
    running = engine.add_request([6] * 150, SamplingParams(max_tokens=50))
    engine.step()
    waits = engine.add_request([5] * 100 + [7] * 50, SamplingParams(max_tokens=1))
    engine.step()
    calls, generation = [], engine.model.allocator.generation
    engine.model.allocator.generation = lambda page: calls.append(page) or generation(page)
    engine.step()
    del engine.model.allocator.generation
    assert waits not in engine.table
    assert len(calls) < 20
    outputs = drain(engine)
    assert outputs[waits].num_cached_tokens > 0
    assert outputs[running].preemptions == 0


# What nobody may find


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_step_that_breaks_off_names_no_page_of_its_own(at):
    engine = make_engine()
    request_id = engine.add_request(list(range(12)), PARAMS)
    forward = engine.model.forward

    def broken(step):
        if at == "after":
            forward(step)
        raise KeyboardInterrupt

    engine.model.forward = broken
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.model.forward = forward
    assert engine.model.prefix_cache.num_named == 0
    assert drain(engine)[request_id].token_ids == engine.model.continuation(range(12), 6)


def test_after_a_reset_nothing_of_before_is_found_also_not_of_those_who_ran_meanwhile():
    engine = make_engine()
    ask(engine, range(10))
    long = SamplingParams(max_tokens=12)
    runs = engine.add_request([8] * 6, long)
    begins = engine.add_request([9] * 2, long)
    engine.step()
    engine.reset_prefix_cache()
    old = {page for request_id in (runs, begins) for page in engine.table.pages(request_id)}
    outputs = drain(engine)
    assert outputs[runs].token_ids == engine.model.continuation([8] * 6, 12)
    assert engine.model.prefix_cache.num_named == 0
    assert engine.model.allocator.num_free == engine.model.num_pages
    assert len(old) == 3
    assert ask(engine, range(10))[0].num_cached_tokens == 0
    assert ask(engine, range(10))[0].num_cached_tokens == 8


def test_a_reset_inside_a_step_takes_place_after_it_and_one_under_the_lock_is_refused():
    engine = make_engine()
    forward, engine.model.forward = (
        engine.model.forward,
        lambda step: engine.reset_prefix_cache() or forward(step),
    )
    ask(engine, range(10), SamplingParams(max_tokens=1))
    assert engine.model.prefix_cache.num_named == 0
    engine.model.forward = forward
    with engine.model.lock, pytest.raises(UnsupportedError):
        engine.reset_prefix_cache()


# Why no more


def test_a_hit_says_why_it_ends():
    engine = make_engine()
    waiting = engine.add_request(list(range(10)), PARAMS)
    assert engine.explain_hit(waiting) == "nothing was looked for: the request has not run"
    engine.step()
    never = "0 of 10 prompt tokens were found in pages: no page is cached for tokens 0 to 3: never computed, or dropped"
    assert engine.explain_hit(waiting).startswith(never)
    assert engine.explain_hit(drain(engine)[waiting]).startswith(never)

    def why(prompt, **options):
        return engine.explain_hit(ask(engine, prompt, SamplingParams(max_tokens=1, **options))[0])

    found = "prompt tokens were found in pages"
    assert (
        why(range(10))
        == f"8 of 10 {found}: the rest, 2 tokens, fills no page of 4, and only full pages are found"
    )
    assert (
        why(range(8))
        == f"7 of 8 {found}: the rest is there too, but the last token is computed for its logits"
    )
    other = [*range(6), 40, 41, 42]
    assert why(other) == f"4 of 9 {found}: token 6 is 40, where the page cached last has 6"
    assert why(range(10), cache_salt="a").startswith(
        f"0 of 10 {found}, under cache_salt 'a': no page is cached"
    )
    off = Engine(engine.model, enable_prefix_caching=False)
    assert off.explain_hit(ask(off, range(10))[0]) == f"0 of 10 {found}: enable_prefix_caching is off"
    with pytest.raises(
        ArgumentError, match=r"request must be the id of a live request, or a RequestOutput; got 99"
    ):
        engine.explain_hit(99)


# Pages that are not what they should be


def faults(engine: Engine, request_id: int) -> dict:
    table, allocator, cache = engine.table, engine.model.allocator, engine.model.prefix_cache
    pages = table.pages(request_id)

    def reuse_while_owned():
        allocator.free(pages)
        cache.evict(9)
        return allocator.allocate(len(pages))

    def phantom_hit():
        [sequence] = engine.requests[request_id].sequences
        sequence.prefix.tokens = sequence.prefix.parent.tokens = b"other tokens"

    return {
        "reuse while owned": reuse_while_owned,
        "double free": lambda: allocator.free(pages[:2]),
        "phantom hit": phantom_hit,
    }


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("fault", ["reuse while owned", "double free", "phantom hit"])
def test_a_page_that_is_not_what_its_sequence_computed_is_noticed_and_the_others_go_on(
    fault, debug, monkeypatch
):
    monkeypatch.setenv("QUIRE_DEBUG", "1" if debug else "0")
    engine = make_engine()
    hit, other = engine.add_request(list(range(9)), PARAMS), engine.add_request([20, 21], PARAMS)
    engine.step()
    faults(engine, hit)[fault]()
    with pytest.raises(
        PageStateError, match=rf"page \d must have .*; got [01] owners, .* held by sequences \[{hit}\]"
    ):
        engine.step(), engine.step()  # the sample looks at one request in each step
    assert hit not in engine.table
    outputs = drain(engine)
    assert outputs[hit].token_ids == engine.model.continuation(range(9), 6), (
        "computed again, from other pages"
    )
    assert outputs[other].token_ids == engine.model.continuation([20, 21], 6)


def test_pages_that_nobody_touched_pass_the_whole_audit(monkeypatch):
    monkeypatch.setenv("QUIRE_DEBUG", "1")
    engine = Engine(FakeModel(num_pages=5, page_size=PAGE), max_batch_tokens=9)
    prompts = [[*range(n), 30] for n in range(1, 10)]
    outputs = engine.generate(prompts, PARAMS)
    assert [o.token_ids for o in outputs] == [engine.model.continuation(p, 6) for p in prompts]
    assert sum(output.preemptions for output in outputs), "this pool was meant to be too small"
    assert sum(output.num_cached_tokens for output in outputs) > 0


def test_two_sequences_on_a_page_with_one_owner_are_noticed_in_debug_mode(monkeypatch):
    monkeypatch.setenv("QUIRE_DEBUG", "1")
    engine = make_engine()
    ids = [engine.add_request([n] * 3, PARAMS) for n in range(2)]
    engine.step()
    first, second = [engine.table._sequence(i) for i in ids]
    second.groups[0][0] = first.groups[0][0]
    with pytest.raises(
        PageStateError, match=r"page 0 must have an owner for each of 2 sequences; got 1 owners"
    ):
        engine.step()
