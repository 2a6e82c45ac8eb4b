"""The GPU backend: paged attention in Triton, for NVIDIA chips from sm_80 and AMD's gfx942.

With TRITON_INTERPRET=1 in the environment it takes CPU tensors and runs in Triton's interpreter, for tests. Where that
computes bfloat16 wrongly, as Triton's own does, bfloat16 is refused.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quire.errors import UnsupportedError
from quire.kernels.call import AttentionCall, BoundCall
from quire.kernels.triton import forecast, hopper, tune
from quire.kernels.triton.attend import Launch
from quire.kernels.triton.device_plan import DevicePlan, PartialShape
from quire.kernels.triton.interpreted import INTERPRETED, rounds_as_a_gpu
from quire.kernels.triton.store import bind_write
from quire.planning.work_list import Capacity, StepPlan, TileShape, Tiling
from quire.spec import AttentionSpec

__all__ = ["TAKES_DEVICE_TABLES", "bind", "bind_write", "prepare", "reserve", "tiling", "why_not"]

# A page table on the plan's device stays there: ``DevicePlan.fill`` copies it.
TAKES_DEVICE_TABLES = True


def why_not(spec: AttentionSpec, device: torch.device) -> str | None:
    """It needs a GPU with matrix units for bfloat16, and tiles that fit its registers."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f'it needs a GPU; got tensors on {device}. Fix: device="cuda", or backend="auto"'
    if spec.value_dim is not None:
        return f'values must be as wide as keys; got value_dim={spec.value_dim}. Fix: backend="reference"'
    if device.type == "cpu" and spec.dtype == torch.bfloat16 and not rounds_as_a_gpu():
        return (
            "Triton's interpreter adds the bits of bfloat16 numbers instead of their values. "
            'Fix: a GPU, dtype float16 or float32, or backend="cpu" or "reference"'
        )
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


def _tiles(spec: AttentionSpec, chip: tune.Chip, max_q_len: int, batch: int) -> tuple[tune.Tile, tune.Tile]:
    """Those of decode and of the portable prefill."""
    few_rows = max_q_len * spec.group_size <= tune.MIN_COLUMNS
    many_items = batch * spec.num_kv_heads >= tune.MANY_ITEMS * chip.multiprocessors
    return tune.decode_tile(spec, chip, few_rows, many_items), tune.prefill_tile(spec, chip)


def tiling(spec: AttentionSpec, device: torch.device, batch: int) -> Tiling:
    """A share per worker that the chip holds at once; queries that fit the smallest tile count as decode."""
    chip = tune.chip_of(device)
    decode, prefill = _tiles(spec, chip, tune.MIN_ROWS, batch)
    prefill_shape = TileShape(
        prefill.rows // spec.group_size, prefill.kv_tokens, chip.multiprocessors * tune.PREFILL_WAVES
    )
    tile_cost = 0
    if hopper.why_not(spec, chip) is None:
        prefill_shape, tile_cost = hopper.tile_shape(spec, chip), hopper.TILE_COST
    return Tiling(
        num_workers=chip.multiprocessors * decode.workers_per_sm,
        decode=TileShape(
            decode.rows // spec.group_size,
            decode.kv_tokens,
            part_cost=tune.PART_COST,
            item_cost=tune.ITEM_COST,
        ),
        prefill=prefill_shape,
        decode_max_q_len=decode.rows // spec.group_size,
        whole_tiles=True,
        rows_stand_alone=True,
        prefill_tile_cost=tile_cost,
    )


class Reserved(NamedTuple):
    """Memory for the plans of a capacity, and the launches that read it."""

    plan: DevicePlan
    launches: list[Launch]  # decode, prefill or both
    tiles: tuple[tune.Tile, tune.Tile]  # decode's and the portable prefill's
    why_not_hopper: str | None


class _Prepared(NamedTuple):
    spec: AttentionSpec
    step: StepPlan
    device: torch.device
    reserved: Reserved

    @property
    def notes(self) -> list[str]:
        """For plan.explain(): each launch, and which kernel takes the prefill."""
        spec, step, device, reserved = self
        rates, lines = forecast.rates_of(device), []
        decode, prefill = reserved.tiles
        if step.decode.num_items:
            lines.append(forecast.describe("decode", spec, decode, step.decode, step.causal, rates))
        if step.prefill.num_items:
            by_hopper = reserved.why_not_hopper is None
            # What is measured of prefill is Hopper's.
            tile, known = (hopper.TILE, rates) if by_hopper else (prefill, None)
            lines.append(forecast.describe("prefill", spec, tile, step.prefill, step.causal, known))
            lines.append(hopper.note(reserved.why_not_hopper))
        return lines


def reserve(spec: AttentionSpec, capacity: Capacity, device: torch.device) -> Reserved:
    """Room for every step within a capacity, and its launches: a decode, a prefill or both."""
    chip = tune.chip_of(device)
    decode, prefill = tiles = _tiles(spec, chip, capacity.max_q_len, capacity.batch)
    reason = hopper.why_not(spec, chip) or hopper.why_not_rules(capacity)
    block_dim = tune.block_dim(spec.head_dim)
    shapes = PartialShape(decode.rows, block_dim), PartialShape(prefill.rows, block_dim)
    plan = DevicePlan.reserve(capacity, shapes, device)
    launches = [
        Launch(spec, capacity, plan, work, tile, phases, device, phases == 2 and reason is None)
        for work, tile, phases in ((plan.decode, decode, 1), (plan.prefill, prefill, 2))
        if work is not None
    ]
    return Reserved(plan, launches, tiles, reason)


def prepare(
    spec: AttentionSpec, step: StepPlan, device: torch.device, reserved: Reserved | None = None
) -> _Prepared:
    """The plan on the device, and the launches it needs, or those of what is reserved."""
    reserved = reserved or reserve(spec, step.capacity, device)
    reserved.plan.fill(step)
    return _Prepared(spec, step, device, reserved)


def _check_strides(call: AttentionCall) -> None:
    """Places in a page are computed in 32 bits, those of pages in 64."""
    for name, pages in (("k_pages", call.k_pages), ("v_pages", call.v_pages)):
        if pages.shape[2] * pages.stride(2) >= 2**31:
            raise UnsupportedError(
                f"{name} must have a page's slots within 2^31 elements; got {pages.shape[2]} slots that lie "
                f'{pages.stride(2)} apart. Fix: a copy in a KVPool\'s order, or backend="reference"'
            )


def bind(prepared: _Prepared, call: AttentionCall) -> BoundCall:
    """A plan's launches for tensors of this call's layout, compiled on first use.

    Raises:
        UnsupportedError: a page whose slots lie further apart than 32 bits can say.
    """
    _check_strides(call)
    bound = [launch.bind(call) for launch in prepared.reserved.launches]
    if len(bound) == 1:
        return bound[0]

    def run(*tensors: torch.Tensor | None) -> None:
        for launch in bound:
            launch(*tensors)

    return run
