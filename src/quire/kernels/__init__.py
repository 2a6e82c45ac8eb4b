"""The attention kernels, one package per kind of machine.

A backend is a module with five functions, and nothing else is asked of it:

    why_not(spec, device) -> str | None          a sentence if it cannot serve this spec there
    tiling(spec, device) -> work.Tiling          how it wants the work cut; see Tiling.batch_invariant
    prepare(spec, step, device) -> object        once per plan: what it can compute ahead;
                                                 its ``notes``, if any, are lines for plan.explain()
    bind(prepared, call) -> work.BoundCall       once per plan and layout of tensors; the bound call runs once per
                                                 layer and writes that layer's out and lse
    bind_write(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale) -> Callable
                                                 once per layout; what it returns takes such tensors and writes them

and one more where a plan's memory must not move, for CUDA graphs:

    reserve(spec, capacity, device) -> object    room for every step within a capacity; ``prepare`` then takes it as
                                                 a fourth argument, and bound calls serve all steps in it

Backends never import one another; they are imported on first use.
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
    """The backend that serves a request: the one asked for, or the device's own for "auto"."""
    if requested == "auto":
        return _DEFAULT_BACKEND.get(device.type, "reference")
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
