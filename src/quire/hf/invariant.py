"""Operators of torch whose bits for one row depend on the other rows, and what takes their place.

A row must have the same bits whatever else is in the step (docs/numerics.md, "One answer"). Torch's operators are of
four kinds here, by their arguments:

    exact      moving numbers, comparing them, and arithmetic that IEEE rounds correctly: one result is right
    kept       each element, or each row, is computed by one code wherever it lies; tests find it so
    replaced   by something that is: products, whose order of sums torch chooses by their shape, and functions of which
               torch has one code for whole vectors and another for what is left over
    unproven   all others; a model that needs one is refused

``SameBits`` replaces the third kind while it is entered. ``forwards`` of the modules that need it enter it, or call a
replacement at once; all other modules run as they are. admit/company.py finds out which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quire.errors import UnsupportedError
from quire.spec import COMPUTE_DTYPES

Operator = Callable[..., Any]

# Names as in aten, without the underscore of those that work in place.
_EXACT = """
    _local_scalar_dense _reshape_alias _to_copy _unsafe_view abs alias all amax amin any arange argmax argmin
    argsort as_strided bitwise_and bitwise_not bitwise_or cat ceil chunk clamp clamp_max clamp_min clone complex
    constant_pad_nd contiguous copy detach diff div dropout embedding empty empty_like eq expand expand_as eye
    fill flatten flip floor full full_like gather ge gt histc index index_copy index_select is_nonzero isfinite
    isinf isnan item le lift_fresh logical_and logical_not logical_or lt masked_fill masked_scatter max maximum
    min minimum movedim narrow ne neg new_empty new_full new_ones new_zeros nonzero numel one_hot ones ones_like
    permute ravel reciprocal relu repeat repeat_interleave reshape resolve_conj resolve_neg roll round
    scalar_tensor searchsorted select sign slice slice_scatter sort split split_with_sizes sqrt square squeeze
    stack swapaxes t take_along_dim tensor_split tile to topk transpose tril triu trunc type_as unbind unflatten
    unsafe_split unsqueeze view view_as view_as_complex view_as_real where zero zeros zeros_like
"""
_KEPT = "_fused_rms_norm cos erf exp layer_norm log log1p polar rms_norm sin tanh"
EXACT, KEPT = frozenset(_EXACT.split()), frozenset(_KEPT.split())
# x ** n that torch computes by products, roots and quotients.
_EXACT_POWERS = (0, 0.5, 1, 2, 3, -1, -2)
# Torch splits the sum of a single row between threads from this width on.
_SPLIT_WIDTH = 32768
_MOST_SUMMANDS = 1024  # of a sum over another dimension than the last, which is one addition each


def replacement(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operator | None:
    """What computes this call with the same bits for a row in any company; None where `func` itself does.

    Raises:
        Unproven: nobody has shown that it does.
    """
    name, in_place = _name_of(func)
    if name.startswith("quire::") or name in EXACT or name in KEPT or not _has_floats(args):
        return None
    choose = _CHOICES.get(name)
    chosen = choose(*args, **kwargs) if choose is not None else NotImplemented
    if chosen is NotImplemented:
        raise Unproven(str(func))
    return _into_first(chosen) if chosen is not None and in_place else chosen


class Unproven(Exception):
    """An operator, with these arguments, that is neither known to be invariant nor replaced."""


_suspended: ContextVar[bool] = ContextVar("quire_same_bits_suspended", default=False)


@contextmanager
def suspended() -> Iterator[None]:
    """Let SameBits replace and refuse nothing, for checks that run within a module."""
    token = _suspended.set(True)
    try:
        yield
    finally:
        _suspended.reset(token)


class SameBits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, operators that need it are replaced, and unproven ones refused."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _suspended.get():
            return func(*args, **kwargs)
        try:
            return (replacement(func, args, kwargs) or func)(*args, **kwargs)
        except Unproven as error:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is NotImplemented:
                raise refusal(str(error)) from None
            return parts


def refusal(operator: str, where: str = "") -> UnsupportedError:
    """What is raised where a model needs an unproven operator."""
    return UnsupportedError(
        f"to be batch-invariant, a model must use operators that are known to be; got {operator}{where}. "
        "Fix: batch_invariant=False"
    )


def _name_of(func: Any) -> tuple[str, bool]:
    """An operator's name, and whether it works in place."""
    name: str = func._schema.name
    in_place = name.endswith("_") and func._schema.arguments[0].alias_info is not None
    return name.removeprefix("aten::").removesuffix("_" if in_place else ""), in_place


