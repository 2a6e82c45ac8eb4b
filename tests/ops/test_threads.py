"""One plan and the store from several threads at once: each computes what it computes alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from mixed_batch import PAGE, SHAPE, mixed
from support import plan_for

import quire

THREADS, ROUNDS = 4, 6

# One worker compiles the kernels of this shape, not both.
pytestmark = pytest.mark.xdist_group("attention-float32-d16-g2")


def at_once(work):
    """work(0) … work(THREADS − 1), each in a thread of its own, begun together."""
    begin = Barrier(THREADS)

    def run(number):
        begin.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_plan_serves_threads_whose_layers_differ(backend):
    """Layouts alternate, so that each thread finds another's layout to be the last."""
    batch = mixed()
    queries = [batch.q * (i + 1) for i in range(THREADS)]
    scales = [{"softmax_scale": None if i % 2 else 0.5} for i in range(THREADS)]

    def run(plan, number):
        return plan.run(queries[number], batch.k_pages, batch.v_pages, **scales[number])

    wanted = [run(plan_for(batch, backend=backend), number) for number in range(THREADS)]
    plan = plan_for(batch, backend=backend)
    results = at_once(lambda number: [run(plan, number) for _ in range(ROUNDS)])
    for of_thread, alone in zip(results, wanted, strict=True):
        assert all(torch.equal(result, alone) for result in of_thread)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_threads_write_to_pages_of_their_own_at_once(backend):
    heads, dim = SHAPE.num_kv_heads, SHAPE.head_dim
    k, v = torch.randn(2, THREADS, ROUNDS, heads, dim, generator=torch.Generator().manual_seed(0))

    def pool():
        return [torch.zeros(heads, THREADS * ROUNDS, PAGE, dim) for _ in "kv"]

    def write(pages, number):
        for i in range(ROUNDS):  # another number of tokens each time: another layout
            slots = torch.arange(i + 1) + (number * ROUNDS + i) * PAGE
            slots[PAGE:] = -1
            quire.write_kv(k[number, : i + 1], v[number, : i + 1], *pages, slots, backend=backend)

    wanted, pages = pool(), pool()
    for number in range(THREADS):
        write(wanted, number)
    at_once(lambda number: write(pages, number))
    for got, alone in zip(pages, wanted, strict=True):
        assert alone.any()
        assert torch.equal(got, alone)
