"""The three operators in torch's hands: whole under torch.compile, never compiled anew for a step, sound by opcheck."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from accuracy import exact
from support import Batch, Shape, make_batch, plan_for
from torch.utils._python_dispatch import TorchDispatchMode

import quire
from quire.ops import attention, attention_plan, checks, torch_op
from quire.planning import checks as step_checks

SHAPE = Shape(torch.float32, head_dim=16, group=2)
PAGE = 4

# One worker compiles the kernels of this shape, not both.
pytestmark = pytest.mark.xdist_group("attention-float32-d16-g2")


def mixed(seed: int) -> Batch:
    """Decode, prefill, a chunk behind a cached prefix, and an empty sequence; seeds 0 to 2 have equal shapes."""
    return make_batch(SHAPE, [9 + seed, 6, 14 + seed, 0], [1, 6, 5, 1], page_size=PAGE, seed=seed)


def close(result: torch.Tensor, batch: Batch) -> None:
    torch.testing.assert_close(result.double(), exact(batch).out, atol=2e-6, rtol=2e-6)


def write_then_attend(
    batch: Batch, plan: quire.AttentionPlan, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer: all three operators, ordinary arithmetic around them."""
    quire.write_kv(k * 2, v + 1, batch.k_pages, batch.v_pages, slots)
    planned = plan.run(batch.q * 3, batch.k_pages, batch.v_pages, return_state=True)
    at_once = quire.paged_attention(
        batch.q, batch.k_pages, batch.v_pages, *batch.lengths, sinks=k[0, :, 0].repeat(2)
    )
    return planned.out + 1, planned.lse * 2, at_once


