"""Linear layers of a few tokens, where every weight is read once, as it lies; and of any number in the same order.

    out[t, n] = Σ_k x[t, k] · w[n, k] + b[n]

A decode step multiplies a few tokens with all weights of a model, so it is bound by reading them. A matrix product
for many rows packs its operands first, which costs as much as this product itself; here a tile of LANES dot products,
``tokens`` × ``rows`` of w, runs along k with lanes on k: two rows of w serve eight tokens (four with AVX2), and w stays
as the model has it. The tokens of a tile are interleaved once, [k / LANES][token][LANES] in float32, so that they are
read in order, and while one tile is computed the rows of the next are prefetched. Where the CPU multiplies bfloat16
pairs (``pairs``), bfloat16 stays as it is, [k / 2 · LANES][token][LANES pairs], for half the multiplications.

Lane l of a dot product sums k = l, l + LANES, … in this order, and ``sum_rows`` adds up the lanes by one tree. Neither
depends on the tile, so a token has the same bits alone and among any others, on any number of threads.
``linear_of_any`` keeps to that order for any number of tokens.

Source: the register tile is the usual one of matrix products (Goto, van de Geijn, 10.1145/1356052.1356053), with
the packing of the large operand left out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
import torch

from quire.kernels.ahead import Job
from quire.kernels.compile import compile_time, compiled, part
from quire.kernels.cpu import wake
from quire.kernels.cpu.attend.config import DTYPE_CODES
from quire.kernels.cpu.attend.products import add_product
from quire.kernels.cpu.backend import borrow_scratch
from quire.kernels.cpu.many_tokens import PanelConfig, Panels, multiply_panels, scratch_bytes
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import BF16, BYTES, F32, load, load_head, prefetch, store, store_head
from quire.kernels.cpu.simd.pairs import PAIRED, has_pair_products, load_pairs
from quire.kernels.cpu.simd.vectors import add, fma, splat, sum_rows, tile
from quire.kernels.cpu.threads import parallel_for, run, threads_for

MAX_TOKENS = LANES // 2  # of one tile, where the weight has two rows
LEAST_ROWS = LANES  # a weight of fewer has no whole tile for one token, and needs tiles of more
# Up to how many tokens these kernels were measured to be faster than torch's; see docs/experiments.md.
FEW_TOKENS = {torch.float32: 24, torch.float16: 8, torch.bfloat16: 8}
# Features of x86 CPUs with which torch multiplies numbers of 16 bits as they are. Without them it widens them in each
# product, and is slower than these kernels for any number of tokens.
PRODUCTS_OF = {torch.float16: ("avx512fp16", "amx-fp16"), torch.bfloat16: ("avx512bf16", "amx-bf16")}
STREAMED_TOKENS = 24  # up to so many, a weight is read from memory once, as it lies, and not packed
CACHE_LINE = 64


@compile_time
class LinearConfig(NamedTuple):
    """What the kernel is specialised for."""

    dtype: int  # of x, weight, bias and out: a code of memory.py
    tokens: int  # of one tile: 1, 2, 4, 8, or 16 for a weight of one row
    pairs: int  # whether pairs of bfloat16 are multiplied: a row is then whole vectors of them

    @property
    def at_once(self) -> int:
        """Elements of a row in one vector."""
        return PAIRED if self.pairs else LANES

    @property
    def rows(self) -> int:
        """Rows of the weight in one tile."""
        return LANES // self.tokens


class Product(NamedTuple):
    """The tensors of one call: addresses, and strides in bytes. A bias of 0 means: none."""

    x: int
    x_token: int
    weight: int
    weight_row: int
    bias: int
    out: int
    out_token: int
    num_tokens: int
    num_rows: int
    width: int  # elements of a row of x and of the weight
    scratch: int
    scratch_bytes: int  # of one worker


@compiled
def multiply(cfg: Any, threads: int, workers: int, product: Product) -> None:
    """Run every worker's share of the weight's rows."""
    parallel_for(multiply_share, threads, workers, (cfg, workers, product))


@part
def multiply_share(worker: int, cfg: Any, workers: int, product: Product) -> None:
    """Consecutive tiles of rows, each against all tokens while it is in the cache."""
    sums = product.scratch + worker * product.scratch_bytes
    tokens = sums + LANES * 4
    vectors = (product.width + cfg.at_once - 1) // cfg.at_once
    tile_bytes = vectors * cfg.tokens * LANES * 4
    for first in range(0, product.num_tokens, cfg.tokens):
        interleave_tokens(cfg, product, first, tokens + first // cfg.tokens * tile_bytes)
    tiles = (product.num_rows + cfg.rows - 1) // cfg.rows
    for i in range(tiles * worker // workers, tiles * (worker + 1) // workers):
        row = min(i * cfg.rows, product.num_rows - cfg.rows)  # a last tile repeats rows of the one before
        ahead = cfg.rows * product.weight_row
        for first in range(0, product.num_tokens, cfg.tokens):
            multiply_tile(cfg, product, row, ahead, tokens + first // cfg.tokens * tile_bytes, sums)
            finish_tile(cfg, product, row, first, sums)
            ahead = 0


@part
def interleave_tokens(cfg: Any, product: Product, first: int, tokens: int) -> None:
    """Copy a tile's tokens to [k / LANES][token][LANES]; the last tile repeats its last token, and zeros fill rows."""
    step = cfg.at_once * BYTES[cfg.dtype]
    vectors, tail = product.width // cfg.at_once, product.width % cfg.at_once
    for t in range(cfg.tokens):
        source = product.x + min(first + t, product.num_tokens - 1) * product.x_token
        target = tokens + t * LANES * 4
        for i in range(vectors):
            store(F32, target + i * cfg.tokens * LANES * 4, load_vector(cfg, source + i * step))
        if tail:
            last = load_head(cfg.dtype, source + vectors * step, tail)
            store(F32, target + vectors * cfg.tokens * LANES * 4, last)


