"""`quire serve`: its options, what it says, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from quire import ArgumentError, ModelError, cli
from quire.serve.server import Server, bind

# One worker loads the model and compiles its kernels, not both.
pytestmark = pytest.mark.xdist_group("cli-demo-model")

HANGS = 120


def test_options_reach_the_model_as_they_were_typed(monkeypatch, tmp_path):
    typed = (
        f"{tmp_path} --device cpu --port 0 --max-model-len 99 --max-num-seqs 3 --kv-cache-dtype fp8 "
        "--no-enable-prefix-caching --dtype bfloat16 --page-size 32 --num-pages 9"
    )
    asked = {}

    def llm(model, **options):
        asked.update(options, model=model)
        raise ModelError("enough")

    monkeypatch.setattr("quire.engine.LLM", llm)
    assert cli.run(["serve", *typed.split()]) == 2
    assert asked == {
        "model": str(tmp_path), "revision": None, "device": "cpu", "dtype": "bfloat16",
        "kv_dtype": "fp8_e4m3", "page_size": 32, "num_pages": 9,
        "max_model_len": 99, "max_num_seqs": 3, "enable_prefix_caching": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "in_environment", "names", "key"),
    [
        ("", None, ["demo"], None),
        ("--served-model-name a --served-model-name b --api-key k", "other", ["a", "b"], "k"),
        ("--max-queue 0", "k", ["demo"], "k"),
    ],
)
def test_names_key_and_queue_reach_the_app(monkeypatch, capsys, typed, in_environment, names, key):
    asked = {}

    def app(engine, *, names, api_key, limits):
        asked.update(names=names, api_key=api_key, max_texts=limits.max_texts)
        raise ModelError("enough")

    monkeypatch.setattr("quire.cli.serve.load", lambda model, **options: None)
    monkeypatch.setattr("quire.cli.serve.create_app", app)
    if in_environment is not None:
        monkeypatch.setenv("QUIRE_API_KEY", in_environment)
    assert cli.run(["serve", "--port", "0", "--max-num-seqs", "4", *typed.split()]) == 2
    assert asked == {"names": names, "api_key": key, "max_texts": 4 if "queue" in typed else 260}
    assert "without" not in capsys.readouterr().err


def test_an_address_that_is_taken_is_said_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("quire.cli.serve.load", lambda model, **options: pytest.fail("loaded"))
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        assert cli.run(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "must be an address of this machine that nobody has" in capsys.readouterr().err


def test_an_empty_key_is_refused_and_no_key_on_other_addresses_is_said(monkeypatch, capsys):
    monkeypatch.setattr("quire.cli.serve.load", lambda model, **options: pytest.fail("loaded"))
    assert cli.run(["serve", "--port", "0", "--api-key", ""]) == 2
    assert "--api-key and QUIRE_API_KEY must not be empty" in capsys.readouterr().err

    def refuses(model, **options):
        raise ArgumentError("enough")

    monkeypatch.setattr("quire.cli.serve.load", refuses)
    assert cli.run(["serve", "--port", "0", "--host", "0.0.0.0"]) == 2
    assert "there is no --api-key" in capsys.readouterr().err


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)]
)
def test_the_server_of_the_demo_model_ends_a_stream_and_then_itself(number):
    """The signal comes after the first tokens; the client still reads all of them."""
    server = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from quire.cli import main; main()",
            "serve",
            "--port",
            "0",
            "--num-pages",
            "64",
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    watchdog = threading.Timer(HANGS, server.kill)
    watchdog.start()
    try:
        url = next(line.split()[-1] for line in server.stderr if line.startswith("quire: demo at "))
        client = openai.OpenAI(base_url=url, api_key="-", timeout=HANGS)
        assert httpx.get(url.removesuffix("/v1") + "/health").status_code == 200
        ask = {"model": "demo", "prompt": "def area(", "temperature": 0, "max_tokens": 60}
        whole = client.completions.create(**ask).choices[0].text
        stream = client.completions.create(**ask, stream=True)
        text = next(stream).choices[0].text
        server.send_signal(number)
        text += "".join(chunk.choices[0].text for chunk in stream)
        said = server.stderr.read()
        assert server.wait() == 0, said
    finally:
        watchdog.cancel()
        server.kill()
        server.wait()
    assert text == whole
    assert "Traceback" not in said


def test_a_server_puts_the_handler_of_sigterm_back(monkeypatch):
    def interrupted(self, sockets):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Server, "run", interrupted)
    server = Server.__new__(Server)
    before = signal.getsignal(signal.SIGTERM)
    with bind("127.0.0.1", 0) as bound:
        server.run_until_signal(bound)
    assert signal.getsignal(signal.SIGTERM) is before
