"""The tensors that hold the pages."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quire.debug import debug_enabled
from quire.errors import ArgumentError, OutOfPages
from quire.pages.huge_pages import back_with_huge_pages
from quire.spec import AttentionSpec, check_bytes, check_size, existing_device

_BIT_PATTERN = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes per element


class KVPool:
    """K and V pages of all layers, and their scales where they are quantised.

    Every page of every head starts on a 64-byte line: pages lie `spec.page_stride` elements apart,
    so `k` and `v` are views that skip the padding after each page.

    Memory is not cleared: kernels never let an unused slot reach their output, so clearing would
    only cost time and touch every page, also those never used. With QUIRE_DEBUG=1 in the
    environment all of it starts as NaN instead, so that a read of an unwritten slot shows.

    Args:
        spec: heads, sizes and dtypes of a layer.
        num_layers: attention layers with a cache of this spec.
        num_pages: pages per layer and head; page id p names page p of each of them.
        device: where the pages live.
    Attributes:
        k, v: [num_layers, num_kv_heads, num_pages, page_size, head_dim], spec.storage_dtype; v ends in
            spec.out_dim.
        k_scale, v_scale: fp32 [num_layers, num_kv_heads, num_pages, page_size], or None.
        debug: whether QUIRE_DEBUG=1 was set; if so, the caller must `poison` pages whose content is dropped.
    Raises:
        ArgumentError: a size below one.
        DeviceError: this torch or machine has no such device.
        OutOfPages: more than the device's memory holds.
    Cost: num_layers × num_pages × spec.bytes_per_page bytes; on a CPU the system provides them as
        they are first touched.
    Source: the KV cache of PagedAttention, arXiv:2309.06180 §4.1.
    """

    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def __init__(
        self, spec: AttentionSpec, num_layers: int, num_pages: int, device: torch.device | str = "cpu"
    ) -> None:
        check_size("num_layers", num_layers)
        check_size("num_pages", num_pages)
        self.spec = spec
        self.num_layers = num_layers
        self.num_pages = num_pages
        self.device = existing_device(device)
        self.debug = debug_enabled()
        self.k = self._empty_pages(spec.head_dim, spec.page_stride)
        self.v = self._empty_pages(spec.out_dim, spec.value_page_stride)
        if spec.quantized:
            scales = (num_layers, spec.num_kv_heads, num_pages, spec.page_size)
            self.k_scale = torch.empty(scales, dtype=torch.float32, device=self.device)
            self.v_scale = torch.empty(scales, dtype=torch.float32, device=self.device)
        for tensor in self.tensors():
            back_with_huge_pages(tensor)
        if self.debug:
            self.poison(range(num_pages))

    @classmethod
    def fit(
        cls, spec: AttentionSpec, *, num_layers: int, memory_bytes: int, device: torch.device | str = "cpu"
    ) -> KVPool:
        """Make the largest pool whose tensors take at most memory_bytes.

        Raises:
            ArgumentError: not even one page per layer fits, num_layers is below one, or memory_bytes is no number.
        """
        check_size("num_layers", num_layers)
        bytes_per_page = num_layers * spec.bytes_per_page
        num_pages = check_bytes("memory_bytes", memory_bytes) // bytes_per_page
        if num_pages < 1:
            raise ArgumentError(
                f"memory_bytes must hold at least one page of {num_layers} layers, {bytes_per_page} bytes; "
                f"got {memory_bytes}. Fix: memory_bytes={bytes_per_page} or more, or a smaller page_size"
            )
        return cls(spec, num_layers, num_pages, device)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the pool, padding and scales included."""
        return self.num_layers * self.num_pages * self.spec.bytes_per_page

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pages of one layer, views [num_kv_heads, num_pages, page_size, head_dim].

        Raises:
            ArgumentError: index is not from 0 to num_layers - 1.
        """
        if not 0 <= index < self.num_layers:
            raise ArgumentError(
                f"layer index must be from 0 to {self.num_layers - 1}; got {index}. "
                "Fix: count layers from 0, and only those with a cache"
            )
        return self.k[index], self.v[index]

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copy whole pages, in every layer and head, scales included (copy-on-write).

        Args:
            copies: (source page, destination page) pairs; the result is that of copying them one
                after the other, also where a destination is a later source.
        Raises:
            ArgumentError: a page id out of range; nothing was copied.
        Cost: a gather and a scatter per tensor through a buffer of the pages copied; nothing when
            copies is empty.
        Source: arXiv:2309.06180 §4.4.
        """
        origin: dict[int, int] = {}  # destination → the page whose present content ends up there
        for source, destination in copies:
            origin[destination] = origin.get(source, source)
        if not origin:
            return
        destinations, sources = self._page_index(origin.keys()), self._page_index(origin.values())
        for tensor in self.tensors():
            bits = as_bits(tensor)  # a copy of bits keeps every NaN as it is
            bits[:, :, destinations] = bits[:, :, sources]

    def poison(self, pages: Iterable[int]) -> None:
        """Fill pages with NaN, so that reading a slot no one owns shows in the output.

        int8 has no NaN: there the scales alone are poisoned, which every value read is multiplied by.

        Raises:
            ArgumentError: a page id out of range; nothing was changed.
        """
        index = self._page_index(pages)
        for tensor in self.tensors():
            if tensor.dtype.is_floating_point:
                # Through bits: PyTorch has no index_fill_ for float8.
                nan = torch.tensor(float("nan"), dtype=tensor.dtype, device="cpu")
                as_bits(tensor).index_fill_(2, index, int(as_bits(nan).item()))

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"KVPool({self.num_layers} layers of {self.num_pages} pages of {spec.page_size} tokens, "
            f"{spec.num_kv_heads} heads of {spec.head_dim} in {str(spec.storage_dtype).removeprefix('torch.')}, "
            f"{self.nbytes / 1e6:.1f} MB on {self.device})"
        )

    def _empty_pages(self, width: int, page_stride: int) -> torch.Tensor:
        spec = self.spec
        leading = (self.num_layers, spec.num_kv_heads, self.num_pages)
        try:
            padded = torch.empty((*leading, page_stride), dtype=spec.storage_dtype, device=self.device)
        except RuntimeError as error:  # torch's allocators raise plain RuntimeErrors
            raise OutOfPages(
                f"num_pages must fit the memory of {self.device}; got {self.num_pages} pages of "
                f"{spec.bytes_per_page * self.num_layers} bytes over {self.num_layers} layers. "
                "Fix: fewer pages, or KVPool.fit(spec, num_layers=..., memory_bytes=...)"
            ) from error
        return padded[..., : spec.page_size * width].view(*leading, spec.page_size, width)

    def tensors(self) -> list[torch.Tensor]:
        """All that pages lie in: [num_layers, num_kv_heads, num_pages, …] each."""
        return [t for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None]

    def _page_index(self, pages: Iterable[int]) -> torch.Tensor:
        ids = list(pages)
        for page in ids:
            if not 0 <= page < self.num_pages:
                raise ArgumentError(
                    f"page must be an id from 0 to {self.num_pages - 1}; got {page}. "
                    "Fix: give the allocator the num_pages of this pool"
                )
        return torch.tensor(ids, dtype=torch.int64, device=self.device)


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, which copies leave as they are."""
    return tensor.view(_BIT_PATTERN[tensor.element_size()])