def layer_inputs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New keys and values for three tokens in the first page of sequence 0, and their slots."""
    generator = torch.Generator().manual_seed(5)
    k, v = torch.randn(2, 3, 2, 16, generator=generator)
    slots = batch.page_table[0, 0].long() * PAGE + torch.tensor([0, 1, 3])
    return k, v, slots


def twins(seed: int) -> tuple[Batch, Batch]:
    """The same batch twice: each has pages of its own to write."""
    return mixed(seed=seed), mixed(seed=seed)


def compiled_layer(backend: Any) -> Callable[..., Any]:
    torch._dynamo.reset()

    def layer(q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, plan, k, v, slots):
        batch = Batch(SHAPE, PAGE, q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q)
        return write_then_attend(batch, plan, k, v, slots)

    return torch.compile(layer, fullgraph=True, backend=backend)


def assert_same_as_eager(layer: Callable[..., Any], seed: int) -> None:
    eager, traced = twins(seed)
    wanted = write_then_attend(eager, plan_for(eager), *layer_inputs(eager))
    got = layer(*traced.pages, *traced.lengths, plan_for(traced), *layer_inputs(traced))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(traced.k_pages, eager.k_pages, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(traced.v_pages, eager.v_pages, atol=0, rtol=0, equal_nan=True)
    assert got[0].isfinite().all()


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor compiles C++"
)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.exhaustive])]
)
def test_a_compiled_layer_is_one_graph_with_the_eager_values(backend):
    assert_same_as_eager(compiled_layer(backend), seed=0)


def test_the_three_operators_are_kept_whole_in_the_graph():
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if "quire" in str(node.target))
        return graph

    assert_same_as_eager(compiled_layer(keep), seed=0)
    assert seen == ["quire.write_kv", "quire.run_plan", "quire.paged_attention"]


def test_another_plan_or_other_lengths_do_not_compile_anew():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = compiled_layer(counter)
    assert_same_as_eager(layer, seed=0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_as_eager(layer, seed=1)
        assert_same_as_eager(layer, seed=2)
    assert counter.frame_count == 1


def test_a_plan_that_the_compiled_layer_has_never_seen_is_the_one_that_runs():
    """Same shapes, another step: a graph that kept the first plan would attend to the wrong keys."""
    torch._dynamo.reset()
    batch = make_batch(SHAPE, [9, 9], page_size=PAGE)
    run = torch.compile(lambda plan, q, k, v: plan.run(q, k, v), fullgraph=True, backend="aot_eager")
    close(run(plan_for(batch), *batch.pages), batch)
    batch.seq_lens = torch.tensor([5, 8], dtype=torch.int32)
    close(run(plan_for(batch), *batch.pages), batch)


def test_a_plan_is_found_by_its_number_until_it_is_gone():
    plan = plan_for(mixed(seed=0))
    number = int(plan._number)
    assert attention_plan._plans[number]() is plan
    del plan
    assert number not in attention_plan._plans


@pytest.mark.parametrize("with_lse", [True, False])
def test_opcheck_finds_nothing_wrong_with_paged_attention(with_lse):
    batch = make_batch(SHAPE, [9, 6, 14], [1, 6, 5], page_size=PAGE)
    out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2]) if with_lse else None
    torch.library.opcheck(
        torch.ops.quire.paged_attention,
        (
            batch.q, batch.k_pages.nan_to_num(), batch.v_pages.nan_to_num(), *batch.lengths, out, lse,
            True, 4, False, "cpu", 0.3, 2.0, torch.rand(4), torch.randn(4), torch.ones(12, 6, dtype=torch.bool),
            None, None,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("with_lse", [True, False])
def test_opcheck_finds_nothing_wrong_with_run_plan(with_lse):
    batch = make_batch(SHAPE, [9, 6, 14], [1, 6, 5], page_size=PAGE)
    out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2]) if with_lse else None
    plan = plan_for(batch)
    torch.library.opcheck(
        torch.ops.quire.run_plan,
        (
            plan._number, batch.q, batch.k_pages.nan_to_num(), batch.v_pages.nan_to_num(), out, lse,
            None, 0.0, None, None, None, None, None,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_opcheck_finds_nothing_wrong_with_write_kv(dtype):
    k, v = torch.randn(2, 3, 2, 16)
    k_pages, v_pages = torch.zeros(2, 2, 5, PAGE, 16).to(dtype)
    k_scale, v_scale = torch.zeros(2, 2, 5, PAGE) if dtype == torch.int8 else (None, None)
    slots = torch.tensor([3, -1, 17])
    torch.library.opcheck(
        torch.ops.quire.write_kv, (k, v, k_pages, v_pages, slots, k_scale, v_scale, "reference")
    )


def run_plan(batch: Batch) -> torch.Tensor:
    return plan_for(batch).run(*batch.pages)


def test_a_dispatch_mode_sees_every_call():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    batch = mixed(seed=0)
    unwatched = run_plan(batch)
    with Watch():
        watched = run_plan(batch)
        k, v, slots = layer_inputs(batch)
        quire.write_kv(k, v, batch.k_pages, batch.v_pages, slots)
    assert torch.equal(watched, unwatched)
    assert "quire.run_plan.default" in seen
    assert "quire.write_kv.default" in seen


def test_a_profiler_sees_the_operator_by_name():
    batch = mixed(seed=0)
    with torch.profiler.profile() as profile:
        run_plan(batch)
    assert "quire::run_plan" in {event.name for event in profile.events()}


def test_a_transform_is_told_by_torch_that_there_is_no_rule_for_it():
    batch = mixed(seed=0)
    plan = plan_for(batch)
    with pytest.raises(RuntimeError, match="quire::run_plan"):
        torch.func.vmap(lambda q: plan.run(q, batch.k_pages, batch.v_pages))(batch.q[None])


def test_one_call_that_nobody_watches_skips_the_dispatcher(monkeypatch):
    def dispatcher(*arguments):
        raise AssertionError("the call went through torch")

    batch = mixed(seed=0)
    wanted = quire.paged_attention(*batch.pages, *batch.lengths, return_state=True)
    monkeypatch.setattr(attention, "torch", SimpleNamespace(ops=SimpleNamespace(quire=dispatcher)))
    state = quire.paged_attention(*batch.pages, *batch.lengths, return_state=True)
    assert torch.equal(state.out, wanted.out)
    assert torch.equal(state.lse, wanted.lse)
    monkeypatch.setattr(attention, "is_watched", lambda tensor: True)
    with pytest.raises(AttributeError, match="paged_attention"):
        quire.paged_attention(*batch.pages, *batch.lengths)


@pytest.mark.parametrize(
    ("watched", "wanted"),
    [
        (False, {"check_rules": 1, "check_numbers": 1}),
        (True, {"check_rules": 2, "check_numbers": 2, "check_door": 1}),
    ],
)
def test_what_is_checked_is_checked_once_on_either_side_of_the_dispatcher(monkeypatch, watched, wanted):
    asked: Counter[str] = Counter()

    def counted(module, name):
        check = getattr(module, name)

        def count(*arguments, **named):
            asked[name] += 1
            return check(*arguments, **named)

        monkeypatch.setattr(module, name, count)

    layer = {"check_queries": 1, "check_pages": 2, "check_alike": 1, "check_scales": 1, "check_out": 1}
    for name in ("check_door", "check_numbers", *layer):
        counted(checks, name)
    counted(step_checks, "check_rules")
    for module in (attention, attention_plan):
        monkeypatch.setattr(module, "is_watched", lambda tensor: watched)
    batch = mixed(seed=0)
    quire.paged_attention(*batch.pages, *batch.lengths)
    assert asked == wanted | layer

    plan = plan_for(batch)
    asked.clear()
    for _ in range(3):
        plan.run(*batch.pages)
    at_the_door = 3 if watched else 0
    wanted_of_run = {"check_door": at_the_door, "check_numbers": 1 + at_the_door}
    assert asked == {name: count for name, count in wanted_of_run.items() if count} | layer


def test_without_torchs_private_functions_every_call_goes_through_the_dispatcher():
    """As on a torch that has none of that name: it was an AttributeError of `import quire`."""
    code = """
