"""The public store: check → dispatch. Each token's K and V go to the slot the page table gave it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from quire.debug import debug_enabled
from quire.errors import DtypeError, ShapeError
from quire.kernels import load_backend, resolve_backend
from quire.kernels.call import BoundCall, outside_the_pool
from quire.ops import checks
from quire.ops.scales import are_given, spread, taking_given
from quire.ops.torch_op import is_watched, register
from quire.planning.checks import check_backend, check_tensor, describe
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
        k, v: [tokens, num_kv_heads, head_dim]; any strides with a contiguous last dimension. Rows past those of
            slot_mapping are padding: they are not read.
        k_pages, v_pages: [num_kv_heads, num_pages, page_size, head_dim], written in place.
        slot_mapping: int64 [tokens], page × page_size + offset; −1 writes nowhere.
        k_scale, v_scale: where pages are quantised. float32 [num_kv_heads, num_pages, page_size] is written: one scale
            per token and head, the largest |x| over the dtype's largest number. float32 [num_kv_heads] or [] is given:
            values are divided by it, rounded, and clamped to the dtype's largest number; a scale of 0 stores 0, and a
            NaN is stored as fp8's NaN or as int8's 0. A given scale must be finite and not negative; that is not
            checked, and what another stores means nothing. int8 pages hold −127 to 127; a −128 that others wrote may
            count as −127 (docs/numerics.md).
    Raises:
        ShapeError, DtypeError, DeviceError: arguments that do not fit together.
        UnsupportedError: k or v requires a gradient.
        ArgumentError: a slot below −1 or outside the pool; nothing is written. On a GPU only with QUIRE_DEBUG=1:
            otherwise such a slot writes nowhere.
    Cost: reads and writes each element once; no host sync.
    Source: the reshape-and-cache step of PagedAttention, arXiv:2309.06180 §4.
    """
    if is_watched(k):
        check_backend(backend)
        _check_door(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
        torch.ops.quire.write_kv(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale, backend)
    else:
        _write_kv(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale, backend)


def _check_door(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    """Refuse what torch would not hand to the operator's implementation; ``_check`` looks at the rest."""
    if not checks.hold_data((k, v, k_pages, v_pages, slot_mapping), (k_scale, v_scale)):
        checks.check_pages("k_pages", k_pages)
        checks.check_devices(
            "k_pages", k_pages.device, k=k, v=v, v_pages=v_pages, slot_mapping=slot_mapping,
            k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip


def _check(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    """One layer's new tokens, their slots, and the pages they go to."""
    check_tensor("slot_mapping", slot_mapping, 1, "int64 [tokens]")
    checks.check_pages("k_pages", k_pages)
    checks.check_devices(
        "k_pages", k_pages.device, k=k, v=v, v_pages=v_pages, slot_mapping=slot_mapping,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    for name, rows, pages_name, pages in (("k", k, "k_pages", k_pages), ("v", v, "v_pages", v_pages)):
        checks.check_pages(pages_name, pages)
        checks.check_own_memory(pages_name, pages)
        _check_rows(name, rows, pages_name, pages, len(slot_mapping), k)
    checks.check_alike(k_pages, v_pages)
    checks.check_scales(k_pages, v_pages, k_scale, v_scale)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and not are_given(scale):
            checks.check_own_memory(name, scale, "pass it as [num_kv_heads] or []")
    if slot_mapping.dtype != torch.int64:
        raise DtypeError(
            f"slot_mapping must be int64 [tokens]; got {describe(slot_mapping)}. Fix: slot_mapping.long()"
        )


def _check_rows(
    name: str, rows: torch.Tensor, pages_name: str, pages: torch.Tensor, tokens: int, k: torch.Tensor
) -> None:
    """k or v against its pages."""
    layout = "[tokens, num_kv_heads, head_dim]"
    check_tensor(name, rows, 3, layout)
    checks.check_last_dim_contiguous(name, rows)
    checks.check_no_gradient(name, rows)
    expected = (tokens, pages.shape[0], pages.shape[3])
    if rows.shape[1:] != expected[1:] or rows.shape[0] < tokens:
        fix = "one slot per token, and the pool of this layer's spec"
        if rows.shape[1] != pages.shape[0]:
            fix = checks.in_order(pages_name, pages, (rows.shape[1],), rows.shape[2])
        raise ShapeError(
            f"{name} must be {layout} = {list(expected)} to fit slot_mapping and {pages_name}; "
            f"got {describe(rows)}. Fix: {fix}"
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


def _with_slots_checked(write: BoundCall, num_slots: int) -> BoundCall:
    """``write`` of slots that are in the pool, for backends that do not look at them themselves.

    On a device the host would have to wait for them, so that they are looked at in debug mode only.
    """

    def checked(k: Any, v: Any, k_pages: Any, v_pages: Any, slots: torch.Tensor, *scales: Any) -> None:
        if (slots.is_cpu or debug_enabled()) and bool(((slots < -1) | (slots >= num_slots)).any()):
            raise outside_the_pool(slots, num_slots)
        write(k, v, k_pages, v_pages, slots, *scales)

    return checked


_bound: dict[Hashable, BoundCall] = {}  # by layout
_last: tuple[Hashable, BoundCall | None] = None, None  # tuples are compared faster than they are hashed
_MOST_LAYOUTS = 1024  # a new number of tokens is a new layout


def _write_kv(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, backend: str,
) -> None:  # fmt: skip
    """Arguments that were accepted once are not checked again when they come in the same layout."""
    global _last
    try:
        layout: Hashable = (
            (k.requires_grad or v.requires_grad) and torch.is_grad_enabled(),
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
    except (AttributeError, TypeError, RuntimeError):  # an argument is no tensor: the checks say which
        layout, write = None, None
    if write is None:
        write = _bind(layout, backend, k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
    _last = layout, write
    write(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)


def _bind(
    layout: Hashable, backend: str, k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
    slot_mapping: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
) -> BoundCall:  # fmt: skip
    """Check a call, then bind its kernel."""
    _check(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
    spec = checks.infer_spec(k, k_pages, v_pages)
    name = resolve_backend(backend, k.device)
    kernels = load_backend(name, spec, k.device)
    if len(_bound) >= _MOST_LAYOUTS:
        _bound.clear()
    sizes = k_pages.shape[:3]
    if k_scale is not None and v_scale is not None and are_given(k_scale):
        scales = spread(k_scale, v_scale, sizes)
        write = taking_given(kernels.bind_write(k, v, k_pages, v_pages, slot_mapping, *scales, True), sizes)
    else:
        write = kernels.bind_write(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale, False)
    if name != "cpu":
        write = _with_slots_checked(write, sizes[1] * sizes[2])
    _bound[layout] = write
    return write


register(
    "write_kv",
    "Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slot_mapping, "
    "Tensor(c!)? k_scale, Tensor(d!)? v_scale, str backend",
    _write_kv,
)
