"""Errors of one layer's tensors, the same for every backend: name, expected, got, fix.

Shapes, strides and dtypes are read on the host: no check waits for a device. A step's lengths and tables are checked in
``planning.checks``.
"""

from __future__ import annotations

import math
from collections.abc import Container, Hashable

import torch

from quire.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from quire.kernels.call import AttentionCall, Scoring
from quire.ops.scales import are_given
from quire.planning.checks import check_tensor, describe, given
from quire.spec import COMPUTE_DTYPES, QUANTIZED_DTYPES, AttentionSpec, KVDtype, existing_device

PAGES = "[num_kv_heads, num_pages, page_size, head_dim]"
_KV_NAMES: dict[torch.dtype, KVDtype] = {dtype: name for name, dtype in QUANTIZED_DTYPES.items()}  # type: ignore[misc]


def check_last_dim_contiguous(name: str, value: torch.Tensor) -> None:
    """Kernels read rows of head_dim neighbouring elements."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ShapeError(
            f"{name} must have a contiguous last dimension; got strides {list(value.stride())}. "
            f"Fix: {name}.contiguous()"
        )


def hold_data(needed: tuple[object, ...], optional: tuple[object, ...]) -> bool:
    """Whether these are tensors, none of them on "meta", so that torch runs an operator's implementation on them.

    It is asked under tracing too, with fake tensors: nothing here depends on a shape.
    """
    for value in needed:
        if not isinstance(value, torch.Tensor) or value.is_meta:
            return False
    # A generator would cost as much as all else here.
    for value in optional:  # noqa: SIM110
        if value is not None and (not isinstance(value, torch.Tensor) or value.is_meta):
            return False
    return True


def check_door(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor | None, scoring: Scoring
) -> None:
    """Refuse what torch would not hand to the operator's implementation, which checks everything else."""
    check_numbers(scoring)
    if hold_data((q, k_pages, v_pages), (out, *scoring.tensors)):
        return
    check_queries(q)
    check_pages("k_pages", k_pages)
    check_pages("v_pages", v_pages)
    check_devices("q", q.device, k_pages=k_pages, v_pages=v_pages, out=out, **_by_name(scoring))


def _by_name(scoring: Scoring) -> dict[str, torch.Tensor | None]:
    return dict(zip(Scoring._fields[2:], scoring.tensors, strict=True))


def resolve_device(device: torch.device | str | None, page_table: torch.Tensor) -> torch.device:
    """Where q and the pages will be: page_table's device when None."""
    return page_table.device if device is None else existing_device(device)


