"""The frame around every command: exit codes, sentences, and a fast start."""

import io
import subprocess
import sys
import time

import pytest
from typer import BadParameter

from quire import __version__, cli
from quire.cli import console
from quire.errors import ModelError


def run(capsys, *arguments):
    code = cli.run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


BAD_INPUT = {
    "an unknown command": (["teach"], "No such command 'teach'"),
    "an unknown option": (["generate", "x", "--wings", "2"], "--wings"),
    "no prompt": (["generate"], "Missing argument"),
    "an unknown dtype": (["generate", "x", "--dtype", "float8"], "'float8' is not one of"),
    "an unknown dtype of pages": (["generate", "x", "--kv-dtype", "int4"], "'int4' is not one of"),
    "no tokens asked for": (["generate", "x", "--max-tokens", "0"], "--max-tokens"),
    "a number of pages below one": (["generate", "x", "--num-pages", "-4"], "--num-pages"),
    "a page without tokens": (["generate", "x", "--page-size", "0"], "--page-size"),
    "words for a number": (["demo", "--max-tokens", "many"], "--max-tokens"),
    "a negative temperature": (["generate", "x", "--temperature", "-1"], "temperature must be"),
    "a negative number of tokens to draw from": (["generate", "x", "--top-k", "-5"], "top_k must be"),
    "a probability above one": (["generate", "x", "--temperature", "1", "--top-p", "2"], "top_p must be"),
    "a negative seed": (["generate", "x", "--seed", "-1"], "seed must be"),
    "an empty stop string": (["generate", "x", "--stop", ""], "stop must be"),
    "no such folder": (["generate", "x", "--model", "/no/such/folder"], "'/no/such/folder', which is none"),
    "no model to talk to": (["chat"], "Missing argument"),
    "no such folder to talk to": (["chat", "/no/such/folder"], "'/no/such/folder', which is none"),
    "no such device": (["generate", "x", "--device", "abacus"], "device must be one that"),
    "a picture of an unknown kind": (["demo", "--save", "demo.png"], "--save must name an .svg file"),
    "a picture in no folder": (
        ["demo", "--save", "/no/such/folder/demo.svg"],
        "--save must name an .svg file",
    ),
}


@pytest.mark.parametrize(("arguments", "said"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_sentence_on_stderr_and_exit_code_2(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert said in err
    assert err.startswith("quire: ")
    assert "Fix: " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_a_folder_that_is_no_model_is_refused_by_both_commands(capsys, tmp_path, command):
    arguments = [command, "--model", str(tmp_path), *(["x"] if command == "generate" else [])]
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert str(tmp_path) in err
    assert err.count("\n") == 1


def test_a_folder_without_weights_is_named_with_what_it_lacks(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, _, err = run(capsys, "generate", "x", "--model", str(tmp_path))
    assert code == 2
    assert "safetensors" in err


def raising(error):
    def command(*args, **kwargs):
        raise error

    return command


@pytest.mark.parametrize("where", ["quire.cli.doctor.run", "quire.cli._run"])  # in a command, and before it
def test_ctrl_c_ends_quietly_with_130(capsys, monkeypatch, where):
    monkeypatch.setattr(where, raising(KeyboardInterrupt))
    code, out, err = run(capsys, "doctor")
    assert code == 130
    assert (out + err).strip() == ""


def test_a_sentence_over_several_lines_becomes_one_line(capsys, monkeypatch):
    monkeypatch.setattr("quire.cli.doctor.run", raising(ModelError("a reason\n  over lines. Fix: none")))
    assert run(capsys, "doctor") == (2, "", "quire: a reason over lines. Fix: none\n")


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch):
    monkeypatch.setattr("quire.cli.doctor.run", raising(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        cli.run(["doctor"])


def test_a_missing_package_is_named_with_the_extra_that_brings_it(capsys, monkeypatch):
    missing = ModuleNotFoundError("No module named 'transformers.utils'", name="transformers.utils")
    monkeypatch.setattr("quire.cli.doctor.run", raising(missing))
    code, _, err = run(capsys, "doctor")
    assert code == 2
    assert "needs transformers" in err
    assert "pip install '.[hf]' in Quire's folder" in err


def test_a_missing_module_of_our_own_is_a_bug(monkeypatch):
    monkeypatch.setattr("quire.cli.doctor.run", raising(ModuleNotFoundError(name="quire.nowhere")))
    with pytest.raises(ModuleNotFoundError):
        cli.run(["doctor"])


def test_typer_errors_still_have_the_base_that_is_caught():
    assert [kind.__name__ for kind in BadParameter.__mro__].count("ClickException") == 1


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"quire {__version__}\n", "")


@pytest.mark.parametrize("command", ["generate", "chat", "demo", "doctor", "serve"])
def test_help_of_each_command_shows_how_to_type_it(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Examples:" in out
    assert out.count(f"quire {command}") >= 3  # the usage line and at least two examples


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"], ["teach"]])
def test_help_and_errors_of_the_command_line_load_no_library(arguments):
    program = f"""
import sys, quire.cli
quire.cli.run({arguments!r})
heavy = {{"torch", "numpy", "numba", "llvmlite", "transformers", "tokenizers", "triton"}}
print("LOADED", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_a_process_ends_with_the_code_and_without_a_traceback():
    program = (
        "import sys; from quire.cli import main; sys.argv[1:] = ['generate', 'x', '--top-p', '0']; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("quire: top_p must be")
    assert done.stderr.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_spinner_counts_the_kernels_that_are_compiled_meanwhile(monkeypatch):
    from quire.kernels import ahead

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.spinner("loading the model"):
        report = ahead._report.get()
        report(1, 7)
        time.sleep(0.2)  # a few frames
        report(7, 7)
        time.sleep(0.2)
    _, counted, after = terminal.getvalue().partition("compiling kernels (once): 1 of 7")
    assert counted
    assert "loading the model" in after
    assert ahead._report.get() is None