@part
def load_vector(cfg: Any, address: int) -> Any:
    """Elements of x or w, as pairs or as float32."""
    return load_pairs(BF16, address) if cfg.pairs else load(cfg.dtype, address)


@part
def multiply_tile(cfg: Any, product: Product, row: int, ahead: int, tokens: int, sums: int) -> None:
    """sums[t, r] = x_t · w_r of one tile."""
    products, weights = tile(LANES), tile(cfg.rows)
    for j in range(LANES):
        products[j] = splat(np.float32(0.0))
    step = cfg.at_once * BYTES[cfg.dtype]
    first = product.weight + row * product.weight_row
    vectors, tail = product.width // cfg.at_once, product.width % cfg.at_once
    for i in range(vectors):
        for r in range(cfg.rows):
            at = first + r * product.weight_row + i * step
            weights[r] = load_vector(cfg, at)
            prefetch(at + ahead)
        for t in range(cfg.tokens):
            x = load(F32, tokens + (i * cfg.tokens + t) * LANES * 4)
            for r in range(cfg.rows):
                j = t * cfg.rows + r
                products[j] = add_product(cfg, weights[r], x, products[j])
    if tail:
        for r in range(cfg.rows):
            weights[r] = load_head(cfg.dtype, first + r * product.weight_row + vectors * step, tail)
        for t in range(cfg.tokens):
            x = load(F32, tokens + (vectors * cfg.tokens + t) * LANES * 4)
            for r in range(cfg.rows):
                products[t * cfg.rows + r] = fma(weights[r], x, products[t * cfg.rows + r])
    store(F32, sums, sum_rows(products))


@part
def finish_tile(cfg: Any, product: Product, row: int, first: int, sums: int) -> None:
    """Add the bias and write the tile's sums into out."""
    for t in range(min(cfg.tokens, product.num_tokens - first)):
        total = load_head(F32, sums + t * cfg.rows * 4, cfg.rows)
        if product.bias:
            total = add(total, load_head(cfg.dtype, product.bias + row * BYTES[cfg.dtype], cfg.rows))
        out = product.out + (first + t) * product.out_token + row * BYTES[cfg.dtype]
        store_head(cfg.dtype, out, total, cfg.rows)


@functools.cache
def most_tokens(dtype: torch.dtype) -> int:
    """Up to how many tokens ``linear_of_any`` is faster than torch's product; 0 for a dtype that it does not take."""
    features = llvm.get_host_cpu_features()
    is_x86 = "sse2" in features
    if is_x86 and dtype in PRODUCTS_OF and not any(features.get(name) for name in PRODUCTS_OF[dtype]):
        return sys.maxsize
    return FEW_TOKENS.get(dtype, 0)


def compile_jobs(dtype: torch.dtype, widths: Iterable[int]) -> list[Job]:
    """Whatever layers of these widths run for as many tokens as `most_tokens` says."""
    jobs = compile_jobs_of_any(dtype, [(LANES, width) for width in widths], by_columns=False)
    is_any = most_tokens(dtype) > STREAMED_TOKENS
    return jobs if is_any else [job for job in jobs if job.function == multiply.__name__]


def compile_jobs_of_any(
    dtype: torch.dtype, shapes: Iterable[tuple[int, int]], *, by_columns: bool
) -> list[Job]:
    """Whatever ``linear_of_any`` runs for weights of these shapes, (rows, width), and any number of tokens.

    Args:
        by_columns: whether weights also lie as [width, rows].
    """
    few = {
        _config(dtype, width, tokens, rows)
        for rows, width in shapes
        for tokens in range(1, STREAMED_TOKENS + 1)
    }
    many = {PanelConfig(DTYPE_CODES[dtype], config.pairs, 0) for config in few}
    if by_columns:
        many.add(PanelConfig(DTYPE_CODES[dtype], 0, 1))
    product, panels = Product._make([0] * len(Product._fields)), Panels._make([0] * len(Panels._fields))
    return [
        *(Job.of(multiply_panels, config, 1, 1, panels) for config in sorted(many, reverse=True)),
        *(Job.of(multiply, config, 1, 1, product) for config in sorted(few, reverse=True)),
    ]