def check_devices(like: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """All tensors of a call live in one place.

    Checked before the operator is called: torch sends a call with a tensor on "meta" to the fake implementation, which
    computes nothing.
    """
    for name, tensor in given(tensors):
        if tensor.device != device:
            raise DeviceError(
                f"{name} must be on {device}, like {like}; got {tensor.device}. Fix: {name}.to({str(device)!r})"
            )


def check_queries(q: object) -> torch.Tensor:
    """q: [tokens, num_qo_heads, head_dim] of a compute dtype."""
    q = check_tensor("q", q, 3, "[tokens, num_qo_heads, head_dim]")
    if q.dtype not in COMPUTE_DTYPES:
        raise DtypeError(
            f"q must be float32, float16 or bfloat16; got {describe(q)}. Fix: q.to(torch.bfloat16)"
        )
    check_last_dim_contiguous("q", q)
    return q


def check_pages(name: str, pages: object) -> torch.Tensor:
    """One layer's pages."""
    pages = check_tensor(name, pages, 4, PAGES)
    if 0 in pages.shape:
        raise ShapeError(
            f"{name} must be {PAGES} with no empty dimension; got {describe(pages)}. Fix: a larger pool"
        )
    check_last_dim_contiguous(name, pages)
    return pages


def check_scales(
    k_pages: torch.Tensor, v_pages: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> None:
    """Quantised pages come with float32 scales: one per token and head, per head, or for all. Others come without."""
    for name, scale, pages in (("k_scale", k_scale, k_pages), ("v_scale", v_scale, v_pages)):
        quantized = pages.dtype in _KV_NAMES
        if scale is None:
            if quantized:
                raise ArgumentError(
                    f"{name} must be given for {describe(pages)} pages; got None. Fix: {name}=pool.{name}[layer]"
                )
            continue
        if not quantized:
            raise ArgumentError(
                f"{name} must be None for {describe(pages)} pages; got a tensor. Fix: {name}=None"
            )
        heads, num_pages, page_size, _ = pages.shape
        wrong_dtype = scale.dtype != torch.float32
        if wrong_dtype or scale.shape not in (pages.shape[:3], (heads,), (1,), ()):
            raise (DtypeError if wrong_dtype else ShapeError)(
                f"{name} must be float32 {[heads, num_pages, page_size]}, or [{heads}] or [] where it is given; "
                f"got {describe(scale)}. Fix: {name}=pool.{name}[layer]"
            )
    if k_scale is None or v_scale is None or (are_given(k_scale) and are_given(v_scale)):
        return
    if k_scale.shape != v_scale.shape or k_scale.stride() != v_scale.stride():
        raise ShapeError(
            f"v_scale must have k_scale's shape {list(k_scale.shape)} and strides {list(k_scale.stride())}; got "
            f"{list(v_scale.shape)} and {list(v_scale.stride())}. Fix: take both from one KVPool"
        )


def infer_spec(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> AttentionSpec:
    """The spec that a call is for; q and pages fit together."""
    num_kv_heads, _, page_size, head_dim = k_pages.shape
    kv_dtype, value_dim = _KV_NAMES.get(k_pages.dtype), v_pages.shape[3]
    return AttentionSpec(q.shape[1], num_kv_heads, head_dim, page_size, q.dtype, kv_dtype, value_dim)


def check_layer(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> AttentionSpec:
    """The spec of a layer whose queries and pages fit together."""
    check_queries(q)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_pages(name, pages)
        if pages.dtype != q.dtype and pages.dtype not in _KV_NAMES:
            raise DtypeError(
                f"{name} must be {q.dtype} like q, or quantised; got {describe(pages)}. Fix: {name}.to({q.dtype})"
            )
    num_qo_heads, head_dim = q.shape[1:]
    if num_qo_heads == 0:
        raise ShapeError(f"q must have at least one head; got {describe(q)}. Fix: the queries of one layer")
    if k_pages.shape[3] != head_dim or num_qo_heads % k_pages.shape[0]:
        heads = [n for n in k_pages.shape[1:3] if num_qo_heads % n == 0]
        raise ShapeError(
            f"k_pages must be {PAGES} with head_dim={head_dim} of q and num_kv_heads a divisor of its {num_qo_heads} "
            f"heads; got {describe(k_pages)}. Fix: {in_order('k_pages', k_pages, heads, head_dim)}"
        )
    check_alike(k_pages, v_pages)
    return infer_spec(q, k_pages, v_pages)


def check_alike(k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """v_pages are like k_pages; their values may be narrower than keys."""
    same = k_pages.shape[:3] == v_pages.shape[:3] and k_pages.dtype == v_pages.dtype
    if not same or v_pages.shape[3] > k_pages.shape[3]:
        raise (DtypeError if k_pages.dtype != v_pages.dtype else ShapeError)(
            f"v_pages must be like k_pages, {describe(k_pages)}; got {describe(v_pages)}. "
            "Fix: take both from one KVPool"
        )


def in_order(name: str, pages: torch.Tensor, heads: Container[int], head_dim: int) -> str:
    """A fix for pages in another order of dimensions, where ``heads`` are numbers of heads that would fit."""
    fixes = []
    if pages.shape[3] == head_dim and pages.shape[2] in heads:
        fixes.append(f"{name}.permute(2, 0, 1, 3) if it is [num_pages, page_size, num_kv_heads, head_dim]")
    if pages.shape[3] == head_dim and pages.shape[1] in heads:
        fixes.append(f"{name}.transpose(0, 1) if it is [num_pages, num_kv_heads, page_size, head_dim]")
    return ", or ".join(fixes) or "one layer of this model's KVPool, pool.layer(i)"


def check_num_tokens(q: torch.Tensor, num_tokens: int, cu_seqlens_q: torch.Tensor | None) -> None:
    """A step has q's tokens."""
    if cu_seqlens_q is not None and num_tokens != len(q):
        raise ShapeError(
            f"cu_seqlens_q must end with the number of q's tokens, {len(q)}; got {num_tokens}. "
            "Fix: the cumulative sum of query lengths, with a leading 0"
        )
    if num_tokens != len(q):
        raise ShapeError(
            f"q must have one token for each of {num_tokens} sequences where cu_seqlens_q is None; "
            f"got {describe(q)}. Fix: pass cu_seqlens_q for several tokens per sequence"
        )


def check_numbers(scoring: Scoring) -> None:
    """Python numbers, before torch compares them with the operator's schema; ``check_call`` looks at their values."""
    for name, value in zip(Scoring._fields[:2], scoring.numbers, strict=True):
        optional = name == "softmax_scale" and value is None
        if not optional and (not isinstance(value, (int, float)) or isinstance(value, bool)):
            default = None if name == "softmax_scale" else 0.0
            raise ArgumentError(f"{name} must be a number; got {value!r}. Fix: {name}={default}")


def check_own_memory(name: str, tensor: torch.Tensor, fix: str | None = None) -> None:
    """A tensor that is written must not overlap itself: elements that share memory would keep only the last value.

    Each dimension, from the smallest stride to the largest, must step over all that the dimensions before it reach.
    """
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach and tensor.numel():
            raise ShapeError(
                f"{name} must have memory of its own for every row; got strides {list(tensor.stride())} for shape "
                f"{list(tensor.shape)}. Fix: {fix or f'{name}.clone()'}"
            )
        reach += stride * (size - 1)


def check_head_vector(name: str, value: torch.Tensor | None, num_qo_heads: int) -> None:
    """alibi_slopes and sinks: one fp32 number per query head."""
    if value is None:
        return
    layout = f"float32 [num_qo_heads] = [{num_qo_heads}]"
    check_tensor(name, value, 1, layout)
    if value.dtype != torch.float32 or len(value) != num_qo_heads:
        raise (DtypeError if value.dtype != torch.float32 else ShapeError)(
            f"{name} must be {layout}; got {describe(value)}. Fix: {name}.float(), one per query head"
        )
    check_last_dim_contiguous(name, value)


def check_tree_mask(tree_mask: torch.Tensor | None, num_tokens: int, max_q_len: int) -> None:
    """tree_mask: bool [tokens, max_q_len], a row per packed query, a column per new key of its sequence.

    It may have rows of padding, as q may.
    """
    if tree_mask is None:
        return
    layout = f"bool [tokens, max_q_len] = [{num_tokens}, {max_q_len}]"
    check_tensor("tree_mask", tree_mask, 2, layout)
    if tree_mask.dtype != torch.bool or tree_mask.shape[0] < num_tokens or tree_mask.shape[1] < max_q_len:
        raise (DtypeError if tree_mask.dtype != torch.bool else ShapeError)(
            f"tree_mask must be {layout}; got {describe(tree_mask)}. "
            "Fix: row i, column j: may packed query i see the j-th new token of its own sequence"
        )
    check_last_dim_contiguous("tree_mask", tree_mask)


def layout_of(tensor: torch.Tensor) -> Hashable:
    """All that checks and kernels read of a tensor but its address and values.

    An argument of a layout that was accepted before need not be checked again.
    """
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def check_call(spec: AttentionSpec, num_tokens: int, device: torch.device, call: AttentionCall) -> None:
    """One layer's arguments against the plan they are run with."""
    _check_planned_queries(spec, num_tokens, device, call.q)
    check_devices("q", call.q.device, k_pages=call.k_pages, v_pages=call.v_pages)
    for name, pages, width in (
        ("k_pages", call.k_pages, spec.head_dim), ("v_pages", call.v_pages, spec.out_dim),
    ):  # fmt: skip
        check_pages(name, pages)
        heads, _, page_size, head_dim = pages.shape
        if (heads, page_size, head_dim) != (spec.num_kv_heads, spec.page_size, width):
            fix = "pool.layer(i), or plan for this pool's spec"
            if {page_size, pages.shape[1]} == {spec.num_kv_heads, spec.page_size}:
                fix = in_order(name, pages, (spec.num_kv_heads,), width)
            raise ShapeError(
                f"{name} must be [{spec.num_kv_heads}, num_pages, {spec.page_size}, {width}] as planned; "
                f"got {describe(pages)}. Fix: {fix}"
            )
        if pages.dtype != spec.storage_dtype:
            raise DtypeError(
                f"{name} must be {spec.storage_dtype} as planned; got {describe(pages)}. "
                "Fix: give the plan the pool's spec"
            )
    check_alike(call.k_pages, call.v_pages)
    check_beside_layer(spec, call)


def check_beside_layer(spec: AttentionSpec, call: AttentionCall) -> None:
    """What ``check_layer`` leaves of a call whose queries and pages are those of the spec."""
    scoring = call.scoring
    check_no_gradient("q", call.q)
    check_devices(
        "q", call.q.device, k_pages=call.k_pages, v_pages=call.v_pages, out=call.out, **_by_name(scoring)
    )
    check_scales(call.k_pages, call.v_pages, scoring.k_scale, scoring.v_scale)
    check_out(call.out, call.q, spec.out_dim)
    check_head_vector("alibi_slopes", scoring.alibi_slopes, spec.num_qo_heads)
    check_head_vector("sinks", scoring.sinks, spec.num_qo_heads)
    check_numbers(scoring)
    if not math.isfinite(call.scale):
        raise ArgumentError(
            f"softmax_scale must be a finite number; got {call.scale}. Fix: softmax_scale=None"
        )
    if not 0.0 <= scoring.softcap < float("inf"):
        raise ArgumentError(
            f"softcap must be 0 (off) or a positive number; got {scoring.softcap}. Fix: softcap=0.0"
        )


def _check_planned_queries(
    spec: AttentionSpec, num_tokens: int, device: torch.device, q: torch.Tensor
) -> None:
    """q has the plan's tokens, and perhaps rows of padding behind them."""
    check_queries(q)
    planned = (num_tokens, spec.num_qo_heads, spec.head_dim)
    if q.shape[1:] != planned[1:] or q.shape[0] < num_tokens:
        raise ShapeError(f"q must be {list(planned)} as planned; got {describe(q)}. Fix: plan this step anew")
    if q.dtype != spec.dtype:
        raise DtypeError(f"q must be {spec.dtype} as planned; got {describe(q)}. Fix: q.to({spec.dtype})")
    check_devices("the plan", device, q=q)


def check_no_gradient(name: str, tensor: torch.Tensor) -> None:
    """No operator here has a backward."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            f"{name} must not require a gradient: Quire is for inference; got requires_grad=True. "
            "Fix: call it under torch.inference_mode()"
        )


def check_out(out: torch.Tensor, q: torch.Tensor, out_dim: int) -> None:
    """An output given by the caller looks like q, with a value's number of elements."""
    check_tensor("out", out, 3, "[tokens, num_qo_heads, head_dim]")
    if out.shape != (*q.shape[:2], out_dim) or out.dtype != q.dtype:
        raise (DtypeError if out.dtype != q.dtype else ShapeError)(
            f"out must be {q.dtype} {[*q.shape[:2], out_dim]}, like q; got {describe(out)}. Fix: out=None"
        )
    check_own_memory("out", out)
    check_last_dim_contiguous("out", out)
