"""The attention kernels, one package per kind of machine.

A backend is a module with five functions:

    why_not(spec, device) -> str | None          a sentence if it cannot serve this spec there
    tiling(spec, device, batch) -> work_list.Tiling
                                                 how it wants the work of at most ``batch`` sequences cut; see
                                                 Tiling.batch_invariant
    prepare(spec, step, device) -> object        called once per plan, for what can be computed ahead;
                                                 its ``notes``, if any, are lines for plan.explain()
    bind(prepared, call) -> call.BoundCall       called once per plan and layout of tensors; the bound call runs once
                                                 per layer and writes that layer's out and lse
    bind_write(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale, given) -> Callable
                                                 called once per layout; what it returns takes seven such tensors and
                                                 writes them. Scales are computed and written, or ``given`` and read

Where its kernels can be compiled before they are first run:

    compile_jobs(spec) -> list[ahead.Job]        all that plans and stores of this spec run

Where a plan's memory must not move, for CUDA graphs, it has one more:

    reserve(spec, capacity, device) -> object    room for every step within a capacity; ``prepare`` then takes it as
                                                 a fourth argument, and bound calls serve all steps in it

Where its kernels read page tables on their own device, it says so:

    TAKES_DEVICE_TABLES = True                   ``prepare`` copies StepPlan.device_table, on the device

What ``bind`` and ``bind_write`` return keeps no tensor of the call they were given: it lives longer than the caller's
tensors. Backends never import one another; they are imported on first use.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from quire.errors import ArgumentError, UnsupportedError
from quire.spec import AttentionSpec

BACKENDS = ("cpu", "reference", "triton")
_DEFAULT_BACKEND = {"cpu": "cpu", "cuda": "triton"}


def resolve_backend(requested: str, device: torch.device) -> str:
    """The backend that serves a request: the one asked for, or the device's own for "auto".

    Raises:
        ArgumentError: there is no backend of that name.
        UnsupportedError: "auto", on a device without kernels.
    """
    if requested == "auto":
        if device.type not in _DEFAULT_BACKEND:
            raise UnsupportedError(
                f'backend must be named on {device}, which Quire has no kernels for; got "auto". '
                'Fix: backend="reference", which is slow, or tensors on a CPU or a CUDA GPU'
            )
        return _DEFAULT_BACKEND[device.type]
    if requested not in BACKENDS:
        raise ArgumentError(
            f'backend must be "auto" or one of {", ".join(BACKENDS)}; got {requested!r}. Fix: backend="auto"'
        )
    return requested


def load_backend(name: str, spec: AttentionSpec, device: torch.device) -> ModuleType:
    """Import a backend and make sure it can serve ``spec`` on ``device``.

    Raises:
        UnsupportedError: it is not installed here, or says that it cannot.
    """
    try:
        module = importlib.import_module(f"quire.kernels.{name}")
    except ModuleNotFoundError as missing:
        if missing.name == f"quire.kernels.{name}":
            raise UnsupportedError(
                f'backend "{name}" is not part of this version of Quire. Fix: backend="reference", or the CPU'
            ) from missing
        raise UnsupportedError(
            f'backend "{name}" needs the module {missing.name}, which is not installed. '
            'Fix: install it, or ask for backend="reference"'
        ) from missing
    reason = module.why_not(spec, device)
    if reason:
        raise UnsupportedError(f'backend "{name}" cannot serve this call: {reason}')
    return module
