"""The shape of one attention layer, what it costs in bytes, and checks of plain arguments."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from quire.errors import ArgumentError, DeviceError, DtypeError

KVDtype = Literal["int8", "fp8_e4m3", "fp8_e5m2"]

COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANTIZED_DTYPES: dict[str, torch.dtype] = {
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# The largest number that pages of each hold; int8's −128 is left out, so that a row and its negative are alike.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_CPU = torch.device("cpu")
PAGE_ALIGNMENT_BYTES = 64  # one cache line, two 32-byte DRAM sectors: a page is loaded as whole lines


def check_size(name: str, value: object) -> int:
    """An int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{name} must be an int of at least 1; got {value!r}. Fix: {name}=1 or more")
    return value


def check_bytes(name: str, value: object) -> int:
    """A number of bytes; a float, such as 1e9, is rounded down."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ArgumentError(f"{name} must be a number of bytes; got {value!r}. Fix: {name}=2**30 for 1 GiB")
    return int(value)


def existing_device(device: torch.device | str) -> torch.device:
    """The device as `tensor.device` reports it: cuda with its index, cpu without.

    Raises:
        DeviceError: there is none here.
    """
    if device in ("cpu", _CPU):
        return _CPU
    if isinstance(device, torch.device) and device.index is not None:
        return _numbered_device(device)
    return _device_of_a_tensor(device)


def _device_of_a_tensor(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # each of torch's devices fails in its own way, and some with pages of text
        raise DeviceError(
            f"device must be one that this torch and machine have; got {device!r} ({_first_line(error)}). "
            'Fix: device="cpu", or a torch built for that device'
        ) from error


# "cuda" alone is another device after torch.cuda.set_device; one with a number stays what it was.
_numbered_device = functools.cache(_device_of_a_tensor)


def _first_line(error: Exception) -> str:
    line = str(error).partition("\n")[0].rstrip(".")
    return line if len(line) <= 100 else f"{line[:100]} …"


@dataclass(frozen=True)
class AttentionSpec:
    """Heads, sizes and dtypes of one attention layer.

    Args:
        num_qo_heads: query heads; a multiple of num_kv_heads (GQA groups them).
        num_kv_heads: heads of the KV cache.
        head_dim: elements per head of queries and keys.
        page_size: tokens per page.
        dtype: dtype of queries, outputs and, unless kv_dtype is set, of the pages.
        kv_dtype: None, or "int8", "fp8_e4m3", "fp8_e5m2" for quantised pages with one fp32
            scale per token and head.
        value_dim: elements per head of values and outputs where they are fewer than those of keys, as in MLA, whose
            values are the first columns of its keys; None where they are as many.
    Raises:
        ArgumentError: a size below one, heads that do not divide, values wider than keys, an unknown dtype.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: KVDtype | None = None
    value_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_qo_heads", "num_kv_heads", "head_dim", "page_size"):
            check_size(name, getattr(self, name))
        if self.value_dim is not None and check_size("value_dim", self.value_dim) > self.head_dim:
            raise ArgumentError(
                f"value_dim must be at most head_dim={self.head_dim}; got {self.value_dim}. Fix: value_dim=None"
            )
        if self.value_dim == self.head_dim:
            object.__setattr__(self, "value_dim", None)  # one spec for one layout
        if self.num_qo_heads % self.num_kv_heads:
            raise ArgumentError(
                f"num_qo_heads must be a multiple of num_kv_heads; got {self.num_qo_heads} and "
                f"{self.num_kv_heads}. Fix: give both counts as in the model's config"
            )
        if self.dtype not in COMPUTE_DTYPES:
            raise DtypeError(
                f"dtype must be torch.float32, float16 or bfloat16; got {self.dtype}. "
                "Fix: quantised pages are asked for with kv_dtype"
            )
        if self.kv_dtype is not None and self.kv_dtype not in get_args(KVDtype):
            raise DtypeError(
                f"kv_dtype must be None or one of {', '.join(get_args(KVDtype))}; got {self.kv_dtype!r}. "
                "Fix: kv_dtype=None keeps the pages in dtype"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def out_dim(self) -> int:
        """Elements per head of a value, and of an output."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def quantized(self) -> bool:
        """Whether pages hold quantised values beside fp32 scales."""
        return self.kv_dtype is not None

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of the K and V elements in a page."""
        return self.dtype if self.kv_dtype is None else QUANTIZED_DTYPES[self.kv_dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value of one head, scales included."""
        scale = torch.float32.itemsize if self.quantized else 0
        return (self.head_dim + self.out_dim) * self.storage_dtype.itemsize + 2 * scale

    @property
    def page_stride(self) -> int:
        """Elements from the start of one page of one head's keys to the next, in whole cache lines."""
        return self._page_stride(self.head_dim)

    @property
    def value_page_stride(self) -> int:
        """The same for values."""
        return self._page_stride(self.out_dim)

    def _page_stride(self, width: int) -> int:
        elements_per_line = PAGE_ALIGNMENT_BYTES // self.storage_dtype.itemsize
        return math.ceil(self.page_size * width / elements_per_line) * elements_per_line

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page of one layer: K and V, all KV heads, padding and scales included."""
        elements = self.page_stride + self.value_page_stride
        scales = 2 * self.page_size * torch.float32.itemsize if self.quantized else 0
        return self.num_kv_heads * (elements * self.storage_dtype.itemsize + scales)


@dataclass(frozen=True)
class Visibility:
    """Which earlier keys a layer's queries see: all, those of a window, or those of their own chunk.

    window_left: keys further back than this many positions are out of sight; −1 for no window.
    chunk_size: tokens per chunk, a multiple of page_size; 0 for no chunks.
    """

    window_left: int = -1
    chunk_size: int = 0

    def __str__(self) -> str:
        if self.chunk_size:
            return f"chunks of {self.chunk_size}"
        return f"a window of {self.window_left + 1}" if self.window_left >= 0 else "all earlier tokens"

    @property
    def sees_all(self) -> bool:
        """Whether no key is ever out of sight."""
        return self.window_left < 0 and not self.chunk_size

    def first_key(self, position: int) -> int:
        """The first key that a query at `position` sees; later queries see none before it."""
        if self.chunk_size:
            return position // self.chunk_size * self.chunk_size
        return max(position - self.window_left, 0) if self.window_left >= 0 else 0

    def unseen_from(self, key: int) -> int:
        """The first position whose query sees no key before `key`; sys.maxsize where all keys stay in sight."""
        if self.chunk_size:
            return -(-key // self.chunk_size) * self.chunk_size
        return key + self.window_left if self.window_left >= 0 else sys.maxsize

    def most_pages(self, num_tokens: int, page_size: int) -> int:
        """Most pages on which `num_tokens` tokens in a row lie with all that they see; sys.maxsize without a limit."""
        if self.chunk_size:
            return -(-(self.chunk_size - 1 + num_tokens) // page_size)
        if self.window_left >= 0:
            return -(-(self.window_left + num_tokens - 1) // page_size) + 1
        return sys.maxsize
