"""When waking threads pays: what work takes one thread, and what waking others takes, at rest and on a busy machine.

Estimates decide about speed alone. A plan's number of shares follows from its lengths, so that the same input keeps its
bits; how many threads then run the shares changes none.

It is one thread or all of them. A team smaller than the last is no cheaper: OpenMP's GNU runtime ends the threads that
it has no place for and starts new ones for the next (which is why torch does not ask for fewer either).

On a busy machine a woken thread may have to wait for a core, for milliseconds, and all others wait for it. Nothing says
so beforehand. A call of little work that took LATE longer than expected is therefore taken for a sign: one thread does
all little work for the time of CALM, after which a call tries again. A wait for Python's lock looks the same.
"""

from __future__ import annotations

import time

from quire.spec import AttentionSpec

# Nanoseconds. Measured on two cores of a Xeon (GCC's OpenMP, machine at rest): an empty parallel call of two threads
# takes 0.8 µs more than one of one thread while the threads still spin, 11 µs more once they sleep, which is
# 2 ms after the last call, and 60 µs more after 20 ms. Beside a process that keeps one core busy it may take 3 ms.
PAYS = 10_000  # work that takes one thread less is not shared: two would gain less than half of it
LITTLE = 1_000_000  # what one thread does alone on a busy machine: less than waiting for a core may take
LATE = 500_000
CALM = 250_000_000

# What one core does in a nanosecond with data in its caches, to the nearest round number.
BYTES_READ, OPERATIONS = 20, 50

_calm_until = 0


def reading_takes(nbytes: int) -> float:
    """Nanoseconds of one thread."""
    return nbytes / BYTES_READ


def multiplying_takes(products: int) -> float:
    """Nanoseconds of one thread for so many products, each added to a sum."""
    return 2 * products / OPERATIONS


def key_takes(spec: AttentionSpec) -> float:
    """Nanoseconds of one thread for one query token with its group's heads against one KV token."""
    return max(reading_takes(spec.bytes_per_token), multiplying_takes(2 * spec.group_size * spec.head_dim))


def stays_calm(nanoseconds: float) -> bool:
    """Whether this is little work, soon after little work took long."""
    return nanoseconds < LITTLE and _calm_until > 0 and time.perf_counter_ns() < _calm_until


def note(nanoseconds: float, took: int) -> None:
    """Learn from a call on several threads: what it was expected to take one thread, and what it took."""
    global _calm_until
    if nanoseconds < LITTLE and took > nanoseconds + LATE:
        _calm_until = time.perf_counter_ns() + CALM
