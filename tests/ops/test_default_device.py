"""Torch's default device is the caller's: Quire puts each tensor of its own where the call's tensors are."""

from __future__ import annotations

import textwrap

import pytest
from processes import run_python

EVERY_DOOR = """
    import json
    import torch
    import quire

    def every_door():
        spec = quire.AttentionSpec(2, 1, 16, 4, torch.float32, kv_dtype=KV_DTYPE)
        pool = quire.KVPool(spec, 1, 8)
        table = quire.PageTable(quire.PageAllocator(8), 4)
        for i in range(2):
            table.add(i)
        slots = [torch.from_numpy(table.append(i, n).slot_mapping) for i, n in enumerate((5, 9))]
        results = []
        pages, scales = pool.layer(0), {}
        if KV_DTYPE:
            scales = {"k_scale": pool.k_scale[0], "v_scale": pool.v_scale[0]}
        rows = [torch.linspace(-1, 1, 14 * 16, device="cpu").view(14, 1, 16) + i for i in range(2)]
        q = torch.linspace(-2, 3, 2 * 32, device="cpu").view(2, 2, 16)
        new = torch.linspace(-2, 3, 14 * 32, device="cpu").view(14, 2, 16)
        lengths, starts = table.seq_lens([0, 1]), torch.tensor([0, 5, 14], dtype=torch.int32, device="cpu")
        for backend in ("cpu", "reference"):
            quire.write_kv(*rows, *pages, torch.cat(slots), backend=backend, **scales)
            for queries, step in ((q, ()), (new, (starts,))):
                arguments = table.dense([0, 1]), lengths
                rules = {"backend": backend, "return_state": True}
                a = quire.paged_attention(queries, *pages, *arguments, *step, **rules, **scales)
                for b in (
                    quire.plan(*arguments, spec, *step, backend=backend),
                    quire.Planner(
                        spec, max_batch=2, max_seq_len=16, max_q_len=9, backend=backend, device="cpu"
                    ).plan(*arguments, *step),
                ):
                    b = b.run(queries, *pages, return_state=True, **scales)
                    results += [*a, *b, *quire.merge(a, b)]
        if not KV_DTYPE:
            cache = [part.permute(1, 2, 0, 3).contiguous() for part in pages]
            for told in (lengths, 3):
                results.append(
                    quire.flash_attn_with_kvcache(
                        q[:, None], *cache, cache_seqlens=told, block_table=table.dense([0, 1])
                    )
                )
            one = [torch.ones(2, 1, 1, 16, device="cpu") * i for i in (1, 2)]
            cache = [part[[0, 2]] for part in cache]  # two full pages
            results.append(quire.flash_attn_with_kvcache(q[:, None], *cache, *one, cache_seqlens=2))
        return results

    expected = every_door()
    with torch.device("meta"):
        results = every_door()
    print(json.dumps([bool(torch.equal(a, b)) for a, b in zip(results, expected, strict=True)]))
"""


@pytest.mark.parametrize("kv_dtype", [None, pytest.param("fp8_e4m3", marks=pytest.mark.exhaustive)])
def test_every_door_computes_in_host_memory_under_any_default_device(kv_dtype):
    results = run_python(f"KV_DTYPE = {kv_dtype!r}\n" + textwrap.dedent(EVERY_DOOR), QUIRE_DEBUG="1")

    assert len(results) >= 24
    assert all(results)
