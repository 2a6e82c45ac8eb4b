"""What layers must have in common to share a plan, in Quire's words."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quire.spec import AttentionSpec
from quire.vllm.cache import FORMATS


class LayerKind(NamedTuple):
    """Layers of one kind and one KV cache group share each step's plan."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_cache_dtype: str  # a key of FORMATS
    window_left: int

    def spec(self, page_size: int) -> AttentionSpec:
        """The layers' shape."""
        kv_dtype = FORMATS[self.kv_cache_dtype].kv_dtype
        return AttentionSpec(
            self.num_qo_heads, self.num_kv_heads, self.head_dim, page_size, self.dtype, kv_dtype
        )


def window_left_of(sliding_window: int | None) -> int:
    """vLLM's window counts the token itself, Quire's counts the keys before it; −1 is none of Quire's."""
    return -1 if sliding_window is None else sliding_window - 1
