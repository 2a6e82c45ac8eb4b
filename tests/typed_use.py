"""What users' type checkers see of the public API. `make check` reads this file; nothing runs it."""

from __future__ import annotations

import torch
from typing_extensions import assert_type

import quire


def operators(
    q: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, lens: torch.Tensor, asked: bool
) -> None:
    assert_type(quire.paged_attention(q, pages, pages, table, lens), torch.Tensor)
    assert_type(quire.paged_attention(q, pages, pages, table, lens, return_state=True), quire.SoftmaxState)
    either = quire.paged_attention(q, pages, pages, table, lens, return_state=asked)
    assert_type(either, torch.Tensor | quire.SoftmaxState)
    spec = quire.AttentionSpec(num_qo_heads=8, num_kv_heads=2, head_dim=64, page_size=16, dtype=q.dtype)
    plan = quire.plan(table, lens, spec)
    assert_type(plan, quire.AttentionPlan)
    assert_type(plan.run(q, pages, pages, out=q), torch.Tensor)
    state = plan.run(q, pages, pages, return_state=True)
    assert_type(quire.merge(state, state).lse, torch.Tensor)


def engine(llm: quire.LLM) -> None:
    [output] = llm.generate("text", quire.SamplingParams(max_tokens=1))
    assert_type(output, quire.RequestOutput)
    assert_type(output.text, str)
    assert_type(output.token_ids, list[int])
    for delta in llm.stream("text"):
        assert_type(delta.text, str)
