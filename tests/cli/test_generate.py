"""`quire generate`: what it writes, where to, and what it refuses."""

import io
import re
from typing import get_args

import pytest
from rich.console import Console

from quire import LLM, ModelError, SamplingParams, cli
from quire.cli.app import Dtype, KVDtypeName
from quire.cli.console import visible
from quire.spec import COMPUTE_DTYPES, KVDtype

# One worker loads the model and compiles its kernels, not both.
pytestmark = pytest.mark.xdist_group("cli-demo-model")

PROMPT = "def read(path):\n"


@pytest.fixture(scope="module")
def continuation():
    [output] = LLM(num_pages=64).generate(PROMPT, SamplingParams(max_tokens=12))
    return output.text


def as_lines(text):
    return text if text.endswith("\n") else text + "\n"


def test_into_a_pipe_goes_the_new_text_alone(capsys, continuation):
    assert continuation.strip()
    assert cli.run(["generate", PROMPT, "--max-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out == as_lines(continuation)
    assert err == ""


def test_a_dash_reads_the_prompt_from_standard_input(capsys, monkeypatch, continuation):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert cli.run(["generate", "-", "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out == as_lines(continuation)


def test_a_terminal_shows_the_prompt_before_its_continuation(capsys, monkeypatch, continuation):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.run(["generate", PROMPT, "--max-tokens", "12"]) == 0
    shown = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    assert shown == PROMPT + as_lines(continuation)


def test_text_is_written_as_it_comes(monkeypatch, continuation):
    stdout = io.StringIO()
    sizes = []
    stdout.flush = lambda: sizes.append(len(stdout.getvalue()))
    monkeypatch.setattr("sys.stdout", stdout)
    assert cli.run(["generate", PROMPT, "--max-tokens", "12"]) == 0
    growing = [size for size in sizes if size <= len(continuation)]
    assert len(set(growing)) >= 6


def test_the_same_seed_draws_the_same_text_and_another_seed_another(capsys):
    def draw(seed):
        assert (
            cli.run(["generate", PROMPT, "--max-tokens", "16", "--temperature", "1.5", "--seed", seed]) == 0
        )
        return capsys.readouterr().out

    assert draw("1") == draw("1") != draw("2")


def test_the_text_ends_before_the_earliest_stop_string(capsys, continuation):
    early, late = continuation[len(continuation) // 2 :][:2], continuation[-2:]
    assert cli.run(["generate", PROMPT, "--max-tokens", "12", "--stop", late, "--stop", early]) == 0
    assert capsys.readouterr().out == as_lines(continuation[: continuation.index(early)])


@pytest.mark.parametrize(("command", "arguments"), [("generate", [PROMPT]), ("chat", [])])
def test_options_reach_the_model_as_they_were_typed(monkeypatch, tmp_path, command, arguments):
    typed = (
        f"--model {tmp_path} --revision v1 --dtype bfloat16 --device cuda:1 --kv-dtype int8 --page-size 32"
    )
    typed += " --num-pages 9"
    asked = {}

    def llm(model, **options):
        asked.update(options, model=model)
        raise ModelError("enough")

    monkeypatch.setattr("quire.engine.LLM", llm)
    monkeypatch.setattr("quire.hf.checkpoint.find_checkpoint", lambda model, revision: None)
    typed = typed.replace("--model ", "") if command == "chat" else typed  # there it needs no name
    assert cli.run([command, *arguments, *typed.split()]) == 2
    assert asked == {
        "model": str(tmp_path), "revision": "v1", "dtype": "bfloat16", "device": "cuda:1", "kv_dtype": "int8",
        "page_size": 32, "num_pages": 9,
    }  # fmt: skip


def test_options_that_are_not_typed_are_left_to_the_model(monkeypatch):
    asked = []
    monkeypatch.setattr("quire.engine.LLM", lambda model, **options: asked.append(options))
    monkeypatch.setattr("quire.cli.generate.run", lambda llm, prompt, params: asked.append(params))
    assert cli.run(["generate", PROMPT]) == 0
    options, params = asked
    assert (options["dtype"], options["device"], options["revision"]) == ("auto", None, None)
    assert params == SamplingParams()


def test_on_a_terminal_one_line_says_the_dtype_the_device_and_who_chose_them(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for typed, said in (
        ([], "demo_model: float32 (the checkpoint's own) on cpu (no GPU)"),
        (["--dtype", "bfloat16", "--device", "cpu"], "demo_model: bfloat16 (as asked) on cpu (as asked)"),
    ):
        assert cli.run(["generate", PROMPT, "--max-tokens", "1", *typed]) == 0
        shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().err)
        assert said.replace(" ", "") in re.sub(r"\s", "", shown), "it may be wrapped at the terminal's width"


def test_sampling_options_reach_the_request_as_they_were_typed(monkeypatch):
    typed = "--max-tokens 5 --temperature 0.5 --top-p 0.25 --top-k 7 --seed 3 --stop a --stop b"
    asked = []
    monkeypatch.setattr("quire.cli.model.load", lambda model, **options: None)
    monkeypatch.setattr("quire.cli.generate.run", lambda llm, prompt, params: asked.append((prompt, params)))
    assert cli.run(["generate", PROMPT, *typed.split()]) == 0
    params = SamplingParams(max_tokens=5, temperature=0.5, top_p=0.25, top_k=7, seed=3, stop=["a", "b"])
    assert asked == [(PROMPT, params)]


REFUSED = {
    "an empty prompt": (["generate", ""], "prompt must not be empty"),
    "a prompt past the model's context": (
        ["generate", "x = 1\n" * 400],
        "shorter than the model's 1024 tokens",
    ),
    "more pages than memory": (
        ["generate", "x", "--num-pages", "999999999999999"],
        "num_pages must fit the memory",
    ),
    "a prompt past the pool": (["generate", "x = 1\n" * 20, "--num-pages", "2"], "the pool has 2"),
}


@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_a_prompt_that_cannot_be_served_is_refused_with_a_sentence(capsys, arguments, said):
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_what_a_model_writes_cannot_steer_the_terminal():
    assert visible("a\x1b[2Jb\x07\r\x7f\x9b") == "a␛[2Jb␇␍␡�"
    assert visible("def f():\n\treturn 'ünï ⏎'") == "def f():\n\treturn 'ünï ⏎'"
    assert "\x1b" not in Console().render_str(visible("\x1b[31m")).plain


def test_dtypes_on_the_command_line_are_those_of_the_library():
    assert {kind.value for kind in KVDtypeName} == set(get_args(KVDtype))
    dtypes = {str(dtype).removeprefix("torch.") for dtype in COMPUTE_DTYPES}
    assert {kind.value for kind in Dtype} == {"auto", *dtypes}
