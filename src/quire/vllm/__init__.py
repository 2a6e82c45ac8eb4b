"""Quire as an attention backend of vLLM: vLLM's engine and its distribution, Quire's planner and kernels.

vLLM calls ``register`` in each of its processes, by the entry point ``vllm.general_plugins``. On a CPU it takes Quire
where QUIRE_VLLM=1 is set. Nothing of vLLM is patched: it has a table of backends that plugins may write to.

This module must stay light: vLLM loads it before its workers are started.
"""

from __future__ import annotations

import os

from quire.errors import ArgumentError
from quire.vllm.versions import check_version

SWITCH = "QUIRE_VLLM"
CPU_BACKEND = "quire.vllm.backend.QuireCPUBackend"


def register() -> None:
    """Put Quire in the place of vLLM's attention on CPUs, where QUIRE_VLLM=1 asks for it; else do nothing.

    Raises:
        ArgumentError: QUIRE_VLLM is neither 0 nor 1.
        UnsupportedError: it is 1, and this version of vLLM is not among the tested ones.
    """
    if not is_asked_for():
        return
    check_version()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # vLLM's CPU platform takes CPU_ATTN, whatever backend its configuration names.
    register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)


def is_asked_for() -> bool:
    """Whether QUIRE_VLLM=1 is set."""
    value = os.environ.get(SWITCH, "0")
    if value not in ("", "0", "1"):
        raise ArgumentError(f"{SWITCH} must be 0 or 1; got {value!r}. Fix: {SWITCH}=1 for Quire's attention")
    return value == "1"
