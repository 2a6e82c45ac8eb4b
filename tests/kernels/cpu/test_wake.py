"""Little work stays on one thread, more of it on a busy machine; and whoever does the work, the bits are the same."""

import pytest
import torch
from support import Shape, make_batch, plan_for

import quire
from quire.kernels.cpu import backend, linear, threads, wake

SHAPE = Shape(torch.float32, 16, 3)  # compiled by other modules too
MILLISECOND = 1_000_000


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""

    class Clock:
        now = 1_000 * MILLISECOND

        def perf_counter_ns(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(wake, "time", clock)
    monkeypatch.setattr(threads, "time", clock)
    monkeypatch.setattr(wake, "_calm_until", 0)
    return clock


@pytest.fixture
def launches(monkeypatch):
    """The threads of every kernel that is run, by the kernel's name; the kernels do nothing."""
    seen = {}

    def launch(function, config, threads, nanoseconds, *args):
        seen[function.__name__] = threads
        return True

    monkeypatch.setattr(backend, "run", launch)
    monkeypatch.setattr(linear, "run", launch)
    monkeypatch.setattr(wake, "_calm_until", 0)  # whatever a test before this one has met on a busy machine
    return seen


def plan(num_keys, q_len=1, batch=1, **rules):
    spec = quire.AttentionSpec(8, 2, 64, page_size=16, dtype=torch.float32)
    table = torch.zeros(batch, -(-num_keys // 16), dtype=torch.int32)
    lens = torch.full((batch,), num_keys, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32) * q_len
    return spec, quire.plan(table, lens, spec, starts, **rules)


def run(spec, plan):
    pages = torch.zeros(2, spec.num_kv_heads, 1, spec.page_size, spec.head_dim)
    plan.run(torch.zeros(plan.num_tokens, spec.num_qo_heads, spec.head_dim), *pages)


# --- how much work is worth a thread ---------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_plan_of_little_work_has_one_worker_and_one_of_much_work_has_all(
    kernel, batch_invariant, set_threads
):
    set_threads(4)
    q_len = 1 if kernel == "decode" else 2
    kernel = "prefill" if batch_invariant else kernel
    for num_keys, workers in ((40, 1), (20_000, 4)):
        _, made = plan(num_keys, q_len, batch_invariant=batch_invariant)
        work = getattr(made.step, kernel)
        assert work.num_workers == workers
        assert f"on {workers} worker{'s' * (workers > 1)}, " in made.explain()
        assert work.worker_indptr[-1] == work.num_items
    little = plan(40, q_len)[1].step
    assert getattr(little, kernel).num_merges == 0  # whole tiles: there is nothing to merge


def test_many_short_sequences_are_as_much_work_as_a_long_one(set_threads):
    set_threads(2)
    assert plan(40)[1].step.decode.num_workers == 1
    assert plan(40, batch=200)[1].step.decode.num_workers == 2


def test_the_shares_of_a_plan_do_not_depend_on_how_busy_the_machine_is(set_threads, clock):
    set_threads(2)
    _, quiet = plan(900)
    wake.note(100, 10 * MILLISECOND)
    _, busy = plan(900)
    assert quiet.step.decode.num_workers == busy.step.decode.num_workers == 2
    assert (quiet.step.decode.items == busy.step.decode.items).all()


@pytest.mark.parametrize(("num_keys", "num_threads"), [(40, 1), (20_000, 2)])
def test_attention_runs_on_one_thread_where_the_plan_has_one_worker(
    num_keys, num_threads, set_threads, launches
):
    set_threads(2)
    run(*plan(num_keys))
    assert launches["decode"] == num_threads


@pytest.mark.parametrize(("tokens", "num_threads"), [(1, 1), (4000, 2)])
def test_few_tokens_are_stored_by_one_thread(tokens, num_threads, set_threads, launches):
    set_threads(2)
    pages = torch.zeros(2, 2, 500, 8, 24)
    k = torch.zeros(tokens, 2, 24)
    quire.write_kv(k, k, *pages, torch.arange(tokens))
    assert launches == {"write": num_threads}


@pytest.mark.parametrize(
    ("rows", "tokens", "num_threads"), [(64, 1, 1), (2048, 1, 2), (128, 2, 1), (128, 24, 2)]
)
def test_a_small_linear_layer_is_one_threads(rows, tokens, num_threads, set_threads, launches):
    set_threads(2)
    x, weight = torch.zeros(tokens, 256), torch.zeros(rows, 256)
    linear.linear(x, weight, None, torch.zeros(tokens, rows))
    assert launches == {"multiply": num_threads}


# --- on a busy machine -----------------------------------------------------------------------------------


def test_little_work_that_came_late_keeps_little_work_on_one_thread_for_a_while(clock, set_threads):
    set_threads(3)
    little, much = wake.LITTLE - 1, wake.LITTLE
    assert threads.threads_for(little) == 3
    wake.note(little, little + wake.LATE + 1)
    assert threads.threads_for(little) == 1
    assert threads.threads_for(much) == 3
    clock.now += wake.CALM - 1
    assert threads.threads_for(little) == 1
    clock.now += 1
    assert threads.threads_for(little) == 3


@pytest.mark.parametrize(
    ("expected", "took"),
    [(20_000, 20_000 + wake.LATE), (wake.LITTLE, 100 * MILLISECOND)],
    ids=["in time", "much work"],
)
def test_work_in_time_and_much_work_say_nothing_about_the_machine(clock, set_threads, expected, took):
    set_threads(3)
    wake.note(expected, took)
    assert threads.threads_for(20_000) == 3


def test_each_call_on_several_threads_is_timed_and_none_on_one(clock, set_threads, monkeypatch):
    set_threads(2)

    def kernel(config, threads):
        clock.now += 2 * MILLISECOND

    monkeypatch.setitem(threads._entries, (kernel, ()), kernel)
    threads.run(kernel, (), 1, 20_000)
    assert threads.threads_for(20_000) == 2
    threads.run(kernel, (), 2, 20_000)
    assert threads.threads_for(20_000) == 1


def test_a_plan_of_many_shares_is_run_by_one_thread_while_the_machine_is_busy(clock, set_threads, launches):
    set_threads(2)
    spec, made = plan(900)
    run(spec, made)
    assert launches["decode"] == 2
    wake.note(20_000, MILLISECOND)
    run(spec, made)
    assert launches["decode"] == 1
    run(*plan(60_000))
    assert launches["decode"] == 2


# --- the same bits ---------------------------------------------------------------------------------------


@pytest.mark.xdist_group("decode-float32-same-d16-g3")
def test_a_busy_machine_changes_no_bit_of_attention(set_threads, clock):
    set_threads(2)
    batch = make_batch(SHAPE, [700, 3, 90])
    shared = plan_for(batch, 2)
    quiet = shared.run(*batch.pages)
    wake.note(100, MILLISECOND)
    assert torch.equal(shared.run(*batch.pages), quiet)


def test_linear_layers_have_the_same_bits_on_any_threads(set_threads, monkeypatch):
    x, weight, bias = torch.randn(3, 40), torch.randn(101, 40), torch.randn(101)

    def product(num_threads, pays):
        monkeypatch.setattr(wake, "PAYS", pays)
        set_threads(num_threads)
        out = torch.full((3, 101), torch.nan)
        linear.linear(x, weight, bias, out)
        return out

    alone = product(3, 10_000)
    for num_threads in (1, 2, 5):
        assert torch.equal(product(num_threads, 0), alone)


def test_tokens_are_stored_alike_on_any_threads(set_threads, monkeypatch):
    k, v, slots = torch.randn(50, 2, 16), torch.randn(50, 2, 16), torch.randperm(64)[:50]

    def stored(num_threads, pays):
        monkeypatch.setattr(wake, "PAYS", pays)
        set_threads(num_threads)
        pages = torch.zeros(2, 2, 8, 8, 16)
        quire.write_kv(k, v, *pages, slots)
        return pages

    alone = stored(3, 10_000)
    for num_threads in (2, 5):
        assert torch.equal(stored(num_threads, 0), alone)
