"""From a contestant's times to the columns of its row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import records
from benchmarks.serving.cases import Case
from benchmarks.serving.floor import decode_step, floor_seconds

GIB = 1 << 30
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 100)  # of the times between tokens, kept for the plot
SKIPPED = "skipped"
COLUMNS = (
    "status", "note", "requests", "prompt_tokens", "new_tokens", "seconds", "tokens_per_s", "decode_tokens_per_s",
    "step_ms", "floor_ms", "of_floor", "first_token_p50_ms", "first_token_p99_ms", "between_p50_ms", "between_p99_ms",
    "peak_gib", "wasted", "preemptions", "ready_s", "regret", "allowed", "judged", "read_gb_per_s", "budget_gib",
    "between_ms", "memory",
)  # fmt: skip


def columns(**values: Any) -> records.Row:
    """All columns; empty where there is nothing to say."""
    return {name: str(values.get(name, "")) for name in COLUMNS}


def about(case: Case) -> dict[str, int]:
    """What was asked for."""
    return {
        "requests": len(case.asked),
        "prompt_tokens": sum(each.prompt_len for each in case.asked),
        "new_tokens": sum(each.new_tokens for each in case.asked),
    }


def is_complete(case: Case, result: dict[str, Any]) -> bool:
    """Whether every request got as many tokens as it asked for, and a time for each."""
    wanted = [each.new_tokens for each in case.asked]
    return [len(own) for own in result["tokens"]] == wanted == [len(own) for own in result["times"]]


def speeds(case: Case, result: dict[str, Any], itemsize: int, bytes_per_second: float) -> dict[str, str]:
    """Columns of a contestant whose texts are right."""
    times: list[list[float]] = result["times"]
    new = sum(each.new_tokens for each in case.asked)
    seconds = max(own[-1] for own in times)
    last_first = max(own[0] for own in times)
    first = [own[0] - each.arrival for own, each in zip(times, case.asked, strict=True)]
    between = between_tokens(times)
    # With the prompts read: what is decoded after the last first token, where that is still something.
    decoded = sum(at > last_first for own in times for at in own)
    found = {
        "seconds": f"{seconds:.4f}",
        "tokens_per_s": f"{new / seconds:.2f}",
        "decode_tokens_per_s": f"{decoded / (seconds - last_first):.2f}" if decoded else "",
        "first_token_p50_ms": _ms(percentile(first, 50)),
        "first_token_p99_ms": _ms(percentile(first, 99)),
        "peak_gib": f"{result['peak_bytes'] / GIB:.3f}",
        "wasted": f"{1 - result['filled_slots'] / max(result['allocated_slots'], 1):.4f}",
        "preemptions": str(result["preemptions"]),
        "ready_s": f"{result['ready_s']:.1f}",
        "memory": " ".join(f"{at:.3f}:{held / GIB:.4f}" for at, held in result["memory"]),
    }
    if between:
        found |= {
            "between_p50_ms": _ms(percentile(between, 50)),
            "between_p99_ms": _ms(percentile(between, 99)),
            "between_ms": " ".join(f"{at}:{_ms(percentile(between, at))}" for at in PERCENTILES),
        }
    step = decode_step(case, times)
    if step is not None:
        median, slots = step
        least = floor_seconds(case, itemsize, slots, bytes_per_second)
        found |= {"step_ms": _ms(median), "floor_ms": _ms(least), "of_floor": f"{median / least:.2f}"}
    return found


def between_tokens(times: Sequence[Sequence[float]]) -> list[float]:
    """Seconds between each token and the next of the same request, of all requests."""
    return [later - at for own in times for at, later in itertools.pairwise(own)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many per cent of them do not exceed: one that occurred, never between two."""
    return float(np.percentile(values, percent, method="inverted_cdf"))


def pairs(text: str) -> list[tuple[float, float]]:
    """What the columns between_ms and memory hold."""
    return [(float(at), float(value)) for at, value in (pair.split(":") for pair in text.split())]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"
