"""The public store: check → dispatch. Each token's K and V go to the slot the page table gave it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from quire.debug import debug_enabled
from quire.errors import ArgumentError, DtypeError, ShapeError
from quire.kernels import load_backend, resolve_backend
from quire.ops import checks
from quire.ops.torch_op import is_watched, register
from quire.planning.checks import check_tensor, describe
from quire.spec import COMPUTE_DTYPES, QUANTIZED_DTYPES


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write each token's keys and values into its slot of one layer's pages.

    Args:
        k, v: [tokens, num_kv_heads, head_dim]; any strides with a contiguous last dimension.
        k_pages, v_pages: [num_kv_heads, num_pages, page_size, head_dim], written in place.
        slot_mapping: int64 [tokens], page × page_size + offset; −1 writes nowhere.
        k_scale, v_scale: float32 [num_kv_heads, num_pages, page_size], written where pages are quantised:
            symmetric, per token and head. int8 pages then hold −127 to 127; a −128 that others wrote may count
            as −127 (docs/numerics.md).
    Raises:
        ShapeError, DtypeError, DeviceError: arguments that do not fit together.
        ArgumentError: with QUIRE_DEBUG=1, a slot outside the pool.
    Cost: reads and writes each element once; no host sync.
    Source: the reshape-and-cache step of PagedAttention, arXiv:2309.06180 §4.
    """
    if is_watched(k):
        _check_door(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
        torch.ops.quire.write_kv(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale, backend)
    else:
        _write_kv(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale, backend)


def _check_door(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    """What torch would take for something else than a call of the operator; ``_check`` looks at the rest."""
    if not checks.hold_data((k, v, k_pages, v_pages, slot_mapping), (k_scale, v_scale)):
        checks.check_pages("k_pages", k_pages)
        _check_devices(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)


def _check_devices(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    checks.check_devices(
        "k_pages", k_pages.device, k=k, v=v, v_pages=v_pages, slot_mapping=slot_mapping,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def _check(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    check_tensor("slot_mapping", slot_mapping, 1, "int64 [tokens]")
    checks.check_pages("k_pages", k_pages)
    _check_devices(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
    layout = "[tokens, num_kv_heads, head_dim]"
    for name, rows, pages_name, pages in (("k", k, "k_pages", k_pages), ("v", v, "v_pages", v_pages)):
        check_tensor(name, rows, 3, layout)
        checks.check_last_dim_contiguous(name, rows)
        checks.check_pages(pages_name, pages)
        checks.check_own_memory(pages_name, pages)
        heads, _, _, head_dim = pages.shape
        expected = (len(slot_mapping), heads, head_dim)
        if rows.shape != expected:
            raise ShapeError(
                f"{name} must be {layout} = {list(expected)} to fit slot_mapping and {pages_name}; "
                f"got {describe(rows)}. Fix: one slot per token, and the pool of this layer's spec"
            )
        if rows.dtype != k.dtype or rows.dtype not in COMPUTE_DTYPES:
            raise DtypeError(
                f"{name} must be float32, float16 or bfloat16, k and v alike; got {describe(rows)}. "
                f"Fix: {name}.to(torch.bfloat16)"
            )
        if pages.dtype not in (*COMPUTE_DTYPES, *QUANTIZED_DTYPES.values()):
            raise DtypeError(
                f"{pages_name} must be of a dtype that pages can have; got {describe(pages)}. "
                "Fix: take them from a KVPool"
            )
        if pages.dtype in COMPUTE_DTYPES and pages.dtype != rows.dtype:
            raise DtypeError(
                f"{name} must be {pages.dtype} like {pages_name}; got {describe(rows)}. "
                f"Fix: {name}.to({pages.dtype})"
            )
    if k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ShapeError(
            f"v_pages must be like k_pages, {describe(k_pages)}; got {describe(v_pages)}. "
            "Fix: take both from one KVPool"
        )
    checks.check_scales(k_pages, v_pages, k_scale, v_scale)
    if slot_mapping.dtype != torch.int64:
        raise DtypeError(
            f"slot_mapping must be int64 [tokens]; got {describe(slot_mapping)}. Fix: slot_mapping.long()"
        )


def _check_slots(slot_mapping: torch.Tensor, num_slots: int) -> None:
    """Debug mode: every slot lies in the pool."""
    if len(slot_mapping) and (int(slot_mapping.min()) < -1 or int(slot_mapping.max()) >= num_slots):
        raise ArgumentError(
            f"slot_mapping must lie between −1 and {num_slots - 1}; got values from "
            f"{int(slot_mapping.min())} to {int(slot_mapping.max())}. "
            "Fix: use the slots that PageTable.append returned for this pool"
        )


_bound: dict[Hashable, Callable[..., None]] = {}  # by all that is checked of a call
_last: tuple[Hashable, Callable[..., None] | None] = None, None  # tuples are sooner compared than hashed
_MOST_LAYOUTS = 1024  # a new number of tokens is a new layout


def _write_kv(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, backend: str,
) -> None:  # fmt: skip
    """Arguments that were accepted once are not checked again when they come in the same layout."""
    global _last
    try:
        layout: Hashable = (
            k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype, k.device, v.device,
            k_pages.shape, k_pages.stride(), k_pages.dtype, v_pages.shape, v_pages.stride(), v_pages.dtype,
            k_pages.device, v_pages.device,
            slot_mapping.shape, slot_mapping.stride(), slot_mapping.dtype, slot_mapping.device,
            k_scale if k_scale is None else checks.layout_of(k_scale),
            v_scale if v_scale is None else checks.layout_of(v_scale),
            backend,
        )  # fmt: skip
        last, write = _last
        if layout != last:
            write = _bound.get(layout)
    except (AttributeError, TypeError, RuntimeError):  # something is no tensor: the checks say what
        layout, write = None, None
    if write is None:
        _check_door(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
        write = _bind(layout, backend, k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
    _last = layout, write
    if debug_enabled():
        _check_slots(slot_mapping, k_pages.shape[1] * k_pages.shape[2])
    write(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)


def _bind(layout: Hashable, backend: str, *tensors: Any) -> Callable[..., None]:
    _check(*tensors)
    k, _, k_pages, *_ = tensors
    kernels = load_backend(resolve_backend(backend, k.device), checks.infer_spec(k, k_pages), k.device)
    if len(_bound) >= _MOST_LAYOUTS:
        _bound.clear()
    write: Callable[..., None] = kernels.bind_write(*tensors)
    _bound[layout] = write
    return write


register(
    "write_kv",
    "Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slot_mapping, "
    "Tensor(c!)? k_scale, Tensor(d!)? v_scale, str backend",
    _write_kv,
)
