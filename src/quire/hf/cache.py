"""The pages of a whole model: what each layer needs, which layers share a page table, and their pools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from quire.errors import ArgumentError, UnsupportedError
from quire.pages import HostPool, KVPool, PrefixCache, Swap, SwapCosts, host_page_bytes
from quire.spec import AttentionSpec, KVDtype, Visibility

# Layers of one kind share a step's plan: shape, what queries see, and the group whose page table they look through.
Kind: TypeAlias = tuple[AttentionSpec, Visibility, int]

TABLE_PRICE = 0.02  # memory that one more page table, which every step fills and plans, must save at least


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
    """One layer's pages, how its queries look at them, and which page table they look through."""

    group: int
    spec: AttentionSpec
    value_dim: int
    visibility: Visibility
    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None

    @property
    def kind(self) -> Kind:
        """What a plan of its is made for."""
        return self.spec, self.visibility, self.group


class Group(NamedTuple):
    """Layers that share a page table: their numbers, and which tokens any of them sees."""

    visibility: Visibility
    layers: tuple[int, ...]


class PageLayout:
    """Which layers share a page table, and what a page is.

    Layers with the same spec and visibility are of one kind. Where all layers have one spec but some see fewer tokens
    than others, each kind is cut into groups of equally many layers, and each group has a page table: a page then is
    the memory of one group's layers, whichever group needs it. Its last group may have fewer layers than a page has
    room for. Else one page table serves all layers, and a page is the memory of all of them.

    Args:
        shapes: layer_idx → what that layer needs.
        page_size: tokens per page.
        kv_dtype: None, or the dtype of quantised pages.
    Attributes:
        groups: those that see all tokens first.
        layers_of_spec: how many layers of each spec a page has room for.
        bytes_per_page: bytes of one page.
    Raises:
        UnsupportedError: a chunk that is no whole number of pages.
    """

    def __init__(self, shapes: Mapping[int, LayerShape], *, page_size: int, kv_dtype: KVDtype | None) -> None:
        self.page_size = page_size
        self.specs = {layer_idx: shape.spec(page_size, kv_dtype) for layer_idx, shape in shapes.items()}
        kinds: dict[Visibility, list[int]] = {}
        for layer_idx in sorted(shapes):
            visibility = shapes[layer_idx].visibility
            _check_chunk(visibility.chunk_size, page_size)
            kinds.setdefault(visibility, []).append(layer_idx)
        layers_of_spec = Counter(self.specs[layer_idx] for layer_idx in sorted(shapes))
        if len(kinds) == 1 or len(layers_of_spec) > 1:
            visibility = next(iter(kinds)) if len(kinds) == 1 else Visibility()
            self.groups: tuple[Group, ...] = (Group(visibility, tuple(sorted(shapes))),)
        else:
            size = _group_size([len(layers) for layers in kinds.values()])
            self.groups = tuple(
                Group(visibility, tuple(layers[first : first + size]))
                for visibility, layers in sorted(kinds.items(), key=lambda kind: not kind[0].sees_all)
                for first in range(0, len(layers), size)
            )
            layers_of_spec = Counter(dict.fromkeys(layers_of_spec, size))
        self.layers_of_spec = dict(layers_of_spec)
        self.bytes_per_page = sum(
            spec.bytes_per_page * num_layers for spec, num_layers in layers_of_spec.items()
        )


def _group_size(counts: Sequence[int]) -> int:
    """How many layers a page has room for, where there are kinds of so many layers.

    The last group of a kind wastes what it does not fill, and each group is one more page table.
    """

    def price(size: int) -> float:
        groups = [-(-count // size) for count in counts]
        filled = sum(number * size / count for number, count in zip(groups, counts, strict=True))
        return filled + TABLE_PRICE * sum(groups)

    return min(range(1, max(counts) + 1), key=price)


class PagedCache:
    """The tensors of a layout: one KVPool per spec, all with the same num_pages: a page id means the same page in each.

    The i-th layer of each group has the i-th tensors of its spec.

    Args:
        shapes: layer_idx → what that layer needs.
        layout: which of them share page tables.
        num_pages: pages of every pool.
        device: where the pages live.
    """

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        layout: PageLayout,
        *,
        num_pages: int,
        device: torch.device,
    ) -> None:
        self.num_pages, self.num_groups = num_pages, len(layout.groups)
        pools = {
            spec: KVPool(spec, num_layers=num_layers, num_pages=num_pages, device=device)
            for spec, num_layers in layout.layers_of_spec.items()
        }
        self.pools = list(pools.values())
        self.layers: dict[int, LayerPages] = {}
        for group, (_, layers) in enumerate(layout.groups):
            used: Counter[AttentionSpec] = Counter()
            for layer_idx in layers:
                spec = layout.specs[layer_idx]
                pool, i = pools[spec], used[spec]
                used[spec] += 1
                self.layers[layer_idx] = LayerPages(
                    group,
                    spec,
                    shapes[layer_idx].value_dim,
                    shapes[layer_idx].visibility,
                    *pool.layer(i),
                    None if pool.k_scale is None else pool.k_scale[i],
                    None if pool.v_scale is None else pool.v_scale[i],
                )

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copy whole pages, in every layer of their group (copy-on-write); (source, destination) pairs, in order."""
        copies = list(copies)
        for pool in self.pools:
            pool.copy_pages(copies)

    def poison(self, pages: Iterable[int]) -> None:
        """Fill pages with NaN, in every layer of their group."""
        pages = list(pages)
        for pool in self.pools:
            pool.poison(pages)


def make_swap(cache: PrefixCache, pools: Sequence[KVPool], swap_bytes: int) -> Swap:
    """Host memory for copies of the pages of some pools, as many as fit, and how fast they come back.

    Raises:
        ArgumentError: not even one fits, or the system has less memory.
    Cost: copies of 16 MiB, to measure them.
    """
    page_bytes = host_page_bytes(pools)
    if swap_bytes < page_bytes:
        raise ArgumentError(
            f"swap_bytes must be 0, or hold at least one page of {page_bytes} bytes; got {swap_bytes}. "
            f"Fix: swap_bytes={page_bytes} or more"
        )
    store = HostPool(pools, swap_bytes // page_bytes)
    return Swap(cache, store, SwapCosts(store.measure()))


def pages_within(memory_bytes: int, page_bytes: int) -> int:
    """How many pages of page_bytes fit.

    Raises:
        ArgumentError: not even one.
    """
    num_pages = memory_bytes // page_bytes
    if num_pages < 1:
        raise ArgumentError(
            f"memory_bytes must hold at least one page of {page_bytes} bytes; got "
            f"{memory_bytes}. Fix: memory_bytes={page_bytes} or more, or a smaller page_size"
        )
    return num_pages


def _check_chunk(chunk_size: int, page_size: int) -> None:
    if chunk_size % page_size:
        divisor = max(size for size in range(1, page_size) if chunk_size % size == 0)
        raise UnsupportedError(
            f"page_size must divide the model's attention_chunk_size, {chunk_size}, so that each chunk "
            f"begins with a page; got {page_size}. Fix: page_size={divisor}"
        )
