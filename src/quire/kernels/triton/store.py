"""Write each token's keys and values into its slot, quantising where the pages are quantised.

    scale = max|x| / largest(format),   stored = round(x / scale)

per token and head, symmetric; the same bits as ``reference.quantize``. An all-zero row has scale 0 and stays zero,
a row with a NaN has scale NaN. Where scales are given, ``stored`` is clamped to ±largest(format) instead.

Source: the reshape-and-cache step of PagedAttention, arXiv:2309.06180 §4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from quire.kernels.triton import tune
from quire.kernels.triton.addresses import addresses_of
from quire.kernels.triton.formats import largest, round_to_fp8, round_to_int8
from quire.kernels.triton.launch import Enqueue, Form, Options
from quire.spec import QUANTIZED_DTYPES

_FORMATS = {dtype: name for name, dtype in QUANTIZED_DTYPES.items()}
_STORE_ELEMENTS = 4096  # of one token that a program of write_kv holds at a time


@triton.jit
def scales_of(x, LARGEST: tl.constexpr):
    """The scale of each row of x [heads, dims], NaN for a row with a NaN."""
    scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full([1], LARGEST, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)  # below float32's smallest normal number
    has_nan = tl.sum((x != x).to(tl.int32), 1) > 0
    return tl.where(has_nan, float("nan"), scale)


@triton.jit
def quantise(x, scale, FORMAT: tl.constexpr):
    """Rows of x [heads, dims] over their scales, as stored elements; 0 where the scale is 0 or NaN.

    Beyond the format's largest number lies that number. A NaN is stored as fp8's NaN, or as int8's 0.
    """
    LARGEST: tl.constexpr = largest(FORMAT)
    scaled = tl.div_rn(x, tl.where(scale > 0, scale, 1.0)[:, None])
    is_nan = (scaled != scaled) & (scale > 0)[:, None]
    scaled = tl.where((scale > 0)[:, None], tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST), 0.0)
    if FORMAT == "int8":
        return tl.where(is_nan, 0, round_to_int8(scaled))
    else:
        return tl.where(is_nan, 0x7F, round_to_fp8(scaled, FORMAT))


@triton.jit
def write_token(
    rows, pages, scales, token, page, offset, rows_token, rows_head, pages_head, pages_page, pages_slot,
    scale_head, scale_page, scale_slot,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """One token's rows of all heads, BLOCK_H heads at a time."""
    dim = tl.arange(0, BLOCK_D)
    for first in range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H).to(tl.int64)
        inside = (head < HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
        x = tl.load(
            rows + token * rows_token + head[:, None] * rows_head + dim[None, :], mask=inside, other=0.0
        )
        at = pages + page * pages_page + offset * pages_slot + head[:, None] * pages_head + dim[None, :]
        if FORMAT == "same":
            tl.store(at, x, mask=inside)
        else:
            x = x.to(tl.float32)
            scale_at = scales + page * scale_page + offset * scale_slot + head * scale_head
            if GIVEN:
                scale = tl.load(scale_at, mask=head < HEADS, other=0.0)
            else:
                scale = scales_of(x, largest(FORMAT))
                tl.store(scale_at, scale, mask=head < HEADS)
            tl.store(at, quantise(x, scale, FORMAT), mask=inside)


# A pool's size: compiled code must not depend on it.
@triton.jit(do_not_specialize=["num_pages"])
def write(
    k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale, num_pages,
    k_token, k_head, v_token, v_head, k_pages_head, k_page, k_slot, v_pages_head, v_page, v_slot,
    scale_head, scale_page, scale_slot, slot_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """One program per token. A slot outside the pool, such as −1, writes nowhere."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token * slot_stride)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    if (slot >= 0) & (page < num_pages):
        write_token(
            k, k_pages, k_scale, token, page, offset, k_token, k_head, k_pages_head, k_page, k_slot,
            scale_head, scale_page, scale_slot, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D, FORMAT, GIVEN,
        )  # fmt: skip
        write_token(
            v, v_pages, v_scale, token, page, offset, v_token, v_head, v_pages_head, v_page, v_slot,
            scale_head, scale_page, scale_slot, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D, FORMAT, GIVEN,
        )  # fmt: skip


_forms: dict[Any, Form] = {}  # compiled kernels, by what they are compiled for


def bind_write(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, given: bool = False,
) -> Callable[..., None]:  # fmt: skip
    """``write_kv`` for tensors of the layout of these: one program per token.

    Where scales are ``given`` they are read, through any strides, and not written.
    """
    tokens, device, num_pages = len(slot_mapping), k.device, k_pages.shape[1]
    enqueues: dict[Any, Enqueue] = {}

    def run(*tensors: torch.Tensor | None) -> None:
        addresses, granted = addresses_of(tensors)
        enqueue = enqueues.get(granted)
        if enqueue is None:
            form = _form(tensors, granted, given)
            enqueue = enqueues[granted] = form.bind(tokens, device, (), (num_pages,))
        enqueue(tensors, addresses)

    return run if tokens else lambda *tensors: None


def _form(tensors: tuple[Any, ...], granted: Any, given: bool) -> Form:
    """The kernel for tensors like these, compiled if nobody has asked for it before."""
    k, v, k_pages, v_pages, slot_mapping, k_scale, _ = tensors
    _, heads, head_dim = k.shape
    block_d = tune.block_dim(head_dim)
    block_h = min(tune.power_of_two(heads), max(1, _STORE_ELEMENTS // block_d))
    tail = (
        *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
        *((0, 0, 0) if k_scale is None else k_scale.stride()), slot_mapping.stride(0),
        heads, head_dim, k_pages.shape[2], block_h, block_d, _FORMATS.get(k_pages.dtype, "same"), given,
    )  # fmt: skip
    key = k.dtype, k_pages.dtype, k.device, granted, tail
    form = _forms.get(key)
    if form is None:
        options = Options(num_warps=4, num_stages=1)
        form = _forms[key] = Form.compile(write, k.device, tensors, (k_pages.shape[1],), tail, options)
    return form
