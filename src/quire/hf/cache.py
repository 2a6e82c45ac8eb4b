"""The pages of a whole model: what each layer needs, and one pool per shape of layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from quire.errors import ArgumentError, UnsupportedError
from quire.pages import KVPool
from quire.spec import AttentionSpec, KVDtype


@dataclass(frozen=True)
class Visibility:
    """Which earlier keys a layer's queries see: all, those of a window, or those of their own chunk.

    window_left: keys further back than this many positions are out of sight; −1 for no window.
    chunk_size: tokens per chunk; 0 for no chunks.
    """

    window_left: int = -1
    chunk_size: int = 0

    def __str__(self) -> str:
        if self.chunk_size:
            return f"chunks of {self.chunk_size}"
        return f"a window of {self.window_left + 1}" if self.window_left >= 0 else "all earlier tokens"


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer of a model asks for, as learned from the model's own calls."""

    num_qo_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    visibility: Visibility

    def spec(self, page_size: int, kv_dtype: KVDtype | None) -> AttentionSpec:
        """Pages hold keys and values of one width: the narrower of the two is padded with zeros."""
        head_dim = max(self.key_dim, self.value_dim)
        return AttentionSpec(self.num_qo_heads, self.num_kv_heads, head_dim, page_size, self.dtype, kv_dtype)


@dataclass(frozen=True, eq=False)
class LayerPages:
    """One layer's pages, and how its queries look at them."""

    spec: AttentionSpec
    value_dim: int
    visibility: Visibility
    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


class PagedCache:
    """One KVPool per shape of layer, all with the same num_pages: a page id means the same page in each.

    Args:
        shapes: layer_idx → what that layer needs.
        page_size: tokens per page.
        num_pages: pages of every pool.
        kv_dtype: None, or the dtype of quantised pages.
        device: where the pages live.
    Raises:
        UnsupportedError: a chunk that is no whole number of pages.
    """

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        *,
        page_size: int,
        num_pages: int,
        kv_dtype: KVDtype | None,
        device: torch.device,
    ) -> None:
        for shape in shapes.values():
            _check_chunk(shape.visibility.chunk_size, page_size)
        self.page_size = page_size
        self.num_pages = num_pages
        self.pools = []
        self.layers: dict[int, LayerPages] = {}
        for spec, layer_ids in _group_by_spec(shapes, page_size, kv_dtype).items():
            pool = KVPool(spec, num_layers=len(layer_ids), num_pages=num_pages, device=device)
            self.pools.append(pool)
            for i, layer_idx in enumerate(layer_ids):
                self.layers[layer_idx] = LayerPages(
                    spec,
                    shapes[layer_idx].value_dim,
                    shapes[layer_idx].visibility,
                    *pool.layer(i),
                    None if pool.k_scale is None else pool.k_scale[i],
                    None if pool.v_scale is None else pool.v_scale[i],
                )

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copy whole pages in every layer (copy-on-write); (source, destination) pairs, in order."""
        copies = list(copies)
        for pool in self.pools:
            pool.copy_pages(copies)

    def poison(self, pages: Iterable[int]) -> None:
        """Fill pages with NaN in every layer."""
        pages = list(pages)
        for pool in self.pools:
            pool.poison(pages)


def bytes_per_page(shapes: Mapping[int, LayerShape], page_size: int, kv_dtype: KVDtype | None) -> int:
    """Bytes one page id takes in all layers together."""
    return sum(shape.spec(page_size, kv_dtype).bytes_per_page for shape in shapes.values())


def pages_within(memory_bytes: int, page_bytes: int) -> int:
    """How many pages of page_bytes fit.

    Raises:
        ArgumentError: not even one.
    """
    num_pages = memory_bytes // page_bytes
    if num_pages < 1:
        raise ArgumentError(
            f"memory_bytes must hold at least one page of all layers, {page_bytes} bytes; got "
            f"{memory_bytes}. Fix: memory_bytes={page_bytes} or more, or a smaller page_size"
        )
    return num_pages


def _group_by_spec(
    shapes: Mapping[int, LayerShape], page_size: int, kv_dtype: KVDtype | None
) -> dict[AttentionSpec, list[int]]:
    groups: dict[AttentionSpec, list[int]] = defaultdict(list)
    for layer_idx in sorted(shapes):
        groups[shapes[layer_idx].spec(page_size, kv_dtype)].append(layer_idx)
    return dict(groups)


def _check_chunk(chunk_size: int, page_size: int) -> None:
    if chunk_size % page_size:
        divisor = max(size for size in range(1, page_size) if chunk_size % size == 0)
        raise UnsupportedError(
            f"page_size must divide the model's attention_chunk_size, {chunk_size}, so that each chunk "
            f"begins with a page; got {page_size}. Fix: page_size={divisor}"
        )
