"""A step's plan on the device: page tables that are there already, and what a bound call holds on to."""

import gc
import weakref

import pytest
import torch
from memory import Memory
from support import Shape, features, make_batch
from triton.runtime import interpreter as stock

import quire
from quire.kernels import triton as backend
from quire.kernels.call import AttentionCall
from quire.planning.step import largest_work, plan_step
from quire.planning.work_list import Capacity

pytestmark = pytest.mark.interpreted

SHAPE = Shape(torch.float32, 32, group=2)
LENGTHS = ([300, 0, 40, 17], [1, 1, 20, 1])


def step_of(batch, device_table=None):
    """A step whose page table is on the device, if one is given; its host table is then nonsense."""
    spec = batch.shape.spec(16)
    table = batch.page_table if device_table is None else torch.full_like(batch.page_table, 10**6)
    tiling = backend.tiling(spec, batch.q.device, 6)
    step = plan_step(table, batch.seq_lens, batch.cu_seqlens_q, spec.num_kv_heads, 16, True, -1, tiling)
    step.device_table = device_table
    return step


def attend(batch, step, reserved=None):
    out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2])
    call = AttentionCall(*batch.pages, out, lse)
    backend.bind(backend.prepare(batch.shape.spec(16), step, batch.q.device, reserved), call)(*call.tensors)
    return out, lse


def reserve(max_batch=6, max_seq_len=512, max_tokens=64):
    """Room for larger steps, filled with what a plan must overwrite or leave unread."""
    spec, device = SHAPE.spec(16), torch.device("cpu")
    tiling = backend.tiling(spec, device, max_batch)
    work = largest_work(tiling, spec.num_kv_heads, max_batch, max_tokens, max_seq_len, max_tokens)
    reserved = backend.reserve(
        spec, Capacity(max_batch, max_seq_len // 16, max_tokens, *work, True, -1, 0), device
    )
    reserved.plan.page_table.buffer.fill_(0x7FFFFFFF)
    return reserved


def test_a_table_on_the_device_may_be_refilled_or_dropped_once_it_is_planned():
    """The plan has a copy, and says of its pages what its kernels read."""
    batch = make_batch(SHAPE, *LENGTHS, page_size=16)
    wanted, table = attend(batch, step_of(batch)), batch.page_table.clone()
    step = step_of(batch, table)
    prepared = backend.prepare(SHAPE.spec(16), step, batch.q.device)
    table.fill_(10**6)
    out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2])
    call = AttentionCall(*batch.pages, out, lse)
    backend.bind(prepared, call)(*call.tensors)
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])
    assert (step.page_indices == step_of(batch).page_indices).all()
    kept = weakref.ref(table)
    del table
    assert kept() is None


TABLES = {
    "as it is": lambda table: table.clone(),
    "columns of a larger one": lambda table: torch.nn.functional.pad(table, (3, 40), value=-9)[:, 3:],
    "transposed": lambda table: table.T.contiguous().T,
    "the columns in use alone": lambda table: table[:, :19].clone(),
}


@pytest.mark.parametrize("reserved", [False, True])
@pytest.mark.parametrize("form", TABLES)
def test_a_table_on_the_device_gives_the_bits_of_one_on_the_host(form, reserved):
    batch = make_batch(SHAPE, *LENGTHS, page_size=16)
    wanted = attend(batch, step_of(batch))
    table = TABLES[form](batch.page_table)
    found = attend(batch, step_of(batch, table), reserve() if reserved else None)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert wanted[0].isfinite().all()


def test_a_plan_has_its_own_copy_of_the_table():
    batch = make_batch(SHAPE, *LENGTHS, page_size=16)
    table, out = batch.page_table.clone(), torch.empty_like(batch.q)
    prepared = backend.prepare(SHAPE.spec(16), step_of(batch, table), batch.q.device)
    table.fill_(10**6)
    call = AttentionCall(*batch.pages, out, None)
    backend.bind(prepared, call)(*call.tensors)
    assert torch.equal(out, attend(batch, step_of(batch))[0])


def test_the_copy_from_the_host_comes_last_and_leaves_the_table_alone(monkeypatch):
    """Behind it the next kernel may begin before the one ahead has ended, and reads the plan."""
    batch, copies, copy = make_batch(SHAPE, *LENGTHS, page_size=16), [], torch.Tensor.copy_

    def noted(target, source, **options):
        copies.append((target.storage_offset(), target.numel(), options))
        return copy(target, source, **options)

    reserved, step = reserve(), step_of(batch, batch.page_table)
    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    reserved.plan.fill(step)
    table = reserved.plan.page_table
    assert copies == [(table.start, 4 * 19, {}), (0, table.start, {"non_blocking": True})]


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_bound_call_keeps_no_tensor_alive(kv_dtype):
    """A Planner keeps hundreds of them, for as many numbers of tokens."""
    shape = Shape(torch.float32, 32, 2, kv_dtype)
    planner = quire.Planner(
        shape.spec(16), max_batch=4, max_seq_len=512, max_q_len=40, backend="triton", device="cpu"
    )
    batch = make_batch(shape, *LENGTHS, page_size=16)
    scoring = features(batch, softcap=True, alibi=True, sinks=True) | {"tree_mask": torch.ones(23, 40) > 0}
    plan = planner.plan(*batch.lengths)
    state = plan.run(*batch.pages, return_state=True, **batch.scales, **scoring)
    rows = torch.zeros(1, shape.num_kv_heads, 32)
    quire.write_kv(rows, rows, *batch.pages[1:], torch.tensor([-1]), **batch.scales, backend="triton")
    tensors = *batch.pages, *batch.scales.values(), *state, rows
    tensors += tuple(value for value in scoring.values() if isinstance(value, torch.Tensor))
    alive = [weakref.ref(tensor) for tensor in tensors]
    del batch, scoring, state, rows, tensors
    stock.interpreter_builder.memory = Memory()  # which holds the latest launch's arguments
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)
    assert plan.num_tokens == 23
