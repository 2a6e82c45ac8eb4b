"""Time other shapes of layers and steps than the README's, by the same runner: one thing changed at a time.

Example:
    {prog} --out shapes.csv          # any option of benchmarks.attention
"""

from __future__ import annotations

import sys

from benchmarks import attention

CASES = [
    "8x2k:1",
    "8x2k:1@32/32x128", "8x2k:1@64/8x128", "8x2k:1@32/1x128",
    "8x2k:1@32/8x64", "8x2k:1@32/8x96", "8x2k:1@32/8x256",
    "8x2k:1@page1", "8x2k:1@page8", "8x2k:1@page64", "8x2k:1@page256",
    "2x4k:512+16x1k:1", "2x4k:512", "16x1k:1",  # a mixed step, and its two parts apart
    "1x16k:1+63x256:1", "64x508:1",  # one sequence longer than all others, and as many tokens dealt evenly
]  # fmt: skip
PEERS = ["quire", "sdpa, contiguous"]
ROUNDS = 7


def main() -> int:
    """As `benchmarks.attention` with these cases and peers; options given override them."""
    arguments = [*CASES, "--peers", *PEERS, "--rounds", str(ROUNDS), *sys.argv[1:]]
    return attention.main(arguments, "python -m benchmarks.shapes")


if __name__ == "__main__":
    sys.exit(main())
