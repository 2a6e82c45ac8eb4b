"""The same attention by PyTorch's own means: on contiguous keys and values, on gathered ones, and by FlexAttention.

A peer is made from a case's layers and gives one call per layer. What a peer needs beforehand (contiguous copies,
block masks, compilation) happens outside the timed call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import parse_case
from benchmarks.gpu.device import Device, measure
from benchmarks.gpu.jobs import Row, Setting
from benchmarks.gpu.layers import Layers, layers_beyond_cache, make_layers
from benchmarks.gpu.speed import describe, parse_spec, time_quire, work

PeerCall = Callable[[], torch.Tensor]  # gives [batch, num_qo_heads, q_len, head_dim]
FLEX_PAGE = 128  # FlexAttention's blocks, which its pages must be


def time_peer(
    device: Device,
    setting: Setting,
    *,
    case: str,
    who: list[str],
    heads: str = "32/8x128",
    page_size: int = 16,
    label: str | None = None,
) -> list[Row]:
    """Several peers, and Quire, on the same tensors of one case."""
    parsed = parse_case(case, parse_spec(heads, page_size, "bfloat16", None))
    num_layers = layers_beyond_cache(parsed, device.cache_bytes)
    layers = make_layers(parsed, device.where, setting.seed, num_layers)
    head = describe(parsed, label)
    rows = [head | time_quire(device, setting, layers)]
    for name in who:
        try:
            rows.append(head | _time_one(device, name, layers))
        except Exception as error:
            note = f"{type(error).__name__}: {str(error)[:300]}"
            rows.append(head | {"who": name, "status": "unavailable", "note": note})
        if not device.alive():
            break
    return rows


def _time_one(device: Device, name: str, layers: Layers) -> Row:
    calls = PEERS[name](layers)
    out = calls[-1]().transpose(1, 2).flatten(0, 1)
    verdict = layers.judge(len(calls) - 1, out)
    row: Row = {"who": name, **work(layers.case), **verdict.columns()}
    if (
        not verdict.error <= 4 * verdict.allowed
    ):  # a peer may round as it likes, but not compute something else
        return row | {"status": "wrong", "note": "differs from the float64 reference; not timed"}
    return row | {"status": "ok"} | measure(device, calls)


def _queries(layers: Layers) -> tuple[torch.Tensor, int, int]:
    """Queries as [batch, num_qo_heads, q_len, head_dim], and the lengths all sequences share."""
    case = layers.case
    lengths = {*zip(case.seq_lens, case.q_lens, strict=True)}
    if len(lengths) > 1:
        raise ValueError("this peer takes sequences of one length only")
    [(seq_len, q_len)] = lengths
    return layers.q.unflatten(0, (-1, q_len)).transpose(1, 2), seq_len, q_len


def _mask(seq_len: int, q_len: int) -> dict[str, Any]:
    if q_len == 1:
        return {}
    if q_len == seq_len:
        return {"is_causal": True}
    from torch.nn.attention.bias import causal_lower_right

    return {"attn_mask": causal_lower_right(q_len, seq_len)}


def _contiguous(layers: Layers, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, num_kv_heads, seq_len, head_dim] each."""
    pairs = [
        layers.keys_values(layer, row, layers.case.spec.dtype) for row in range(len(layers.case.seq_lens))
    ]
    return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


def sdpa(backend: SDPBackend | None, layers: Layers) -> list[PeerCall]:
    """scaled_dot_product_attention on keys and values that already lie contiguous.

    With ``enable_gqa``, or with the KV heads repeated beforehand where the backend does not know groups.
    """
    q, seq_len, q_len = _queries(layers)
    group = layers.case.spec.group_size

    def attend(k: torch.Tensor, v: torch.Tensor, grouped: bool) -> torch.Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **_mask(seq_len, q_len))

    pairs = [_contiguous(layers, i) for i in range(layers.pool.num_layers)]
    try:
        attend(*pairs[0], grouped=group > 1)
        return [partial(attend, k, v, grouped=group > 1) for k, v in pairs]
    except RuntimeError:
        print(f"{backend}: no groups; KV heads are repeated beforehand")
        repeated = ((k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) for k, v in pairs[:2])
        return [partial(attend, k, v, grouped=False) for k, v in repeated]


def gather_sdpa(layers: Layers) -> list[PeerCall]:
    """Gathered from pages at every call, then scaled_dot_product_attention."""
    q, seq_len, q_len = _queries(layers)
    pages = layers.page_table[:, : -(-seq_len // layers.case.spec.page_size)].long().to(q.device)

    def attend(layer: int) -> torch.Tensor:
        k, v = (
            x[:, pages].flatten(2, 3)[:, :, :seq_len].transpose(0, 1).contiguous()
            for x in layers.pool.layer(layer)
        )
        return scaled_dot_product_attention(q, k, v, enable_gqa=True, **_mask(seq_len, q_len))

    return [partial(attend, i) for i in range(layers.pool.num_layers)]


def flex(layers: Layers) -> list[PeerCall]:
    """FlexAttention with a block mask that maps logical blocks to pages, compiled where there is a GPU."""
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, seq_len, q_len = _queries(layers)
    spec, table, where = layers.case.spec, layers.page_table, q.device
    if spec.page_size != FLEX_PAGE:
        raise ValueError(f"FlexAttention reads pages of {FLEX_PAGE} tokens here")
    batch = len(table)
    paged = PagedAttention(layers.pool.num_pages, FLEX_PAGE, batch, device=str(where))
    for row in range(batch):
        own = table[row, : -(-seq_len // FLEX_PAGE)].long().to(where)
        paged.page_table[row, : len(own)] = own
        paged.physical_to_logical[row, own] = torch.arange(len(own), device=where)
    offset = seq_len - q_len

    def causal(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        return q_index + offset >= kv_index

    logical = create_block_mask(
        causal, batch, None, q_len, seq_len, device=str(where), BLOCK_SIZE=(FLEX_PAGE, FLEX_PAGE)
    )
    kv_len = torch.full((batch,), seq_len, device=where)
    mask = paged.convert_logical_block_mask(logical, kv_len=kv_len)
    run = torch.compile(flex_attention, dynamic=False) if where.type == "cuda" else flex_attention
    q = q.contiguous()

    def attend(layer: int) -> torch.Tensor:
        k, v = (x.flatten(1, 2)[None] for x in layers.pool.layer(layer))
        out: torch.Tensor = run(q, k, v, block_mask=mask, enable_gqa=True)
        return out

    return [partial(attend, i) for i in range(layers.pool.num_layers)]


PEERS: dict[str, Callable[[Layers], list[PeerCall]]] = {
    "sdpa flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa": partial(sdpa, None),
    "gather + sdpa": gather_sdpa,
    "flex": flex,
}
