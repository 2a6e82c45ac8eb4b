"""Who runs, and on whose pages."""

from __future__ import annotations

from quire.engine.params import SamplingParams
from quire.engine.request import Request
from quire.engine.scheduler import Scheduler
from quire.engine.sequence import Sequence
from quire.pages import PageAllocator, PageTable

PAGE_SIZE = 4


def make_scheduler(*, num_pages=100, max_batch_tokens=100, max_num_seqs=100) -> Scheduler:
    table = PageTable(PageAllocator(num_pages), PAGE_SIZE)
    return Scheduler(table, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs)


def make_request(request_id: int, num_tokens: int) -> Request:
    return Request([make_sequence(request_id, num_tokens)])


def make_sequence(seq_id: int, num_tokens: int) -> Sequence:
    return Sequence(seq_id, [0] * num_tokens, SamplingParams(), max_length=999, stop_token_ids=frozenset())


def run(scheduler: Scheduler, chunks) -> None:
    """What the engine does with chunks: their tokens are computed, a complete sequence gets its next token."""
    for chunk in chunks:
        complete = chunk.is_last
        chunk.sequence.num_computed += chunk.num_tokens
        if complete:
            chunk.sequence.accept(0)


def step(scheduler: Scheduler) -> dict[int, int]:
    """One step; seq_id → tokens it was given."""
    chunks = scheduler.schedule()
    run(scheduler, chunks)
    return {chunk.sequence.seq_id: chunk.num_tokens for chunk in chunks}


def test_running_requests_decode_first_and_prompts_share_what_is_left():
    scheduler = make_scheduler(max_batch_tokens=8)
    for request_id, num_tokens in enumerate([3, 12, 2]):
        scheduler.add(make_request(request_id, num_tokens))
    assert step(scheduler) == {0: 3, 1: 5}
    assert step(scheduler) == {0: 1, 1: 7}
    assert step(scheduler) == {0: 1, 1: 1, 2: 2}
    assert step(scheduler) == {0: 1, 1: 1, 2: 1}


def test_no_more_run_than_max_num_seqs():
    scheduler = make_scheduler(max_num_seqs=2)
    requests = [make_request(i, 1) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    assert step(scheduler) == {0: 1, 1: 1}
    scheduler.remove(requests[0])
    assert step(scheduler) == {1: 1, 2: 1}


def test_a_large_request_at_the_front_is_not_overtaken():
    scheduler = make_scheduler(num_pages=4)
    for request_id, num_tokens in enumerate([4, 16, 1]):
        scheduler.add(make_request(request_id, num_tokens))
    assert step(scheduler) == {0: 4}
    assert [request.request_id for request in scheduler.waiting] == [1, 2]


def test_the_youngest_gives_its_pages_to_an_older_request_and_waits_in_front():
    scheduler = make_scheduler(num_pages=5)
    requests = [make_request(0, 4), make_request(1, 4), make_request(2, 4), make_request(3, 4)]
    for request in requests:
        scheduler.add(request)
    assert step(scheduler) == {
        0: 4,
        1: 4,
        2: 4,
    }  # request 3 finds pages, but none to spare per running request
    assert step(scheduler) == {0: 1, 1: 1}  # request 2 stands still: no page for its fifth token
    assert requests[2].preemptions == 0
    for _ in range(3):
        step(scheduler)
    assert step(scheduler) == {
        0: 1
    }  # request 0 begins a third page; requests 2 and 1 made room or stood still
    assert requests[2].preemptions == 1
    assert requests[2].sequences[0].num_computed == 0
    assert [request.request_id for request in scheduler.waiting] == [2, 3]


def test_a_preempted_request_computes_prompt_and_generated_tokens_again():
    scheduler = make_scheduler(num_pages=100)
    request = make_request(0, 4)
    scheduler.add(request)
    for _ in range(3):
        step(scheduler)
    assert len(request.sequences[0].tokens) == 7
    scheduler.preempt_all()
    assert scheduler.table.allocator.num_free == 100
    assert step(scheduler) == {0: 7}


def test_preempting_all_keeps_the_order_of_arrival():
    scheduler = make_scheduler(max_num_seqs=3)
    for request_id in range(4):
        scheduler.add(make_request(request_id, 2))
    step(scheduler)
    scheduler.preempt_all()
    assert [request.request_id for request in scheduler.waiting] == [0, 1, 2, 3]


def test_a_chunk_shrinks_to_the_pages_left_instead_of_taking_from_older_requests():
    scheduler = make_scheduler(num_pages=6, max_batch_tokens=6)
    scheduler.add(make_request(0, 4))
    scheduler.add(make_request(1, 16))
    assert step(scheduler) == {0: 4, 1: 2}
    assert step(scheduler) == {0: 1, 1: 5}
    scheduler.table.allocator.allocate(2)  # someone else takes the rest of the pool
    assert step(scheduler) == {0: 1, 1: 1}
    assert step(scheduler) == {0: 1}


def test_removing_a_request_frees_its_pages_whether_it_runs_or_waits():
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_request(0, 9), make_request(1, 1)
    scheduler.add(running)
    scheduler.add(waiting)
    step(scheduler)
    assert scheduler.table.allocator.num_free == 97
    scheduler.remove(running)
    scheduler.remove(waiting)
    assert scheduler.table.allocator.num_free == 100
    assert scheduler.schedule() == []


def test_a_kept_page_that_a_chunk_copies_is_not_taken_by_a_later_chunk_of_the_same_step():
    dropped = []
    table = PageTable(PageAllocator(3, on_drop=dropped.extend), PAGE_SIZE)
    scheduler = Scheduler(table, max_batch_tokens=100, max_num_seqs=100)
    scheduler.add(make_request(0, 3))
    assert step(scheduler) == {0: 3}
    scheduler.add(make_request(1, 4))
    assert step(scheduler) == {0: 1, 1: 4}
    table.allocator.keep(table.pages(0))
    table.trim(0, 3)  # the kept page is partly filled: to go on, the sequence must copy it
    [sequence] = scheduler.running[0].sequences
    sequence.num_computed = 3
    sequence.tokens.pop()
    chunks = scheduler.schedule()
    assert [len(chunk.copies) for chunk in chunks] == [1], "the second request must wait for the page"
    assert not dropped
    run(scheduler, chunks)
    scheduler.release_sources()
    assert table.allocator.num_available == 1
