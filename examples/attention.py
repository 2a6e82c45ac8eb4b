"""The operator alone: attention over scattered pages equals attention over contiguous memory.

python examples/attention.py
"""

import torch

import quire

torch.manual_seed(0)
spec = quire.AttentionSpec(num_qo_heads=8, num_kv_heads=2, head_dim=64, page_size=16, dtype=torch.float32)
pool = quire.KVPool(spec, num_layers=1, num_pages=32)
table = quire.PageTable(quire.PageAllocator(32), spec.page_size)
k_pages, v_pages = pool.layer(0)

# Two sequences grow in turns, so that their pages interleave.
contiguous = {"a": [], "b": []}
for name, tokens in (("a", 20), ("b", 9), ("a", 30), ("b", 40), ("a", 1), ("b", 1)):
    if name not in table.seq_ids:
        table.add(name)
    slot_mapping = torch.from_numpy(table.append(name, tokens).slot_mapping)
    k, v = torch.randn(2, tokens, spec.num_kv_heads, spec.head_dim)
    quire.write_kv(k, v, k_pages, v_pages, slot_mapping)
    contiguous[name].append((k, v))

# One query per sequence: the token written last looks back at all tokens of its own sequence.
q = torch.randn(2, spec.num_qo_heads, spec.head_dim)
out = quire.paged_attention(q, k_pages, v_pages, table.dense("ab"), table.seq_lens("ab"))

for i, name in enumerate("ab"):
    k, v = (torch.cat(parts).transpose(0, 1) for parts in zip(*contiguous[name], strict=True))
    expected = torch.nn.functional.scaled_dot_product_attention(q[i, :, None], k, v, enable_gqa=True)[:, 0]
    torch.testing.assert_close(out[i], expected)
    print(f"{name}: {table.length(name)} tokens on pages {table.pages(name)}, equal to contiguous attention")
