"""A worker process: runs jobs one after the other and reports each on a line of its own. Started by ``jobs``."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu import checks, edges, graphs, peers, speed, tune
from benchmarks.gpu.device import Device, make_device
from benchmarks.gpu.jobs import Job, Row, Setting, worth_starting

HANDLERS = {
    "check": checks.check_attention,
    "check batch_invariant": checks.check_invariance,
    "check write_kv": checks.check_write_kv,
    "check far pages": checks.check_far_pages,
    "check edge": edges.check_edge,
    "warm up": speed.compile_kernels,
    "ceiling": speed.time_ceiling,
    "decode": speed.time_attention,
    "prefill": speed.time_attention,
    "portable prefill": speed.time_portable,
    "mixed": speed.time_attention,
    "peer": peers.time_peer,
    "write_kv": speed.time_write_kv,
    "graph": graphs.check_graph,
    "sanitizer": graphs.check_memory,
    "compile": tune.compile_candidate,
    "tune": tune.time_candidate,
}
RUINED = 3  # exit code: the device answers nothing any more, start another process


def main() -> None:
    """Run the jobs of a task file from where it says."""
    task_file, reports = (Path(argument) for argument in sys.argv[1:])
    task = json.loads(task_file.read_text())
    jobs = [Job(**fields) for fields in task["jobs"]]
    setting = Setting(**task["setting"])
    device = make_device(setting.device)
    with reports.open("a") as file:

        def report(**fields: Any) -> None:
            file.write(json.dumps(fields) + "\n")
            file.flush()

        for index in range(task["begin"], len(jobs)):
            if not worth_starting(jobs, index, task["deadline"] - time.time()):
                report(
                    job=index, rows=[jobs[index].row("skipped", "no time left beside more important jobs")]
                )
                continue
            report(job=index)
            begin = time.perf_counter()
            rows = run_guarded(jobs[index], device, setting)
            seconds = round(time.perf_counter() - begin, 2)
            report(
                job=index, rows=[{"section": jobs[index].kind, **row, "job_seconds": seconds} for row in rows]
            )
            if not device.alive():
                sys.exit(RUINED)


def run_guarded(job: Job, device: Device, setting: Setting) -> list[Row]:
    """The job's rows, or one that holds its traceback; the traceback goes to the log as well."""
    try:
        return HANDLERS[job.kind](device, setting, **job.arguments)
    except Exception as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        return [
            job.row(
                "failed",
                f"{type(error).__name__}: {str(error)[:400]} ({Path(where.filename).name}:{where.lineno})",
            )
        ]
    finally:
        device.free()


if __name__ == "__main__":
    main()
