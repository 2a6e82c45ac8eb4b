"""Threads and processes: who sets how many there are, and that any of them may call at any time."""

import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import pytest
import torch
from processes import run_python
from support import Shape, attend, make_batch, plan_for

from quire.kernels.compile import part
from quire.kernels.cpu import threads as launch
from quire.kernels.cpu.simd import memory

SHAPE = Shape(torch.float32, 16, 3)  # compiled by other modules too
own_worker = pytest.mark.xdist_group("decode-float32-same-d16-g3")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

# What the processes below share: a step with long and short sequences, and a way to run it.
STEP = """
import json, os, sys, threading
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's and SciPy's threads are not those counted here
import torch

def compute():
    import quire
    from quire.kernels.cpu import wake
    wake.PAYS = wake.LITTLE = 0  # the step is little work, which would be one thread's
    own = torch.Generator().manual_seed(0)  # the global one has locks that a fork may find taken
    q, k, v = (torch.randn(shape, generator=own) for shape in ((2, 3, 16), (1, 80, 16, 16), (1, 80, 16, 16)))
    table = torch.arange(80, dtype=torch.int32).view(2, 40)
    lens = torch.tensor([630, 9], dtype=torch.int32)
    return quire.paged_attention(q, k, v, table, lens).tolist()

def threads_here():
    return len(os.listdir("/proc/self/task"))
"""


# --- loops and shares ------------------------------------------------------------------------------------


@part
def _count_visit(index, base, stride):
    at = base + index * stride
    memory.store_i64(at, memory.load_i64(at) + 1)


@numba.njit(nogil=True)
def _visit_all(threads, count, base, stride):
    launch.parallel_for(_count_visit, threads, count, (base, stride))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_a_parallel_loop_visits_every_index_once(threads, count):
    visits = torch.zeros(count + 1, dtype=torch.int64)
    _visit_all(threads, count, visits.data_ptr(), 8)
    assert visits.tolist() == [1] * count + [0]


def test_kernels_run_on_torchs_threads(set_threads):
    assert launch.HAS_OPENMP, "torch's OpenMP runtime was not found: kernels would run on one thread"
    for threads in (1, 2, 3):
        set_threads(threads)
        assert launch.num_threads() == threads


@own_worker
@pytest.mark.parametrize(("seq_lens", "q_lens"), [([700, 3, 90], None), ([300, 90, 7], [20, 90, 1])])
def test_the_same_input_gives_the_same_bits_run_after_run_on_any_threads(seq_lens, q_lens, set_threads):
    batch = make_batch(SHAPE, seq_lens, q_lens)
    plan = plan_for(batch, 5)
    first = plan.run(*batch.pages, return_state=True)
    for threads in (1, 2, 2, 4, 1):
        set_threads(threads)
        again = plan.run(*batch.pages, return_state=True)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)


@own_worker
@pytest.mark.parametrize("q_lens", [[1, 1], [40, 40]])
def test_workers_side_by_side_keep_out_of_one_anothers_scratch(q_lens, set_threads):
    batch = make_batch(SHAPE, [3000, 3000], q_lens)  # long enough for both to be at it at once
    plan = plan_for(batch, 2)
    set_threads(1)
    alone = plan.run(*batch.pages)
    set_threads(2)
    for _ in range(10):
        assert torch.equal(plan.run(*batch.pages), alone)


@own_worker
def test_calls_from_several_python_threads_at_once_do_not_disturb_one_another(set_threads):
    set_threads(2)
    batches = [make_batch(SHAPE, [40 * i + 1, 500, 3], [1, 20, 1], seed=i) for i in range(6)]
    wanted = [attend(batch).out for batch in batches]

    def repeat(i):
        return [attend(batches[i]).out for _ in range(15)]

    with ThreadPoolExecutor(6) as pool:
        for i, outs in enumerate(pool.map(repeat, range(6))):
            for out in outs:
                torch.testing.assert_close(out, wanted[i], atol=1e-6, rtol=0)


@own_worker
def test_a_kernel_is_compiled_once_however_many_tensors_it_meets():
    attend(make_batch(SHAPE, [3, 50], [1, 5]))
    before = len(launch._entries)
    for seed in range(3):
        attend(make_batch(SHAPE, [3, 50], [1, 5], seed=seed, layout="nhd"))
    assert len(launch._entries) == before


