"""Time other shapes of layers and steps than the README's, by the same runner: one thing changed at a time.

Example:
    {prog} --out shapes.csv          # any option of benchmarks.attention
"""

from __future__ import annotations

import sys

from benchmarks import attention, environment

CASES = [
    "8x2k:1,8x2k:1@page1,8x2k:1@page8,8x2k:1@page64,8x2k:1@page256",
    "8x2k:1@32/32x128", "8x2k:1@64/8x128", "8x2k:1@32/1x128",
    "8x2k:1@32/8x64", "8x2k:1@32/8x96", "8x2k:1@32/8x256",
    "8x2k:1@float16", "8x8k:1,8x8k:1@int8,8x8k:1@fp8_e4m3,8x8k:1@fp8_e5m2",
    "2x4k:512+16x1k:1,2x4k:512,16x1k:1",  # a mixed step, and its two parts apart
    "1x16k:1+63x256:1,64x508:1",  # one sequence longer than all others, and as many tokens dealt evenly
]  # fmt: skip
# What is compared across cases that take turns: a case, and those whose times together it is set beside.
COMPARISONS = {
    "8x2k:1@page1": ["8x2k:1"],
    "8x2k:1@page8": ["8x2k:1"],
    "8x2k:1@page64": ["8x2k:1"],
    "8x2k:1@page256": ["8x2k:1"],
    "8x8k:1@int8": ["8x8k:1"],
    "8x8k:1@fp8_e4m3": ["8x8k:1"],
    "8x8k:1@fp8_e5m2": ["8x8k:1"],
    "2x4k:512+16x1k:1": ["2x4k:512", "16x1k:1"],
    "1x16k:1+63x256:1": ["64x508:1"],
}
PEERS = ["quire", "sdpa, contiguous"]


def main() -> int:
    """As `benchmarks.attention` with these cases and peers; options given override them."""
    typed = sys.argv[1:]
    command = environment.command_line("benchmarks.shapes", typed)
    return attention.main([*CASES, "--peers", *PEERS, *typed], "python -m benchmarks.shapes", command)


if __name__ == "__main__":
    sys.exit(main())
