"""Decode step after step with one CUDA graph: captured once, replayed on every later plan.

A ``quire.Planner`` puts each step's plan into the same memory, so what was captured computes whatever was planned
last. Without a GPU the same steps run without a graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import quire

STEPS, PROMPTS = 5, {"a": 100, "b": 7, "c": 33}
GPU = torch.cuda.is_available()


def main() -> None:
    """Grow three sequences token by token; compare every step with the float64 reference."""
    device = torch.device("cuda" if GPU else "cpu")
    spec = quire.AttentionSpec(num_qo_heads=8, num_kv_heads=2, head_dim=64, page_size=16, dtype=torch.float16)
    pool = quire.KVPool(spec, num_layers=1, num_pages=64, device=device)
    table = quire.PageTable(quire.PageAllocator(64), spec.page_size)
    batch = list(PROMPTS)

    def append(name: str, tokens: int) -> None:
        slots = torch.from_numpy(table.append(name, tokens).slot_mapping).to(device)
        k, v = torch.randn(2, tokens, spec.num_kv_heads, spec.head_dim, device=device).half()
        quire.write_kv(k, v, *pool.layer(0), slots)

    for name, tokens in PROMPTS.items():
        table.add(name)
        append(name, tokens)

    planner = quire.Planner(spec, max_batch=len(batch), max_seq_len=256, device=device)
    q = torch.empty(len(batch), spec.num_qo_heads, spec.head_dim, dtype=spec.dtype, device=device)
    out = torch.empty_like(q)

    replay: Callable[[], object] | None = None
    for step in range(STEPS):
        for name in batch:
            append(name, 1)
        q.normal_()
        plan = planner.plan(table.dense(batch), table.seq_lens(batch))
        if replay is None:
            replay = captured(plan, q, pool, out)
        if GPU:
            replay()
        else:
            plan.run(q, *pool.layer(0), out=out)
        wanted = quire.paged_attention(
            q, *pool.layer(0), table.dense(batch), table.seq_lens(batch), backend="reference"
        )
        torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)
        print(
            f"step {step}: {table.seq_lens(batch).tolist()} keys, off by {(out - wanted).abs().max().item():.0e}"
        )


def captured(
    plan: quire.AttentionPlan, q: torch.Tensor, pool: quire.KVPool, out: torch.Tensor
) -> Callable[[], object] | None:
    """A graph of one decode step; a model's other work would be captured with it."""
    plan.run(q, *pool.layer(0), out=out)  # compiled before, as nothing may be compiled during capture
    if not GPU:
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(q, *pool.layer(0), out=out)
    return graph.replay


if __name__ == "__main__":
    main()
