"""Sequences that share a beginning share its pages, until one writes into a shared page.

python examples/fork.py
"""

import torch

import quire

PAGE_SIZE = 4
allocator = quire.PageAllocator(16)
table = quire.PageTable(allocator, PAGE_SIZE)
spec = quire.AttentionSpec(
    num_qo_heads=2, num_kv_heads=1, head_dim=16, page_size=PAGE_SIZE, dtype=torch.float32
)
pool = quire.KVPool(spec, num_layers=1, num_pages=16)


def append(name, num_tokens):
    """Extend a sequence; copy the page it shares, if it writes into one."""
    slot_mapping, copies = table.append(name, num_tokens)
    pool.copy_pages(copies)
    k, v = torch.randn(2, num_tokens, spec.num_kv_heads, spec.head_dim)
    quire.write_kv(k, v, *pool.layer(0), torch.from_numpy(slot_mapping))
    return copies


def show(what):
    used = f"{allocator.num_owned} pages in use"
    print(f"{what:34} parent {table.pages('parent')}  child {table.pages('child')}  {used}")


table.add("parent")
append("parent", 10)  # two full pages and a half
table.fork("parent", "child")
show("forked: all pages shared")

copies = append("child", 1)
show(f"child writes: page {copies[0][0]} copied to {copies[0][1]}")

append("parent", 1)  # the old half page has one owner again: written in place
show("parent writes: nothing to copy")

# Ten tokens are the same for both: attention over them gives the same answer from either page table.
q = torch.randn(1, spec.num_qo_heads, spec.head_dim).expand(2, -1, -1)
names = ["parent", "child"]
out = quire.paged_attention(q, *pool.layer(0), table.dense(names), torch.full((2,), 10, dtype=torch.int32))
torch.testing.assert_close(out[0], out[1], rtol=0, atol=0)
print("both read the same ten tokens, bit for bit")