# --- how many threads ------------------------------------------------------------------------------------


COUNT = """
before = threads_here()
compute()
print(json.dumps([threads_here() - before + 1, torch.get_num_threads()]))
"""


@on_linux
@pytest.mark.parametrize(
    ("setting", "environment", "threads"),
    [
        pytest.param("", {"OMP_NUM_THREADS": "1"}, 1, marks=pytest.mark.exhaustive),
        ("torch.set_num_threads(3)", {"OMP_NUM_THREADS": "1"}, 3),
        pytest.param("torch.set_num_threads(1)", {"OMP_NUM_THREADS": "2"}, 1, marks=pytest.mark.exhaustive),
        ("os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])", {"OMP_NUM_THREADS": "2"}, 2),
    ],
    ids=["OMP_NUM_THREADS=1", "set_num_threads(3)", "set_num_threads(1)", "OMP_NUM_THREADS=2 on one core"],
)
def test_torchs_knobs_set_the_threads_that_kernels_run_on(setting, environment, threads):
    assert run_python(f"{STEP}\n{setting}\n{COUNT}", **environment) == [threads, threads]


@on_linux
def test_a_process_that_may_use_one_core_runs_on_one_thread(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    bound = "import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"  # as taskset does
    assert run_python(f"{bound}\n{STEP}\n{COUNT}") == [1, 1]


@own_worker
def test_threads_set_in_one_python_thread_count_for_those_started_later(set_threads):
    with ThreadPoolExecutor(1) as other:
        assert other.submit(launch.num_threads).result() == torch.get_num_threads()
        other.submit(set_threads, 3).result()
    with ThreadPoolExecutor(1) as younger:
        assert younger.submit(launch.num_threads).result() == 3


# --- several Python threads ------------------------------------------------------------------------------


@own_worker
def test_different_plans_run_side_by_side_give_the_bits_they_give_alone(set_threads):
    set_threads(2)
    shapes = [SHAPE, Shape(torch.float32, 16, 2), SHAPE, Shape(torch.float32, 40, 3, "fp8_e5m2")]
    batches = [
        make_batch(shape, [70 * i + 1, 900, 0, 33], [1, 20, 0, 1] if i % 2 else None, seed=i)
        for i, shape in enumerate(shapes * 2)
    ]
    plans = [plan_for(batch, 1 + i % 3) for i, batch in enumerate(batches)]

    def run(i):
        return plans[i].run(*batches[i].pages, return_state=True, **batches[i].scales)

    alone = [run(i) for i in range(len(plans))]
    start = threading.Barrier(len(plans))

    def repeat(i):
        start.wait()
        return [run(i) for _ in range(25)]

    with ThreadPoolExecutor(len(plans)) as pool:
        for wanted, states in zip(alone, pool.map(repeat, range(len(plans))), strict=True):
            for state in states:
                assert torch.equal(state.out, wanted.out)
                assert torch.equal(state.lse, wanted.lse)


@own_worker
def test_one_plan_may_be_run_by_many_threads_and_by_threads_of_threads(set_threads):
    set_threads(2)
    batch = make_batch(SHAPE, [900, 3, 90], [30, 1, 2])
    plan = plan_for(batch, 3)
    wanted = plan.run(*batch.pages)

    def inner(_):
        return torch.equal(plan.run(*batch.pages), wanted)

    def outer(_):
        with ThreadPoolExecutor(2) as pool:
            return all(pool.map(inner, range(10)))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(outer, range(6)))


@own_worker
def test_python_goes_on_while_a_kernel_runs(set_threads):
    """Another thread sees the first rows written while the last ones are not: the GIL was free between."""
    set_threads(1)
    batch = make_batch(SHAPE, [3000] * 64)
    plan = plan_for(batch, 1)
    out = torch.empty_like(batch.q)
    first, last = out[0].numpy(), out[-1].numpy()
    for _ in range(50):  # a busy machine may not let us look in time
        out.fill_(math.nan)
        kernel = threading.Thread(target=plan.run, args=batch.pages, kwargs={"out": out})
        kernel.start()
        seen_between = False
        while kernel.is_alive() and not seen_between:
            unfinished = math.isnan(last[-1, -1])  # looked at first: what is true of it now was true before
            seen_between = not math.isnan(first[0, 0]) and unfinished and math.isnan(last[-1, -1])
        kernel.join()
        if seen_between:
            return
    pytest.fail("the kernel was never seen at work: it holds the GIL")