def _config(dtype: torch.dtype, width: int, tokens: int, rows: int = LANES) -> LinearConfig:
    least = LANES >> (min(rows, LANES).bit_length() - 1)  # a tile has no more rows than the weight
    tile_tokens = max(least, min(MAX_TOKENS, 1 << (tokens - 1).bit_length()))
    return LinearConfig(DTYPE_CODES[dtype], tile_tokens, _pairs(dtype, width))


def _pairs(dtype: torch.dtype, width: int) -> int:
    return int(dtype == torch.bfloat16 and width % PAIRED == 0 and has_pair_products())


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = x · weightᵀ + bias, accumulated in float32.

    Args:
        x: [tokens, width], last dimension contiguous; float32, float16 or bfloat16, like all others.
        weight: [rows, width], last dimension contiguous.
        bias: [rows], contiguous, or None.
        out: [tokens, rows], last dimension contiguous; written.
    Cost: the weight is read once for up to MAX_TOKENS tokens, and from the cache for more.
    """
    tokens, width = x.shape
    config = _config(x.dtype, width, tokens, weight.shape[0])
    tiles, vectors = -(-tokens // config.tokens), -(-width // config.at_once)
    # An odd number of lines apart, so that workers' tokens do not fight for the same sets of a shared cache.
    apart = (tiles * vectors * config.tokens + 2 | 1) * CACHE_LINE
    element, num_rows = x.element_size(), weight.shape[0]
    takes = max(
        wake.reading_takes(num_rows * width * element), wake.multiplying_takes(tokens * num_rows * width)
    )
    threads = threads_for(takes)
    product = Product(
        x=x.data_ptr(),
        x_token=x.stride(0) * element,
        weight=weight.data_ptr(),
        weight_row=weight.stride(0) * element,
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        out_token=out.stride(0) * element,
        num_tokens=tokens,
        num_rows=num_rows,
        width=width,
        scratch=borrow_scratch(threads * apart),
        scratch_bytes=apart,
    )
    run(multiply, config, threads, takes, threads, product)


def linear_of_any(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """The same for any number of tokens: a row of out has bits that depend on its row of x alone.

    Args:
        x: [tokens, width], float32, float16 or bfloat16, like all others; tokens and width may be 0.
        weight: [rows, width]. Copied where neither of its dimensions is contiguous.
        bias: [rows], or None.
        out: [tokens, rows], last dimension contiguous; written.
    Cost: of few tokens as ``linear``; of more, or where the weight lies as [width, rows], that of a usual matrix
        product: the weight is packed once for PANEL tokens.
    """
    tokens, width = x.shape
    if 0 in (*out.shape, width):
        out.zero_() if bias is None else out.copy_(bias)
        return
    x, bias = _by_rows(x), bias if bias is None else bias.resolve_neg().contiguous()
    by_columns = weight.stride(1) != 1 and weight.stride(0) == 1
    if weight.is_neg() or not (by_columns or weight.stride(1) == 1):
        weight = weight.resolve_neg().contiguous()
        by_columns = False
    if tokens <= STREAMED_TOKENS and not by_columns:
        linear(x, weight, bias, out)
        return
    pairs = 0 if by_columns else _pairs(x.dtype, width)
    config = PanelConfig(DTYPE_CODES[x.dtype], pairs, int(by_columns))
    # An odd number of lines apart, as above.
    lines = scratch_bytes(tokens, -(-width // config.at_once)) // CACHE_LINE | 1
    takes = wake.multiplying_takes(tokens * weight.shape[0] * width)
    threads, element = threads_for(takes), x.element_size()
    panels = Panels(
        x=x.data_ptr(),
        x_token=x.stride(0) * element,
        weight=weight.data_ptr(),
        weight_row=weight.stride(0) * element,
        weight_column=weight.stride(1) * element,
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        out_token=out.stride(0) * element,
        num_tokens=tokens,
        num_rows=weight.shape[0],
        width=width,
        scratch=borrow_scratch(threads * lines * CACHE_LINE),
        scratch_bytes=lines * CACHE_LINE,
    )
    run(multiply_panels, config, threads, takes, threads, panels)


def _by_rows(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, with elements of a row next to each other and no sign left to apply."""
    x = x.resolve_neg()
    return x if x.stride(1) == 1 else x.contiguous()
