"""Everything that layers run, compiled before the first step."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quire.kernels import load_backend, resolve_backend
from quire.kernels.ahead import Job, compile_ahead
from quire.ops.planner import check_spec
from quire.planning import step as planning
from quire.spec import AttentionSpec, existing_device


def warm_up(*specs: AttentionSpec, backend: str = "auto", device: torch.device | str = "cpu") -> None:
    """Compile all CPU kernels that layers of these specs can need: to plan, store, attend and merge.

    No later step then waits for the compiler. The machine code stays on disk for the processes to come. Where several
    kernels are missing there and there are two cores or more, they are compiled side by side in processes; a line on
    stderr counts them. A model on pages does this when it is made.

    Args:
        specs: the layers' shapes.
        backend: "auto", "cpu", "triton" or "reference".
        device: where q and the pages will be. For a GPU only the planner is compiled: Triton compiles its kernels when
            they are first launched.
    Raises:
        ArgumentError: a spec that is none, or a backend or device that is not there.
        UnsupportedError: the backend asked for cannot serve a spec here.
    Cost: milliseconds where all is on disk; else 2 to 6 s a kernel, shared by the cores.
    """
    compile_ahead(compile_jobs(specs, backend, existing_device(device)))


def compile_jobs(specs: Iterable[AttentionSpec], backend: str, device: torch.device) -> list[Job]:
    """What ``warm_up`` compiles, the slowest first: the planner takes twice as long as an attention kernel."""
    jobs = planning.compile_jobs()
    for spec in specs:
        check_spec(spec)
        kernels = load_backend(resolve_backend(backend, device), spec, device)
        if hasattr(kernels, "compile_jobs"):
            jobs += kernels.compile_jobs(spec)
    return jobs