def _has_floats(args: tuple[Any, ...]) -> bool:
    flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return any(isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()) for x in flat)


def _into_first(function: Operator) -> Operator:
    return lambda x, *args, **kwargs: x.copy_(function(x, *args, **kwargs))


# --- products ---------------------------------------------------------------------------------------------


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x · weightᵀ + bias, every sum in one order whatever x's number of rows; x [..., width], weight [rows, width]."""
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    if x.device.type == "cpu":
        from quire.kernels.cpu.linear import linear_of_any as product
    else:
        from quire.kernels.triton.linear import linear as product
    product(rows, weight, bias, out)
    return out.view(*x.shape[:-1], weight.shape[0])


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return linear(a, b.t())


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return linear(a, b.t(), bias) if bias.shape == b.shape[1:] else linear(a, b.t()) + bias


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack([_mm(x, y) for x, y in zip(a, b, strict=True)])


def _baddbmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _bmm(a, b) + c


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Rows offs[e − 1] … offs[e] − 1 of x [rows, width] times weight[e], [width, columns]."""
    out = x.new_zeros(x.shape[0], weight.shape[-1])
    begin = 0
    for expert, end in enumerate(offs.tolist()):
        if end > begin:
            out[begin:end] = _mm(x[begin:end], weight[expert])
        begin = end
    return out


def _product(function: Operator) -> Operator:
    """For products of tensors of one dtype, without factors."""

    def choose(*args: Any, **kwargs: Any) -> Any:
        dtypes = {x.dtype for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()}
        plain = len(dtypes) == 1 and dtypes <= set(COMPUTE_DTYPES)
        plain &= not any(isinstance(x, torch.dtype) for x in args)
        plain &= all(value == 1 for name, value in kwargs.items() if name in ("alpha", "beta"))
        return function if plain else NotImplemented

    return choose


def _choose_grouped(
    x: torch.Tensor, weight: torch.Tensor, offs: Any = None, *rest: Any, **options: Any
) -> Any:
    odd = (
        offs is None
        or x.dim() != 2
        or weight.dim() != 3
        or any(v is not None for v in (*rest, *options.values()))
    )
    return NotImplemented if odd else _product(_grouped_mm)(x, weight)


# --- functions of one number ------------------------------------------------------------------------------


def _in_float32(function: Operator) -> Operator:
    """Computed in float32 and rounded once, as torch does it."""

    def wide(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return function(x.float(), *args, **kwargs).to(x.dtype)  # type: ignore[no-any-return]

    return wide


def _of_one(function: Operator) -> Operator:
    wide = _in_float32(function)

    def choose(x: torch.Tensor, *_: Any, **__: Any) -> Any:
        if x.device.type == "cuda":
            return None  # a GPU has one code for all elements
        if x.dtype not in COMPUTE_DTYPES:
            return NotImplemented
        return function if x.dtype == torch.float32 else wide

    return choose


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e⁻ˣ)."""
    return x.neg().exp_().add_(1).reciprocal_()


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + e⁻ˣ)."""
    below = x.neg().exp_().add_(1)
    return torch.div(x, below, out=below)


def gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """x · Φ(x), or the approximation of Φ by tanh."""
    if approximate == "none":
        twice = (x * math.sqrt(0.5)).erf_()
    else:
        twice = (x * x).mul_(x).mul_(0.044715).add_(x).mul_(math.sqrt(2 / math.pi)).tanh_()
    return twice.add_(1).mul_(0.5).mul_(x)


def _softplus(x: torch.Tensor, beta: float = 1, threshold: float = 20) -> torch.Tensor:
    scaled = x * beta
    return torch.where(scaled > threshold, x, scaled.exp().log1p_() / beta)


def _choose_rsqrt(x: torch.Tensor) -> Any:
    # Of 16-bit numbers torch rounds the root first, in whole vectors.
    return None if x.dtype == torch.float32 or x.device.type == "cuda" else _in_float32(torch.rsqrt)


def _choose_pow(x: Any, exponent: Any) -> Any:
    if isinstance(x, torch.Tensor) and not isinstance(exponent, torch.Tensor):
        if exponent in _EXACT_POWERS or (exponent == -0.5 and x.dtype == torch.float32):
            return None
        return _in_float32(torch.pow) if exponent == -0.5 else NotImplemented
    if not isinstance(x, torch.Tensor) and x > 0 and exponent.dtype == torch.float32:
        return _power_of_a_number
    return NotImplemented


def _power_of_a_number(base: float, exponent: torch.Tensor) -> torch.Tensor:
    return (exponent.double() * math.log(base)).exp_().to(exponent.dtype)


def _choose_add(x: Any, y: Any, *, alpha: Any = 1) -> Any:
    return None if alpha == 1 else NotImplemented  # one rounding or two, in 16 bits


def _choose_mul(x: Any, y: Any) -> Any:
    both_complex = all(isinstance(v, torch.Tensor) and v.is_complex() for v in (x, y))
    return _multiply_complex if both_complex else None


def _multiply_complex(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    (a, b), (c, d) = (torch.view_as_real(v).unbind(-1) for v in (x, y))
    return torch.view_as_complex(torch.stack([a * c - b * d, a * d + b * c], -1))


# --- sums -------------------------------------------------------------------------------------------------


def _sum(x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
    [dim] = dim
    x = x if dtype is None else x.to(dtype)
    if dim % x.dim() == x.dim() - 1:
        return _sum_rows(x, keepdim)
    first, *others = x.unbind(dim)
    total = first.to(torch.promote_types(x.dtype, torch.float32))
    for other in others:
        total = total + other
    total = total.to(x.dtype)
    return total.unsqueeze(dim) if keepdim else total


def _mean(x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
    [last] = dim
    x = x if dtype is None else x.to(dtype)
    total = _sum(x.to(torch.promote_types(x.dtype, torch.float32)), dim, keepdim)
    return total.div_(int(x.shape[last])).to(x.dtype)


def _sum_rows(x: torch.Tensor, keepdim: bool) -> torch.Tensor:
    total: torch.Tensor
    if x.device.type != "cpu":
        from quire.kernels.triton.linear import row_sums

        total = row_sums(x)
    else:  # a second row keeps the first from being split
        rows = x.reshape(-1, x.shape[-1])
        total = torch.cat([rows, rows[:1]]).sum(-1)[:-1].view(x.shape[:-1])
    return total.unsqueeze(-1) if keepdim else total


def _choose_sum(own: Operator, function: Operator) -> Operator:
    def choose(x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        if not dim or len(dim) > 1 or x.is_complex():
            return NotImplemented
        width = x.shape[dim[0]]
        if dim[0] % x.dim() != x.dim() - 1:
            return function if function is _sum and width <= _MOST_SUMMANDS else NotImplemented
        if x.device.type != "cpu" or width >= _SPLIT_WIDTH:
            return function
        # Rows that do not lie in order are summed several at once, where there are several.
        return None if x.stride(-1) == 1 or width == 1 else _of_contiguous(own)

    return choose


def _of_contiguous(function: Operator) -> Operator:
    return lambda x, *args, **kwargs: function(x.contiguous(), *args, **kwargs)


def _choose_row_wise(x: torch.Tensor, dim: int, *_: Any, **__: Any) -> Any:
    """For softmax and running sums over rows, which torch computes one by one."""
    return None if dim % x.dim() == x.dim() - 1 else NotImplemented


def _choose_index_put(x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    return NotImplemented if accumulate else None


def _choose_scatter(x: Any, dim: Any, index: Any, source: Any, *, reduce: Any = None) -> Any:
    return None if reduce is None else NotImplemented


# What chooses for an operator: a replacement, None for the operator itself, or NotImplemented.
_CHOICES: dict[str, Operator] = {
    "linear": _product(linear),
    "mm": _product(_mm),
    "addmm": _product(_addmm),
    "bmm": _product(_bmm),
    "baddbmm": _product(_baddbmm),
    "_grouped_mm": _choose_grouped,
    "transformers::grouped_mm_fallback": _choose_grouped,
    "sigmoid": _of_one(sigmoid),
    "silu": _of_one(silu),
    "gelu": _of_one(gelu),
    "softplus": _of_one(_softplus),
    "rsqrt": _choose_rsqrt,
    "pow": _choose_pow,
    "add": _choose_add,
    "sub": _choose_add,
    "mul": _choose_mul,
    "sum": _choose_sum(torch.sum, _sum),
    "mean": _choose_sum(torch.mean, _mean),
    "index_put": _choose_index_put,
    "scatter": _choose_scatter,
    "softmax": _choose_row_wise,
    "_softmax": _choose_row_wise,
    "log_softmax": _choose_row_wise,
    "_log_softmax": _choose_row_wise,
    "cumsum": _choose_row_wise,
}
