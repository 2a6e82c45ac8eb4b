"""What is compiled ahead is all that steps run."""

import pytest
import torch
from support import Shape, make_batch, plan_for

import quire
from quire.errors import ArgumentError, UnsupportedError
from quire.kernels.compile import signature_of
from quire.kernels.cpu import backend, threads
from quire.ops import warm_up
from quire.ops.warm_up import compile_jobs
from quire.planning.stream_k import cut_step

CPU = torch.device("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def launched(monkeypatch):
    """Name and types of every kernel that is run; none is compiled, and none does anything."""
    seen = set()

    def machine_code(function, *arguments):
        seen.add((function.__name__, signature_of(*arguments)))
        return lambda *_: True

    monkeypatch.setattr(threads, "_entries", {})
    monkeypatch.setattr(threads, "machine_code", machine_code)
    return seen


def expected(spec):
    return {(job.function, signature_of(*job.arguments)) for job in compile_jobs([spec], "auto", CPU)}


@pytest.mark.parametrize(
    "shape",
    [
        Shape(F32, 16, 3),
        Shape(BF16, 64, 1),
        Shape(BF16, 128, 40),
        Shape(F16, 40, 4, "int8"),
        Shape(BF16, 64, 2, "fp8_e5m2"),
    ],
    ids=str,
)
def test_planning_storing_attending_and_merging_run_what_was_compiled_ahead(shape, launched):
    batch = make_batch(shape, [700, 300], [1, 40])
    for invariant in (False, True):
        plan = plan_for(batch, 5, batch_invariant=invariant)
        plan.run(*batch.pages, return_state=True, **batch.scales)
    heads = shape.num_kv_heads
    k = torch.zeros(3, heads, shape.head_dim, dtype=shape.dtype)
    pages = (batch.k_pages.clone(), batch.v_pages.clone())
    scales = [None if scale is None else scale.clone() for scale in batch.scales.values()]
    named = dict(zip(batch.scales, scales, strict=True))
    quire.write_kv(k, k, *pages, torch.arange(3), **named)

    ready = expected(shape.spec(batch.page_size))
    assert {name for name, _ in launched} == {"decode", "prefill", "merge", "write"}
    assert launched <= ready
    for helper in (cut_step, backend.addresses):
        used = {(helper.__name__, signature) for signature in helper.overloads}
        assert used
        assert used <= ready


def test_kernels_that_are_alike_are_one():
    alike = [quire.AttentionSpec(8, 2, 64), quire.AttentionSpec(16, 4, 64, page_size=32)]
    assert expected(alike[0]) == expected(alike[1])


def test_warm_up_compiles_all_specs_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(warm_up, "compile_ahead", asked.append)
    specs = [quire.AttentionSpec(8, 2, 64), quire.AttentionSpec(8, 2, 64, kv_dtype="int8")]
    assert quire.warm_up(*specs) is None
    [jobs] = asked
    assert {job.key() for job in jobs} == {job.key() for job in compile_jobs(specs, "cpu", CPU)}


def test_a_backend_that_compiles_when_it_is_launched_has_its_planner_compiled():
    [job] = compile_jobs([quire.AttentionSpec(8, 2, 64)], "reference", CPU)
    assert job.function == "cut_step"


def test_what_cannot_be_warmed_up_is_refused():
    with pytest.raises(ArgumentError, match=r"spec must be an AttentionSpec; got .* Fix: "):
        quire.warm_up("llama")
    with pytest.raises(ArgumentError, match='backend must be "auto" or one of'):
        quire.warm_up(quire.AttentionSpec(8, 2, 64), backend="gpu")
    with pytest.raises(UnsupportedError, match="values must be as wide as keys"):
        quire.warm_up(quire.AttentionSpec(8, 1, 64, value_dim=32), backend="cpu")
