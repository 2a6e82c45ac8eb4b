"""Where a decode step's time goes: timers at the engine's seams, put there for these steps and taken away again.

    schedule      choosing requests and pages                      pack      chunks to one packed step
    plan          lengths and page tables to a work list           launch    the rest of the model's forward on the host
    wait          until the device has done what was launched      sample    logits to tokens
    hand out      tokens to their requests

Kernels are counted by torch's profiler in steps of their own, as it slows down what it watches. On a GPU they run while
the host launches; on a CPU the host runs them itself, and launch holds what is not in them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as watch

from benchmarks.serving import contestants
from benchmarks.serving.cases import Case
from benchmarks.serving.shapes import make_model

PARTS = ("schedule", "pack", "plan", "launch", "wait", "kernels", "sample", "hand out")
OURS = "quire kernel: "  # marks what torch does not know as operators


def measure(case: Case, task: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of a decode step's parts, medians over steps in which all of a case's requests decode."""
    import quire

    dtype, device = getattr(torch, task["dtype"]), task["device"]
    steps = task["steps"]
    # Tokens for all steps here, those in which others still read their prompts included.
    new = (
        3 * steps
        + sum(each.prompt_len for each in case.asked) // contestants.MAX_BATCH_TOKENS
        + len(case.asked)
    )
    model = make_model(case.shape, case.longest + new, dtype, device, task["seed"])
    page_size = 16
    llm = quire.LLM(
        model,
        page_size=page_size,
        num_pages=sum(-(-(each.prompt_len + new) // page_size) for each in case.asked),
        max_num_seqs=len(case.asked),
        max_batch_tokens=contestants.MAX_BATCH_TOKENS,
        enable_prefix_caching=False,
    )
    for prompt in case.prompts(task["seed"]):
        llm.add_request(prompt, quire.SamplingParams(max_tokens=new, ignore_eos=True))
    seen: set[int] = set()
    while len(seen) < len(case.asked):  # until the last prompt is read
        seen |= {delta.request_id for delta in llm.step()}
    whole = [_seconds(llm.step) for _ in range(steps)]
    parts = timed_parts(llm, steps)
    return {
        "requests": len(case.asked),
        "step_us": float(np.median(whole)) * 1e6,
        "parts_us": split_kernels(
            parts, kernel_seconds(llm, max(2, steps // 4)), on_host=llm.model.device.type == "cpu"
        ),
    }


def timed_parts(llm: Any, steps: int) -> dict[str, float]:
    """Median seconds of each part of so many steps; launch holds the kernels that the host runs itself."""
    of_steps: dict[str, list[float]] = defaultdict(list)
    for _ in range(steps):
        clock: dict[str, float] = defaultdict(float)
        with _timers(llm, clock):
            llm.step()
        clock["launch"] -= clock["plan"]
        clock["hand out"] -= clock["sample"]
        for name, seconds in clock.items():
            of_steps[name].append(seconds)
    return {name: float(np.median(seconds)) for name, seconds in of_steps.items()}


def split_kernels(parts: dict[str, float], kernels: float, *, on_host: bool) -> dict[str, float]:
    """Microseconds by part, in the order of PARTS; where the host runs the kernels, they are taken out of launch."""
    whole = parts | {"kernels": kernels}
    if on_host:
        whole["launch"] = max(0.0, whole["launch"] - kernels)
    return {name: whole.get(name, 0.0) * 1e6 for name in PARTS}


def kernel_seconds(llm: Any, steps: int) -> float:
    """Seconds of a step's kernels: a GPU's, or on a CPU torch's operators and Quire's kernels."""
    on_gpu = llm.model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with ExitStack() as stack:
        if not on_gpu:
            _mark_kernels(stack)
        watched = stack.enter_context(watch(activities=activities))
        for _ in range(steps):
            llm.step()
    events = watched.key_averages()
    if on_gpu:
        # An operator's row repeats the time of the kernels that it launched.
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        return sum(event.self_device_time_total for event in kernels) / steps / 1e6
    mine = [event for event in events if event.key.startswith(("aten::", OURS))]
    return sum(event.self_cpu_time_total for event in mine) / steps / 1e6


def _mark_kernels(stack: ExitStack) -> None:
    """Let the profiler see the CPU kernels that are called without torch's dispatcher."""
    import quire.hf.attention
    import quire.hf.linear
    from quire.ops.attention_plan import AttentionPlan

    for owner, name in (
        (AttentionPlan, "run"),
        (quire.hf.attention, "write_kv"),
        (quire.hf.linear.kernels, "linear"),
    ):
        stack.enter_context(patch.object(owner, name, _marked(getattr(owner, name), OURS + name)))


def _marked(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    def marked(*args: Any, **options: Any) -> Any:
        with record_function(name):
            return call(*args, **options)

    return marked


@contextmanager
def _timers(llm: Any, clock: dict[str, float]) -> Iterator[None]:
    """Time what the engine calls, by part, while the block runs."""
    from quire.engine import core, runner

    def timed(
        call: Callable[..., Any], part: str, after: Callable[[], object] = lambda: None
    ) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args, **options)
            clock[part] += time.perf_counter() - begin
            after()
            return result

        return run

    def wait() -> None:
        if llm.model.device.type == "cuda":
            begin = time.perf_counter()
            torch.cuda.synchronize()
            clock["wait"] += time.perf_counter() - begin

    seams: Sequence[tuple[Any, str, str, Callable[[], object]]] = (
        (llm, "_schedule", "schedule", lambda: None),
        (runner, "build_step", "pack", lambda: None),
        (llm.model._planners, "plan", "plan", lambda: None),
        (llm.model, "forward", "launch", wait),
        (core, "sample", "sample", lambda: None),
        (llm, "_hand_out_all", "hand out", lambda: None),
    )
    with ExitStack() as stack:
        for owner, name, part, after in seams:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), part, after)))
        yield


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
