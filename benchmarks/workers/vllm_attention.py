"""vLLM's CPU attention kernel, alone, in its own environment. Run by benchmarks/foreign.py."""

from __future__ import annotations

import time
from typing import Any

from wire import Answer, serve


def load(request: dict[str, Any]) -> tuple[Answer, Any]:
    """A case from a file of tensors, in pages of the kernel's own layout; its output goes to another file."""
    import safetensors.torch
    import torch
    import vllm
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    torch.set_num_threads(request["threads"])
    torch.cpu._init_amx()  # tile registers must be asked for: in an engine, the model's first product has done so
    case = safetensors.torch.load_file(request["case"])
    q, k, v, seq_lens = (case[name] for name in ("q", "k", "v", "seq_lens"))
    page_size, (kv_heads, head_dim) = request["page_size"], k.shape[1:]
    counts = [-(-n // page_size) for n in seq_lens.tolist()]
    shuffled = torch.randperm(sum(counts), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    slots = []
    for row, (seq_len, own) in enumerate(zip(seq_lens.tolist(), shuffled.split(counts), strict=True)):
        table[row, : len(own)] = own
        token = torch.arange(seq_len)
        slots.append(own[token // page_size].long() * page_size + token % page_size)

    isa = _get_attn_isa(q.dtype, page_size, head_dim)
    caches = torch.zeros(sum(counts), kv_heads, 2 * page_size, head_dim, dtype=q.dtype).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(k, v, *caches, torch.cat(slots), isa)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(counts), num_heads=q.shape[1], num_kv_heads=kv_heads, head_dim=head_dim, seq_lens=seq_lens,
        dtype=q.dtype, query_start_loc=case["cu_seqlens_q"], causal=True, sliding_window_size=-1, isa=isa,
        enable_kv_split=True,
    )  # fmt: skip
    out = torch.empty_like(q)

    def attend() -> None:
        ops.cpu_attention_with_kv_cache(
            query=q, key_cache=caches[0], value_cache=caches[1], output=out,
            query_start_loc=case["cu_seqlens_q"], seq_lens=seq_lens, scale=head_dim**-0.5, causal=True,
            alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0.0, scheduler_metadata=metadata,
            s_aux=None,
        )  # fmt: skip

    def turn() -> Answer:
        attend()  # untimed, as for every peer: data in cache, threads awake
        begin = time.perf_counter()
        attend()
        return {"seconds": time.perf_counter() - begin}

    attend()
    safetensors.torch.save_file({"out": out}, request["out"])
    return {"versions": f"vllm {vllm.__version__} ({isa}), torch {torch.__version__}"}, turn


if __name__ == "__main__":
    serve(load)
