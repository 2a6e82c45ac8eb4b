"""vLLM's KV cache as Quire's pages: views, never copies.

vLLM hands each layer a tensor [pages, num_kv_heads, page_size, content]. A token's row of content is its key, then its
value. Where vLLM quantises per token and head, the row's two scales follow:

    key [head_dim] | value [head_dim] | scale of the key, scale of the value (float32 each, quantised rows only)

All of a page's bytes stay inside it, so that whatever copies pages of vLLM's copies these.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quire.spec import QUANTIZED_DTYPES, KVDtype

SCALE_BYTES = 2 * torch.float32.itemsize  # of a row's key and value


class CacheFormat(NamedTuple):
    """What a ``kv_cache_dtype`` of vLLM's means."""

    kv_dtype: KVDtype | None  # as in AttentionSpec
    stores_scales: bool  # in each row; else the layer has them, where there are any


# Every kv_cache_dtype that Quire serves. "auto" is the model's dtype.
FORMATS = {
    "auto": CacheFormat(None, False),
    "float16": CacheFormat(None, False),
    "bfloat16": CacheFormat(None, False),
    "int8_per_token_head": CacheFormat("int8", True),
    "fp8_per_token_head": CacheFormat("fp8_e4m3", True),
    "fp8": CacheFormat("fp8_e4m3", False),
    "fp8_e4m3": CacheFormat("fp8_e4m3", False),
    "fp8_e5m2": CacheFormat("fp8_e5m2", False),
}
SERVED_BY_NAME = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # must be the model's


def row_bytes(head_dim: int) -> int:
    """Bytes of a row with its scales."""
    return 2 * head_dim + SCALE_BYTES


class LayerPages(NamedTuple):
    """One layer's cache in the shapes of ``plan.run``; the scales where the rows hold them."""

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


def pages_of(kv_cache: torch.Tensor, head_dim: int, form: CacheFormat) -> LayerPages:
    """A layer's cache [pages, num_kv_heads, page_size, content], of any strides, as pages and scales."""
    rows = kv_cache.transpose(0, 1)
    if form.kv_dtype is None:
        return LayerPages(rows[..., :head_dim], rows[..., head_dim:], None, None)
    rows = rows.view(torch.uint8)
    values = rows[..., : 2 * head_dim].view(QUANTIZED_DTYPES[form.kv_dtype])
    k_pages, v_pages = values[..., :head_dim], values[..., head_dim:]
    if not form.stores_scales:
        return LayerPages(k_pages, v_pages, None, None)
    scales = rows[..., 2 * head_dim :].view(torch.float32)
    return LayerPages(k_pages, v_pages, scales[..., 0], scales[..., 1])
