"""The GPU backend: paged attention in Triton, for NVIDIA chips from sm_80 and AMD's gfx942.

With TRITON_INTERPRET=1 in the environment it takes CPU tensors and runs in Triton's interpreter, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from quire.kernels.triton import forecast, hopper, tune
from quire.kernels.triton.attend import attend as attend_kernel
from quire.kernels.triton.device_plan import COLUMNS, DeviceWork, Section, move_to_device
from quire.kernels.triton.launch import INTERPRETED, Form, Options, addresses_of
from quire.kernels.triton.store import write
from quire.spec import QUANTIZED_DTYPES, AttentionSpec
from quire.work import AttentionCall, StepPlan, TileShape, Tiling, WorkList

_FORMATS = {dtype: name for name, dtype in QUANTIZED_DTYPES.items()}
WORD = 4  # one-byte elements to an int32
_FOLD_ROWS = 32  # of a prefill tile that a worker folds at a time
_FOLD_ELEMENTS = 4096  # of partial results that a worker folds at a time
_STORE_ELEMENTS = 4096  # of one token that a program of write_kv holds at a time


def why_not(spec: AttentionSpec, device: torch.device) -> str | None:
    """It needs a GPU with matrix units for bfloat16, and tiles that fit its registers."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f'it needs a GPU; got tensors on {device}. Fix: device="cuda", or backend="auto"'
    if spec.head_dim > tune.MAX_HEAD_DIM:
        return f'head_dim must be at most {tune.MAX_HEAD_DIM}; got {spec.head_dim}. Fix: backend="reference"'
    if spec.group_size > tune.MAX_GROUP:
        return (
            f"at most {tune.MAX_GROUP} query heads may share a KV head; got {spec.group_size}. "
            'Fix: backend="reference"'
        )
    chip = tune.chip_of(device)
    if chip.name == "cuda" and chip.capability < 80:
        return f'it needs compute capability 8.0; got {chip.capability / 10}. Fix: backend="reference"'
    if not tune.fits(spec, chip):
        return (
            f"the {spec.group_size} query heads of {spec.head_dim} that share a KV head must fit shared memory of "
            f'{chip.shared_bytes // tune.KIB} KiB three times over. Fix: a 16-bit dtype, or backend="reference"'
        )
    return None


