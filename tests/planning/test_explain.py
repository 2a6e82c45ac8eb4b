"""A plan in words says what the plan's own arrays say."""

from __future__ import annotations

import torch

import quire


def test_bytes_splits_and_balance_are_those_of_the_work_list():
    spec = quire.AttentionSpec(8, 2, 64, page_size=16, dtype=torch.bfloat16)
    page_table = torch.zeros(2, 64, dtype=torch.int32)
    plan = quire.plan(page_table, torch.tensor([1000, 40], dtype=torch.int32), spec)

    text = plan.explain()

    kv_bytes = (1000 + 40) * 2 * 2 * 64 * 2
    assert f"reads {kv_bytes / 1e6:.1f} MB" in text
    assert f"{len(plan.step.decode.items)} items" in text
    assert f"{len(plan.step.decode.merges)} tiles split" in text
    assert 'backend "cpu": 2 sequences, 2 query tokens, 1040 KV tokens in 66 pages of 16' in text
    assert "prefill: nothing to do" in text


def test_a_window_and_full_attention_are_named():
    spec = quire.AttentionSpec(8, 2, 64, page_size=16, dtype=torch.float32, kv_dtype="int8")
    starts = torch.tensor([0, 10], dtype=torch.int32)
    plan = quire.plan(
        torch.zeros(1, 64, dtype=torch.int32),
        torch.tensor([1000], dtype=torch.int32),
        spec,
        starts,
        window_left=100,
        causal=False,
    )
    assert "full attention within 100 tokens back" in plan.explain()
    assert "pages in int8" in plan.explain()
    read = plan.step.prefill.kv_tokens_per_worker().sum() * (2 * 64 + 8)
    assert f"reads {read / 1e6:.1f} MB" in plan.explain()


def test_an_empty_step_explains_itself_too():
    spec = quire.AttentionSpec(8, 2, 64)
    empty = quire.plan(torch.zeros(0, 0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), spec)
    assert "decode: nothing to do" in empty.explain()
    one_empty = quire.plan(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), spec)
    assert "no keys" in one_empty.explain()


def test_a_batch_invariant_plan_says_where_it_is_cut():
    spec = quire.AttentionSpec(8, 2, 64)
    lens = torch.tensor([5000], dtype=torch.int32)
    plan = quire.plan(torch.zeros(1, 400, dtype=torch.int32), lens, spec, batch_invariant=True)
    assert "batch-invariant: one kernel for all rows, tiles cut at every 2048 keys" in plan.explain()
    assert "decode: nothing to do" in plan.explain()
    assert "2 tiles split into 6 parts" in plan.explain()
