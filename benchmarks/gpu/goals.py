"""What was set out for on an H200, beside what a run measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.gpu.jobs import Row
from benchmarks.gpu.suite import MIXED, SKEWED_LABEL

DECODE_TB_PER_S = {"8x32k:1": 4.2, "8x4k:1": 3.4, "8x1k:1": 2.0}  # bfloat16, page 16
PREFILL_TFLOP_PER_S = {
    "prefill": 600,
    "portable prefill": 480,
}  # that of an H200 by Hopper's own kernel, or not
LONG_PREFILL = ("1x8k:8k", "1x16k:16k", "1x32k:32k")
QUANTIZED_SPEEDUP = 1.6  # over bfloat16 at 8x32k
PAGE_16_OVER_128, SKEWED_OVER_BALANCED = 1.05, 1.1


def goals(rows: Sequence[Row]) -> list[str]:
    """One line per goal whose rows are there."""
    time = {
        (row["section"], row["case"], row["page_size"], row.get("kv_dtype") or ""): row["median_us"]
        for row in rows
        if row.get("median_us")
        and row.get("heads") == "32/8x128"
        and row["section"] in ("decode", "prefill", "mixed")
    }
    rate = {
        (row["section"], row["case"]): row
        for row in rows
        if row.get("median_us") and row.get("page_size") == 16 and not row.get("kv_dtype")
        and row.get("heads") == "32/8x128"
    }  # fmt: skip

    def lines() -> Iterator[str]:
        for case, goal in DECODE_TB_PER_S.items():
            if row := rate.get(("decode", case)):
                yield f"{case} {row['tb_per_s']:.2f} TB/s (≥ {goal})"
        for section, goal in PREFILL_TFLOP_PER_S.items():
            for case in LONG_PREFILL:
                if row := rate.get((section, case)):
                    yield f"{section} {case} {row['tflop_per_s']:.0f} TFLOP/s (≥ {goal})"
        ratios = [
            time[key] / time["decode", key[1], 128, ""]
            for key in time
            if key[::2] == ("decode", 16) and not key[3] and ("decode", key[1], 128, "") in time
        ]
        if ratios:
            yield f"page 16 takes at most {max(ratios):.3f} × page 128 (≤ {PAGE_16_OVER_128})"
        for kv_dtype in ("int8", "fp8_e4m3"):
            pair = [time.get(("decode", "8x32k:1", 16, kv)) for kv in ("", kv_dtype)]
            if pair[0] and pair[1]:
                yield f"{kv_dtype} {pair[0] / pair[1]:.2f} × bf16 at 8x32k (≥ {QUANTIZED_SPEEDUP})"
        pair = [time.get(("decode", case, 16, "")) for case in (SKEWED_LABEL, "64x4k:1")]
        if pair[0] and pair[1]:
            yield f"skewed {pair[0] / pair[1]:.3f} × balanced (≤ {SKEWED_OVER_BALANCED})"
        parts = [time.get(("mixed", label, 16, "")) for label in MIXED.values()]
        if parts[0] and parts[1] and parts[2]:
            yield f"mixed {parts[0] / (parts[1] + parts[2]):.3f} × its parts one after the other"

    return list(lines())