def tiling(spec: AttentionSpec, device: torch.device) -> Tiling:
    """A share per worker that the chip holds at once; queries that fit the smallest tile count as decode."""
    chip = tune.chip_of(device)
    decode, prefill = tune.decode_tile(spec, chip), tune.prefill_tile(spec, chip)
    prefill_shape = TileShape(
        prefill.rows // spec.group_size, prefill.kv_tokens, chip.multiprocessors * tune.PREFILL_WAVES
    )
    tile_cost = 0
    if hopper.why_not(spec, chip) is None:
        prefill_shape, tile_cost = hopper.tile_shape(spec, chip), hopper.TILE_COST
    return Tiling(
        num_workers=chip.multiprocessors * decode.workers_per_sm,
        decode=TileShape(decode.rows // spec.group_size, decode.kv_tokens, part_cost=tune.PART_COST),
        prefill=prefill_shape,
        decode_max_q_len=decode.rows // spec.group_size,
        whole_tiles=True,
        rows_stand_alone=True,
        prefill_tile_cost=tile_cost,
    )


class Constants(NamedTuple):
    """What the attention kernel is compiled for, in the order of its arguments."""

    group: int
    head_dim: int
    page_size: int
    block_m: int
    block_n: int
    block_d: int
    fold_rows: int
    fold_parts: int
    item: int
    causal: bool
    window: bool
    softcap: bool
    plain: bool
    format: str
    packed: bool
    aligned: bool
    same_strides: bool
    transposed: bool
    invariant: bool
    overlaps: bool
    capability: int
    phases: int
    precision: str
    num_stages: int


@dataclass(frozen=True)
class _Launch:
    """One kernel's part of a plan."""

    work: DeviceWork
    sections: tuple[Section, ...]  # of the plan, behind the tensors of a call
    addresses: tuple[int, ...]
    constants: Constants
    options: Options
    forms: dict[Any, Form]  # by the form of a call's tensors
    hopper: hopper.Prefill | None = None  # takes the calls it can serve


# One kernel of a plan for calls of one layout: its form, None where Hopper's takes them, and the numbers it is given.
_Ready = tuple[_Launch, Form | None, tuple[float, ...]]


@dataclass(frozen=True)
class _Prepared:
    device: torch.device
    table_row: int
    window_left: int
    launches: tuple[_Launch, ...]
    ready: dict[Any, list[_Ready]]  # by a call's layout
    describe: Callable[[], list[str]]

    @property
    def notes(self) -> list[str]:
        """For plan.explain()."""
        return self.describe()


_Used = tuple[WorkList, tune.Tile, int]  # one kernel's work, tile and phases
_forms: dict[Any, dict[Any, Form]] = {}  # by what a plan compiles for


def prepare(spec: AttentionSpec, step: StepPlan, device: torch.device) -> _Prepared:
    """The plan on the device, and the launches it needs: decode, prefill or both."""
    chip, block_dim = tune.chip_of(device), tune.block_dim(spec.head_dim)
    tiles = (tune.decode_tile(spec, chip), tune.prefill_tile(spec, chip))
    used: list[_Used] = [
        (work, tile, phases)
        for work, tile, phases in zip((step.decode, step.prefill), tiles, (1, 2), strict=True)
        if len(work.items)
    ]
    plan = move_to_device(step, [(work, tile.rows, block_dim) for work, tile, _ in used], device)
    reason = hopper.why_not(spec, chip) or hopper.why_not_step(step)
    launches = []
    for work, (_, tile, phases) in zip(plan.work, used, strict=True):
        sections = (
            work.items, work.worker_indptr, work.arrivals, plan.cu_seqlens_q, plan.page_table,
            work.partial_out, work.partial_lse,
        )  # fmt: skip
        given = constants(spec, step, tile, phases, chip)
        options = Options.of(tile, given.overlaps)
        forms = _forms.setdefault((given, options, spec.dtype, device), {})
        own = None
        if phases == 2 and reason is None:
            own = hopper.Prefill(spec, work, plan.page_table, step.causal)
        addresses = tuple([section.address for section in sections])
        launches.append(_Launch(work, sections, addresses, given, options, forms, own))
    table_row = step.page_table.shape[1]
    describe = partial(_describe, spec, used, step.causal, device, reason)
    return _Prepared(device, table_row, step.window_left, tuple(launches), {}, describe)


def _describe(
    spec: AttentionSpec, used: list[_Used], causal: bool, device: torch.device, reason: str | None
) -> list[str]:
    """Each launch, and which kernel takes the prefill."""
    rates, lines = forecast.rates_of(device), []
    for work, tile, phases in used:
        if phases == 1:
            lines.append(forecast.describe("decode", spec, tile, work, causal, rates))
        elif reason is None:
            lines.append(forecast.describe("prefill", spec, hopper.TILE, work, causal, rates))
            lines.append(hopper.note(None))
        else:  # what is measured of prefill is Hopper's
            lines.append(forecast.describe("prefill", spec, tile, work, causal, None))
            lines.append(hopper.note(reason))
    return lines


def constants(
    spec: AttentionSpec, step: StepPlan, tile: tune.Tile, phases: int, chip: tune.Chip
) -> Constants:
    """What a step of this spec compiles the kernel for, a call of plain scores on a pool's pages given."""
    window, block_d = step.window_left >= 0, tune.block_dim(spec.head_dim)
    fold_rows = min(tile.rows, _FOLD_ROWS) if phases == 2 else tune.power_of_two(spec.group_size)
    return Constants(
        group=spec.group_size,
        head_dim=spec.head_dim,
        page_size=spec.page_size,
        block_m=tile.rows,
        block_n=tile.kv_tokens,
        block_d=block_d,
        fold_rows=fold_rows,
        fold_parts=max(1, _FOLD_ELEMENTS // (fold_rows * block_d)),
        item=COLUMNS,
        causal=step.causal,
        window=window,
        softcap=False,
        plain=True,
        format=spec.kv_dtype or "same",
        packed=spec.quantized and spec.dtype != torch.float32 and spec.head_dim % WORD == 0,
        aligned=not window and (tile.kv_tokens % spec.page_size == 0 or spec.page_size % tile.kv_tokens == 0),
        same_strides=True,
        transposed=tile.transposed,
        invariant=step.kv_split > 0,
        overlaps=phases == 1 and chip.overlaps_launches and not INTERPRETED,
        capability=chip.capability if chip.name == "cuda" else 0,
        phases=1 if window else phases,
        # Three products of tf32 halves carry float32's precision on the matrix units.
        precision="ieee" if chip.name == "hip" else "tf32x3",
        num_stages=tile.num_stages,
    )


def attend(prepared: _Prepared, call: AttentionCall) -> None:
    """Run a plan's launches on one layer's tensors."""
    tensors = (
        call.q, call.k_pages, call.v_pages, call.out, call.lse, call.k_scale, call.v_scale,
        call.alibi_slopes, call.sinks, call.tree_mask,
    )  # fmt: skip
    addresses, granted = addresses_of(tensors)
    layout = call.layout, granted
    ready = None if call.layout is None else prepared.ready.get(layout)
    if ready is None:
        ready = prepared.ready[layout] = _make_ready(prepared, call, tensors, granted)
    for part, form, numbers in ready:
        if form is None:
            assert part.hopper is not None
            part.hopper.launch(call)
        else:
            given = part.work.num_workers, prepared.device, (*addresses, *part.addresses), numbers
            form.launch(*given, partial(_all_tensors, part, tensors))


def _all_tensors(part: _Launch, tensors: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    return (*tensors, *(section.tensor for section in part.sections))


def _make_ready(
    prepared: _Prepared, call: AttentionCall, tensors: tuple[torch.Tensor | None, ...], granted: Any
) -> list[_Ready]:
    """How a plan's kernels are launched on tensors of this layout, compiled first if nobody has asked before."""
    mask, scale, factor, softcap = call.tree_mask, call.k_scale, call.scale, float(call.softcap)
    numbers = (
        factor, softcap, prepared.table_row, prepared.window_left,
        0 if mask is None else mask.stride(0), 0 if mask is None else mask.shape[1],
    )  # fmt: skip
    form = (
        call.q.stride(), call.k_pages.stride(), call.v_pages.stride(), call.out.stride(),
        None if call.lse is None else call.lse.stride(0), None if scale is None else scale.stride(),
        call.alibi_slopes is None, call.sinks is None, mask is None, softcap > 0, factor > 0,
        granted,
    )  # fmt: skip
    ready: list[_Ready] = []
    for part in prepared.launches:
        if part.hopper and hopper.why_not_call(call) is None:
            ready.append((part, None, numbers))
            continue
        compiled = part.forms.get(form)
        if compiled is None:
            compiled = part.forms[form] = _compile(part, call, _all_tensors(part, tensors), numbers)
        ready.append((part, compiled, numbers))
    return ready


def _compile(
    part: _Launch, call: AttentionCall, tensors: tuple[torch.Tensor | None, ...], numbers: tuple[float, ...]
) -> Form:
    """The kernel for tensors like these."""
    scale = call.k_scale
    k_head, *k_strides, _ = call.k_pages.stride()
    v_head, *v_strides, _ = call.v_pages.stride()
    packed = part.constants.packed and _holds_words(call, k_head, v_head, *k_strides, *v_strides)
    if packed:
        k_strides, v_strides = ([stride // WORD for stride in strides] for strides in (k_strides, v_strides))
    strides = (
        *call.q.stride()[:2], *call.out.stride()[:2], 0 if call.lse is None else call.lse.stride(0),
        k_head, *k_strides, v_head, *v_strides, *((0, 0, 0) if scale is None else scale.stride()),
    )  # fmt: skip
    constants = part.constants._replace(
        packed=packed,
        softcap=call.softcap > 0,
        plain=not call.softcap and call.alibi_slopes is None and call.scale > 0,
        same_strides=k_strides == v_strides,
    )
    return Form.compile(attend_kernel, tensors, numbers, (*strides, *constants), part.options)


def _holds_words(call: AttentionCall, *strides: int) -> bool:
    """Whether rows of one-byte elements can be read four at a time."""
    whole = call.k_pages.data_ptr() | call.v_pages.data_ptr()
    for stride in strides:
        whole |= stride
    return whole % WORD == 0


_writers: dict[Any, Form] = {}


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Write each token's K and V into its slot: one program per token."""
    tokens, heads, head_dim = k.shape
    if not tokens:
        return
    tensors = (k, v, k_pages, v_pages, k_scale, v_scale, slot_mapping)
    addresses, granted = addresses_of(tensors)
    key = (
        k.dtype, k_pages.dtype, k_pages.shape[2], heads, head_dim, k.device, slot_mapping.stride(0),
        k.stride(), v.stride(), k_pages.stride(), v_pages.stride(), None if k_scale is None else k_scale.stride(),
        granted,
    )  # fmt: skip
    form = _writers.get(key)
    if form is None:
        block_d = tune.block_dim(head_dim)
        block_h = min(tune.power_of_two(heads), max(1, _STORE_ELEMENTS // block_d))
        tail = (
            *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
            *((0, 0, 0) if k_scale is None else k_scale.stride()), slot_mapping.stride(0),
            heads, head_dim, k_pages.shape[2], block_h, block_d, _FORMATS.get(k_pages.dtype, "same"),
        )  # fmt: skip
        form = _writers[key] = Form.compile(write, tensors, (), tail, Options(num_warps=4, num_stages=1))
    form.launch(tokens, k.device, addresses, (), lambda: tensors)
