"""What judges the GPU kernels is judged itself: against the reference, and by mistakes it must see."""

from __future__ import annotations

import math

import pytest
import torch

import quire
from benchmarks.cases import parse_case
from benchmarks.gpu.batches import FEATURES, LAYOUTS, exact, make_batch, plain
from benchmarks.gpu.checks import (
    check_attention,
    check_batch,
    check_far_pages,
    check_invariance,
    check_write_kv,
)
from benchmarks.gpu.device import Host
from benchmarks.gpu.jobs import Setting
from benchmarks.gpu.layers import layers_beyond_cache, make_layers
from benchmarks.gpu.speed import parse_spec
from benchmarks.judge import judge
from quire.kernels import reference

CPU = torch.device("cpu")
LENGTHS = [(40, 1), (0, 1), (37, 21), (9, 9), (5, 8), (30, 0)]
SETTING = Setting("cpu", "reference", seed=3, quick=True)
SPEC = parse_spec("8/2x16", 16, "float32", None)


@pytest.mark.parametrize("features", [(), *((name,) for name in FEATURES), FEATURES])
@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8_e4m3"])
def test_plain_attention_is_the_references_but_for_rounding(features, kv_dtype):
    spec = quire.AttentionSpec(8, 2, 16, 16, torch.float32, kv_dtype)
    batch = make_batch(spec, LENGTHS, CPU, seed=1, features=features)
    torch.testing.assert_close(plain(batch).double(), exact(batch).out, atol=2e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_the_same_in_every_layout_and_poison_fills_the_rest(layout):
    batch = make_batch(SPEC, LENGTHS, CPU, seed=1, layout=layout)
    torch.testing.assert_close(exact(batch), exact(make_batch(SPEC, LENGTHS, CPU, seed=1)))
    owned = batch.k_pages.isfinite().all(-1)
    assert owned.sum() == SPEC.num_kv_heads * sum(seq_len for seq_len, _ in LENGTHS)
    assert batch.k_pages[~owned].isnan().all()


def test_the_reference_passes_every_check():
    device = Host()
    rows = check_attention(device, SETTING, heads="4/2x16", features=["window", "sinks"], title="a")
    rows += check_attention(device, SETTING, heads="4/2x16", kv_dtype="int8", layout="nhd", title="b")
    rows += check_write_kv(device, SETTING, kv_dtype="fp8_e5m2", title="c")
    rows += check_far_pages(device, SETTING, title="d")
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert all(row["max_error"] <= row["allowed_error"] for row in rows if "max_error" in row)


def spoil(monkeypatch, damage):
    """Let the reference backend make a mistake after each attention."""
    right = reference.attend

    def wrong(step, call):
        right(step, call)
        if call.out.dtype != torch.float64:  # not where it serves as the judge
            damage(call)

    monkeypatch.setattr(reference, "attend", wrong)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda call: call.out.view(-1)[3].fill_(math.nan), "poison"),
        (lambda call: call.out[1].fill_(1e-9), "not zero"),
        (lambda call: None if call.lse is None else call.lse[0].add_(1e-3), "lse off"),
        (lambda call: None if call.lse is None else call.lse[0].fill_(-math.inf), "−inf"),
        (lambda call: None if call.lse is None else call.out[0].mul_(1.0001), "different bits"),
    ],
)
def test_what_is_not_rounding_is_named(monkeypatch, damage, complaint):
    spoil(monkeypatch, damage)
    with pytest.raises(AssertionError, match=complaint):
        check_batch(make_batch(SPEC, LENGTHS, CPU, seed=1), "reference")


def test_a_wrong_result_makes_a_wrong_row_that_names_the_step(monkeypatch):
    spoil(monkeypatch, lambda call: call.out.mul_(1.01))
    [row] = check_attention(Host(), SETTING, heads="4/2x16", title="a")
    assert row["status"] == "wrong"
    assert "prefill: error" in row["note"]
    assert row["max_error"] > row["allowed_error"]


