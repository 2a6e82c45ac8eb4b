"""Conditions that every test starts from."""

import os
from unittest import mock

# Two xdist workers with two OpenMP threads each would spin against one another on two cores. Tests about
# threads ask for them. Said here, before anything imports torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("quire", deadline=None)  # a first example may compile a kernel
settings.load_profile("quire")


@pytest.fixture(scope="session", autouse=True)
def _models_compile_nothing_ahead():
    """The models of tests have shapes of their own, and a test runs few of their kernels."""
    from quire.kernels import ahead

    with mock.patch.object(ahead, "compile_ahead"):
        yield


@pytest.fixture(autouse=True)
def _ordinary_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIRE_DEBUG", raising=False)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