@own_worker
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_kernels_compute_the_same_in_every_grad_mode(mode):
    batch = make_batch(SHAPE, [300, 3], [20, 1])
    wanted = plan_for(batch, 2).run(*batch.pages)
    with mode():
        plan = plan_for(batch, 2)
        assert torch.equal(plan.run(*batch.pages), wanted)
        out = torch.empty_like(batch.q)
        plan.run(*batch.pages, out=out)
        assert torch.equal(out, wanted)


# --- after a fork ----------------------------------------------------------------------------------------

# Runs a function in forked children; a child that waits for threads it does not have is ended by the alarm.
FORK = """
import signal, traceback

def in_child(function):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(120)
    try:
        os._exit(0 if function() else 3)
    except BaseException:
        traceback.print_exc()
    os._exit(4)
"""


@on_linux
@forks
def test_children_of_any_parent_compute_on_all_their_threads_and_so_does_the_parent():
    exits = run_python(
        STEP
        + FORK
        + """
wanted = None
torch.set_num_threads(2)

def right():
    return compute() == wanted and threads_here() > 1

def right_in_a_thread():
    answers = []
    thread = threading.Thread(target=lambda: answers.append(right()))
    thread.start(); thread.join()
    return answers == [True]

def right_in_a_grandchild():
    return right() and in_child(right) == 0

def right_on_one_thread():
    torch.set_num_threads(1)
    before = threads_here()
    return torch.allclose(torch.tensor(compute()), torch.tensor(wanted), atol=1e-6) and threads_here() == before

exits = {}
torch.ones(1 << 22).add_(1)  # torch has made its threads; Quire's kernels are not even imported
exits["of torch alone"] = in_child(lambda: compute() and threads_here() > 1)
wanted = compute()
exits["again and again"] = max(in_child(right) for _ in range(3))
exits["a thread of its own"] = in_child(right_in_a_thread)
exits["a grandchild"] = in_child(right_in_a_grandchild)
exits["one thread"] = in_child(right_on_one_thread)
from_thread = []
thread = threading.Thread(target=lambda: (compute(), from_thread.append(in_child(right))))
thread.start(); thread.join()
exits["forked by a thread"] = from_thread[0]
exits["the parent"] = 0 if right() else 3
print(json.dumps(exits))
"""
    )
    assert exits == dict.fromkeys(exits, 0)
    assert len(exits) == 7


@on_linux
@forks
def test_children_forked_while_other_threads_compute_are_right():
    exits = run_python(
        STEP
        + FORK
        + """
torch.set_num_threads(2)
wanted = compute()
stop = threading.Event()

def busy():
    while not stop.is_set():
        assert compute() == wanted

threads = [threading.Thread(target=busy) for _ in range(2)]
[thread.start() for thread in threads]
exits = [in_child(lambda: compute() == wanted) for _ in range(10)]
stop.set()
[thread.join() for thread in threads]
print(json.dumps(exits))
"""
    )
    assert exits == [0] * 10


@forks
@pytest.mark.parametrize(
    "method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.exhaustive)]
)
def test_worker_processes_compute_what_their_parent_does(method, tmp_path):
    """multiprocessing's pools and, where workers are forks, a DataLoader's."""
    (tmp_path / "work.py").write_text(
        STEP
        + """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(compute())

def answer(_):
    torch.set_num_threads(2)
    return compute()

def answers(method):
    context = multiprocessing.get_context(method)
    with context.Pool(2 if method == "fork" else 1) as pool:
        found = pool.map(answer, range(4), chunksize=1)
    if method == "fork":
        found += [batch[0].tolist() for batch in torch.utils.data.DataLoader(Rows(), num_workers=2)]
    return found

import multiprocessing
"""
    )
    found = run_python(
        f"""
        import json, sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch, work
        torch.set_num_threads(2)
        wanted = work.compute()
        print(json.dumps([wanted, *work.answers({method!r}), work.compute()]))
        """,
        timeout=900,
    )
    assert len(found) == (10 if method == "fork" else 6)
    for rows in found:
        torch.testing.assert_close(torch.tensor(rows), torch.tensor(found[0]), atol=1e-6, rtol=0)