def test_a_wrong_store_is_counted(monkeypatch):
    right = reference.write_kv

    def wrong(k, v, k_pages, *rest):
        right(k, v, k_pages, *rest)
        if k_pages is not wrong.spared:
            k_pages[0, 0, 0, 0] += 1.0

    calls = []

    def first_wrong_then_right(*arguments):
        wrong.spared = arguments[2] if calls else None
        calls.append(1)
        wrong(*arguments)

    monkeypatch.setattr(reference, "write_kv", first_wrong_then_right)
    [row] = check_write_kv(Host(), SETTING, title="a")
    assert row["status"] == "wrong"
    assert row["note"].startswith("k_pages differs in 1 of")


# Layers whose kernels the kernels' own tests compile too.
INVARIANT = [
    pytest.param("bfloat16", None, "4/2x128"),
    pytest.param("bfloat16", "int8", "4/2x64"),
    pytest.param("float16", "fp8_e4m3", "4/2x72", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("dtype", "kv_dtype", "heads"), INVARIANT)
def test_batch_invariant_plans_of_the_cpu_pass(dtype, kv_dtype, heads):
    [row] = check_invariance(
        Host(), Setting("cpu", "cpu", quick=True), dtype=dtype, kv_dtype=kv_dtype, heads=heads, title="a"
    )
    assert (row["status"], row["note"]) == ("ok", "")
    assert row["max_error"] <= row["allowed_error"]


@pytest.mark.parametrize(
    ("spoiled", "named"),
    [
        (lambda plan: len(plan.step.seq_lens) == 3 and plan.num_tokens > 2000, "in company: out differs in 1 of"),
        (lambda plan: len(plan.step.seq_lens) == 1 and plan.num_tokens < plan.step.seq_lens[0], "in two steps: out"),
        (lambda plan: plan.num_tokens == 3, "last tokens decoded: out differs in 1 of"),
    ],
)  # fmt: skip
def test_a_bit_that_depends_on_the_batch_is_counted(monkeypatch, spoiled, named):
    right = quire.AttentionPlan.run

    def wrong(plan, *arguments, **options):
        state = right(plan, *arguments, **options)
        if spoiled(plan):
            state.out.view(torch.int16).view(-1)[7] ^= 1
        return state

    monkeypatch.setattr(quire.AttentionPlan, "run", wrong)
    [row] = check_invariance(Host(), Setting("cpu", "cpu", quick=True), heads="2/1x128", title="a")
    assert row["status"] == "wrong"
    assert named in row["note"]


def test_the_reference_is_not_asked_for_batch_invariance():
    [row] = check_invariance(Host(), SETTING, title="a")
    assert row["status"] == "unavailable"


def test_nan_is_never_good():
    out = torch.tensor([math.nan])
    assert not judge(out, torch.zeros(1), torch.zeros(1), 1.0).good


@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8_e4m3"])
def test_a_timed_case_is_judged_by_a_sample_that_sees_mistakes(kv_dtype):
    case = parse_case("3x70:1+2x50:40", parse_spec("4/2x16", 16, "float32", kv_dtype))
    layers = make_layers(case, CPU, seed=5, num_layers=2)
    plan = quire.plan(*layers.lengths[:2], case.spec, layers.cu_seqlens_q, backend="reference")
    out = plan.run(layers.q, *layers.pool.layer(1), **layers.scales(1))
    assert layers.judge(1, out).good
    assert not layers.judge(0, out).good, "another layer's keys"
    out[-1] *= 1.001
    assert not layers.judge(1, out).good


def test_layers_outgrow_the_cache_by_far_and_are_at_least_two():
    case = parse_case("8x1k:1", parse_spec("32/8x128", 16, "bfloat16", None))
    cache = 50 << 20
    assert layers_beyond_cache(case, cache) * case.kv_bytes > 10 * cache
    assert layers_beyond_cache(parse_case("8x32k:1", case.spec), cache) == 2
