"""One task in a process of its own: `python -m benchmarks.serving.worker TASK.json RESULT.json`, by processes.py."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

Task = dict[str, Any]
Result = dict[str, Any]


def bandwidth(task: Task) -> Result:
    """The device's name, and how fast it reads."""
    import torch

    from benchmarks.serving.floor import read_bandwidth

    on_gpu = torch.device(task["device"]).type == "cuda"
    name = torch.cuda.get_device_name(task["device"]) if on_gpu else "CPU"
    return {"status": "ok", "bytes_per_second": read_bandwidth(task["device"]), "device": name}


def judge(task: Task) -> Result:
    """Regrets of some texts of a case."""
    import torch

    from benchmarks.serving import agreement

    case = case_of(task)
    dtype = getattr(torch, task["dtype"])
    verdicts = agreement.judge(case.shape, case.longest, dtype, task["device"], task["texts"], task["seed"])
    return {"status": "ok", "verdicts": verdicts}


def serve(task: Task) -> Result:
    """One contestant serves one case once, after a warm-up; out of memory is a result."""
    from benchmarks.serving.memory import is_out_of_memory
    from benchmarks.turns import Absent

    try:
        return _serve(task)
    except Absent as reason:
        return reason.columns
    except Exception as error:
        status = "out of memory" if is_out_of_memory(error) else "failed"
        return {"status": status, "note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _serve(task: Task) -> Result:
    import torch

    import quire
    from benchmarks.serving import contestants, memory
    from benchmarks.serving.shapes import make_model

    _ = quire.LLM  # imported whoever serves
    case, device, dtype = case_of(task), task["device"], getattr(torch, task["dtype"])
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        memory.limit(device, task["budget"], 0)
    model = make_model(case.shape, case.longest, dtype, device, task["seed"])
    weights = case.shape.parameters * dtype.itemsize
    slot_bytes = case.shape.slot_values * dtype.itemsize
    slots = int(contestants.CACHE_SHARE * (task["budget"] - weights)) // slot_bytes
    begin = time.perf_counter()
    prompts = case.prompts(task["seed"])
    contestant = contestants.CONTESTANTS[task["who"]](model, contestants.Room(slots, case.asked))
    warm_up = contestants.warm_up_of(task["who"], case)
    contestant.serve([prompts[0][:1] * each.prompt_len for each in warm_up], warm_up)
    ready = time.perf_counter() - begin
    base = 0
    if not on_gpu:  # what loading took for itself, libraries and machine code, is nobody's cache
        base = memory.held(device) - weights - contestant.written * slot_bytes
        memory.limit(device, task["budget"], weights + contestant.reserved * slot_bytes)
    with memory.Course(device, base) as course:
        served = contestant.serve(prompts, case.asked)
    contestant.close()
    if course.peak > task["budget"]:
        raise memory.NoRoom(f"{course.peak / 1e9:.3f} GB were held of {task['budget'] / 1e9:.3f}")
    return {
        "status": "ok",
        "tokens": served.tokens,
        "times": served.times,
        "allocated_slots": served.allocated_slots,
        "filled_slots": served.filled_slots,
        "preemptions": served.preemptions,
        "ready_s": ready,
        "peak_bytes": course.peak,
        "memory": course.thinned(),
    }


def profile(task: Task) -> Result:
    """A decode step of Quire by its parts."""
    from benchmarks.serving.profile import measure

    return {"status": "ok"} | measure(case_of(task), task)


def case_of(task: Task) -> Any:
    """The case that a task names."""
    from benchmarks.serving.cases import chosen, make_cases

    [case] = chosen(make_cases(task["scale"], task["seed"]), [task["case"]])
    return case


KINDS = {"bandwidth": bandwidth, "judge": judge, "serve": serve, "profile": profile}


def _end_with_parent() -> None:
    """End once whoever started this process is gone: nobody would read its result, and it holds a device's memory."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Do the task; the result appears whole or not at all."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    task_file, result_file = map(Path, sys.argv[1:])
    task = json.loads(task_file.read_text())
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        result = KINDS[task["kind"]](task)
    except Exception as error:  # whatever a library raises becomes a row that says so
        import traceback

        traceback.print_exc()
        result = {"status": "failed", "note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    written = result_file.with_suffix(".part")
    written.write_text(json.dumps(result))
    os.replace(written, result_file)
    sys.stdout.flush()
    sys.stderr.flush()
    # A library's thread that does not end would hold the process, and with it the device's memory.
    os._exit(0)


if __name__ == "__main__":
    main()
