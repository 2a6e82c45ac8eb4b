"""`quire doctor`: what is here is named, what is missing comes with the way to get it, wrong kernels are found."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

import quire
from quire import AttentionSpec, cli
from quire.cli import doctor
from quire.kernels import BACKENDS

SPEC = AttentionSpec(4, 2, 64, dtype=torch.float32)


def diagnosis(capsys):
    code = cli.run(["doctor"])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def test_a_sound_machine_is_described_with_exit_code_0(capsys):
    code, out = diagnosis(capsys)
    assert code == 0
    assert f"Quire {quire.__version__}" in out
    assert version("torch") in out
    assert "demo_model" in out
    for name in (*BACKENDS, "kernel cache", "processor", "GPU", "thread", "transformers", "largest error"):
        assert name in out


def test_a_missing_package_comes_with_the_command_that_brings_it(capsys, monkeypatch):
    def only_without_transformers(name):
        if name == "transformers":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", only_without_transformers)
    [line] = [line for line in diagnosis(capsys)[1].splitlines() if "transformers" in line]
    assert line.startswith("○")
    assert "Fix: pip install '.[hf]' in Quire's folder" in line


def test_a_missing_demo_model_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "DEMO_MODEL", tmp_path)
    assert f"missing from {tmp_path}" in " ".join(diagnosis(capsys)[1].split())


def test_a_backend_that_cannot_serve_says_why(capsys, monkeypatch):
    monkeypatch.setattr("quire.kernels.cpu.why_not", lambda spec, device: "its cores are asleep")
    [line] = [line for line in diagnosis(capsys)[1].splitlines() if "its cores are asleep" in line]
    assert "largest error" not in line  # a GPU, where there is one, has a line of its own


def test_the_self_check_passes_on_correct_kernels_by_a_margin():
    roundings = (
        16 * torch.finfo(torch.float32).eps
    )  # of values of order one; doctor allows five times as much
    assert 0 < doctor.attention_error("cpu", SPEC) < roundings
    assert doctor.attention_error("reference", SPEC) == 0


@pytest.mark.parametrize("fault", ["a wrong scale", "an empty slot read"])
def test_the_self_check_finds_a_wrong_kernel(capsys, monkeypatch, fault):
    right = quire.paged_attention

    def wrong(q, k, v, page_table, seq_lens, starts, *, backend):
        if backend == "reference":
            return right(q, k, v, page_table, seq_lens, starts, backend=backend)
        if fault == "a wrong scale":
            return right(q * 1.001, k, v, page_table, seq_lens, starts, backend=backend)
        return right(q, k, v, page_table, seq_lens + 1, starts, backend=backend)

    monkeypatch.setattr(quire, "paged_attention", wrong)
    code, out = diagnosis(capsys)
    assert code == 1
    assert "please report this" in " ".join(out.split())