import torch
places = (torch._C, "_len_torch_dispatch_stack"), (torch._C._functorch, "peek_interpreter_stack"), (
    torch._C._autograd, "_profiler_enabled")
kept = [getattr(module, name) for module, name in places]
for module, name in places:
    delattr(module, name)
import quire
from quire.ops import torch_op
for (module, name), function in zip(places, kept):
    setattr(module, name, function)  # torch itself calls them
assert torch_op.is_watched(torch.zeros(1))
k, q = torch.randn(2, 3, 4, 16), torch.randn(1, 4, 16)
table, lens = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([6])
with torch.profiler.profile() as profile:
    out = quire.paged_attention(q, k, k, table, lens, backend="reference")
assert "quire::paged_attention" in {event.name for event in profile.events()}
assert out.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["_active_modes", "_active_transform", "_profiler_enabled"])
def test_one_function_that_is_gone_is_enough_to_watch(monkeypatch, name):
    tensor = torch.zeros(1)
    assert not torch_op.is_watched(tensor)
    monkeypatch.setattr(torch_op, name, torch_op._of_torch("no.such.function"))
    assert torch_op.is_watched(tensor)


@pytest.mark.exhaustive
def test_the_first_use_of_a_name_may_be_inside_a_compiled_function():
    """Quire's names are loaded on first use, here while torch traces."""
    program = """
import torch, quire
@torch.compile(fullgraph=True, backend="eager")
def layer(q, pages, table, lens, k, slots):
    quire.write_kv(k, k, pages, pages, slots, backend="reference")
    return quire.paged_attention(q, pages, pages, table, lens, backend="reference") + 1
one = torch.ones(1, dtype=torch.int32)
out = layer(torch.ones(1, 2, 8), torch.zeros(1, 4, 4, 8), one[None] * 2, one, torch.ones(1, 1, 8), torch.tensor([8]))
assert (out == 2).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
