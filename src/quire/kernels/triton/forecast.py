"""A plan's launches in words: kernel, tile, stages, and the time they should take on chips that were measured."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from quire.kernels.triton.tune import Tile
from quire.planning.work_list import WorkList
from quire.spec import AttentionSpec


class Rates(NamedTuple):
    """What long steps reached on a chip (benchmarks/results), and what every launch costs beside."""

    decode_bytes: float  # read in a second
    prefill_flops: float  # a second, bfloat16, by Hopper's kernel
    launch: float  # seconds


# By what the driver calls the chip.
MEASURED = {
    "NVIDIA H200": Rates(4.4e12, 570e12, 9e-6),
    "NVIDIA H100 80GB HBM3": Rates(2.9e12, 590e12, 9e-6),
}


def rates_of(device: torch.device) -> Rates | None:
    """The rates of the chip behind a device, if it was measured."""
    return MEASURED.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def describe(
    name: str, spec: AttentionSpec, tile: Tile, work: WorkList, causal: bool, rates: Rates | None
) -> str:
    """One kernel's launch: its tile, and its expected time."""
    shape = (
        f"{name} tile: {tile.rows} rows × {tile.kv_tokens} keys, {tile.num_warps} warps, {tile.num_stages} stages, "
        f"workers per multiprocessor: {tile.workers_per_sm}"
    )
    if rates is None:
        return f"{shape}; no expected time, as this chip was not measured"
    seconds = rates.launch + (
        read_bytes(spec, work) / rates.decode_bytes
        if name == "decode"
        else flops(spec, work, causal) / rates.prefill_flops
    )
    rate = (
        f"{rates.decode_bytes / 1e12:.1f} TB/s"
        if name == "decode"
        else f"{rates.prefill_flops / 1e12:.0f} TFLOP/s"
    )
    return f"{shape}; expected {seconds * 1e6:.0f} µs a layer at {rate}, the rate measured of bfloat16"


def read_bytes(spec: AttentionSpec, work: WorkList) -> int:
    """Keys, values and their scales, counted each time an item reads them."""
    return int(work.kv_tokens_per_worker().sum()) * spec.bytes_per_token


def flops(spec: AttentionSpec, work: WorkList, causal: bool) -> int:
    """4 · head_dim per query head and visible (query, key) pair; windows hide nothing here."""
    q_len, position = work.column("q_len"), work.column("q_position")
    begin, end = work.column("kv_begin"), work.column("kv_end")
    if causal:
        row = np.arange(q_len.sum()) - np.repeat(np.cumsum(q_len) - q_len, q_len)
        seen = np.minimum(np.repeat(end, q_len), np.repeat(position, q_len) + row + 1) - np.repeat(
            begin, q_len
        )
        pairs = np.maximum(seen, 0).sum()
    else:
        pairs = (q_len * (end - begin)).sum()
    return 4 * spec.head_dim * spec.group_size * int(pairs)
