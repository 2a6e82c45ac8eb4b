"""The numbers that the attention kernels are specialised for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quire.kernels.compile import compile_time
from quire.kernels.cpu.simd.integers import has_byte_products, has_short_products
from quire.kernels.cpu.simd.llvm import LANES
from quire.kernels.cpu.simd.memory import BF16, BYTES, E4M3, E5M2, F16, F32, INT8
from quire.kernels.cpu.simd.pairs import EIGHT_BITS, LINE, PAIRED, has_pair_products
from quire.spec import LARGEST

CACHE_LINE = 64

DTYPE_CODES = {
    torch.float32: F32,
    torch.float16: F16,
    torch.bfloat16: BF16,
    torch.int8: INT8,
    torch.float8_e4m3fn: E4M3,
    torch.float8_e5m2: E5M2,
}


@compile_time
class Config(NamedTuple):
    """What a kernel is specialised for. Every field and property is a compile-time number inside the kernel."""

    q_dtype: int  # dtype codes of memory.py
    kv_dtype: int
    head_dim: int
    heads: int = 1  # decode: query heads of one tile, at most ``most_heads``
    amx: int = 0  # prefill: whether products are taken by AMX's tile registers, where ``fits_amx``

    @property
    def vectors(self) -> int:
        """Whole vectors in a row of head_dim elements."""
        return self.head_dim // LANES

    @property
    def tail(self) -> int:
        """Elements of a row behind its whole vectors."""
        return self.head_dim % LANES

    @property
    def pairs(self) -> int:
        """Whether decode multiplies bfloat16 pairs: where the CPU is fast at it and bfloat16 is exact."""
        exact = self.q_dtype == BF16 and self.kv_dtype in (BF16, *EIGHT_BITS)
        read_at_once = PAIRED if self.kv_dtype == BF16 else LINE
        return int(exact and self.head_dim % read_at_once == 0 and has_pair_products())

    @property
    def converts(self) -> int:
        """Whether decode converts a block's rows to bfloat16 pairs; with ``integers``, only blocks that need it."""
        return int(self.pairs and self.kv_dtype != BF16)

    @property
    def integers(self) -> int:
        """Whether decode multiplies int8 pages as integers. Rows beyond 512 could overflow a score's 32 bits."""
        whole = self.head_dim % LINE == 0 and self.head_dim <= 512
        fits = self.q_dtype == BF16 and self.kv_dtype == INT8 and whole
        return int(fits and (has_short_products() or has_byte_products()))

    @property
    def shorts(self) -> int:
        """Whether these are integers of 16 bits, two to a lane; else they are bytes, four to a lane."""
        return int(self.integers and has_short_products())

    @property
    def lines(self) -> int:
        """Whole lines of bytes in a row where decode multiplies bytes; 0 elsewhere, so that its loops are empty."""
        return self.head_dim // LINE if self.integers and not self.shorts else 0

    @property
    def short_vectors(self) -> int:
        """Vectors of shorts in a row where decode multiplies them; 0 elsewhere."""
        return self.head_dim // (2 * LANES) if self.shorts else 0

    @property
    def fits_amx(self) -> int:
        """Whether AMX's tile registers can take prefill's products: of bfloat16 in whole tiles."""
        return int(LANES == 16 and self.q_dtype == self.kv_dtype == BF16 and self.head_dim % PAIRED == 0)

    @property
    def prefill_pairs(self) -> int:
        """Whether prefill multiplies pairs: pages have to be bfloat16 themselves."""
        return int(self.amx or (self.pairs and self.kv_dtype == BF16))

    @property
    def prefill_parts(self) -> int:
        """Vectors of pairs in a row that prefill reads."""
        return self.head_dim // PAIRED

    @property
    def steps(self) -> int:
        """Steps along head_dim that prefill takes for a score."""
        return self.head_dim // 2 if self.prefill_pairs else self.head_dim

    @property
    def parts(self) -> int:
        """Whole vectors, of pairs or of single numbers, in a row."""
        return self.head_dim // (PAIRED if self.pairs else LANES)

    @property
    def part_bytes(self) -> int:
        """Bytes of a page's row that one such vector is loaded from."""
        return (PAIRED if self.pairs else LANES) * BYTES[self.kv_dtype]

    @property
    def line_parts(self) -> int:
        """Such vectors in a cache line."""
        return max(1, CACHE_LINE // self.part_bytes)

    @property
    def lined_parts(self) -> int:
        """Such vectors of a row that fill whole cache lines, where the row begins with one."""
        return self.parts // self.line_parts * self.line_parts

    @property
    def halved(self) -> int:
        """Whole vectors that come two by two, as the even and the odd elements of a bfloat16 row: see ``products``."""
        return self.vectors // 2 * 2 if self.kv_dtype == BF16 and not self.pairs else 0

    @property
    def at_once(self) -> int:
        """Tokens whose values are multiplied at once."""
        if self.integers:
            return 2 if self.shorts else 4
        return 2 if self.pairs else 1

    @property
    def most_heads(self) -> int:
        """Query heads that a decode tile may have: a vector of scores holds all tokens that are multiplied at once."""
        return LANES // self.at_once

    @property
    def kv_largest(self) -> int:
        """The largest value of a quantised page's dtype; 0 where pages are not quantised."""
        return next((int(LARGEST[dtype]) for dtype in LARGEST if DTYPE_CODES[dtype] == self.kv_dtype), 0)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in float32 scratch, padded to whole vectors."""
        return -(-self.head_dim // LANES) * LANES * 4

    @property
    def padded_heads(self) -> int:
        """Heads of a decode tile rounded up to a power of two, so that vectors of scores hold whole tokens."""
        return 1 << (self.heads - 1).bit_length()

    @property
    def tokens(self) -> int:
        """Tokens whose scores fill one vector in decode."""
        return LANES // self.padded_heads

    @property
    def strip(self) -> int:
        """Output vectors per head that decode accumulates at once: as many as divide the row and fit registers."""
        most, least = LANES // (self.heads * self.sums), 2 if self.shorts else 1  # shorts are zipped by twos
        return max(
            n for n in range(least, max(self.vectors, 1) + 1, least) if self.vectors % n == 0 and n <= most
        )

    @property
    def strips_step(self) -> int:
        """Output vectors that one round of its loop takes: two strips where one alone would begin at an even vector in
        one round and at an odd one in the next, which are loaded differently (``halved``)."""
        two = 2 * self.strip
        return two if self.halved and self.strip % 2 and self.vectors % two == 0 else self.strip

    @property
    def sums(self) -> int:
        """Registers of sums to an output vector: of bytes one by the weights' high bytes, one by the low ones."""
        return 2 if self.integers and not self.shorts else 1

    @property
    def strip_tile(self) -> int:
        """Registers that one such strip takes."""
        return self.heads * self.strip * self.sums
