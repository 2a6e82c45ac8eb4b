"""`quire chat`: what the model is told, what is written where, and what ends an answer, a session, a conversation."""

from __future__ import annotations

import io
import json
import shutil
import signal

import numpy as np
import pytest
from engine.fakes import EOS, FakeModel, byte_tokenizer

from quire import cli
from quire.assets import DEMO_MODEL
from quire.cli import chat
from quire.engine import Engine, SamplingParams
from quire.errors import ArgumentError, UnsupportedError

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and m['content'] == 'no' %}"
    "{{ raise_exception('no system message') }}{% endif %}"
    "[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
PARAMS = SamplingParams(max_tokens=None)


class Session:
    """A model that answers with all it was told, in small letters as CAPITALS, and a terminal or pipes to talk to it.

    at: how many tokens of an answer come before `during` is called, once.
    """

    def __init__(self, monkeypatch, capsys, *, template: str | None = TEMPLATE) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.during, self.at = None, 3
        self.model = FakeModel(vocab_size=257, eos_token_ids=(EOS,), num_pages=256, rule=self._rule)
        self.engine = Engine(self.model, byte_tokenizer())
        self.engine.tokenizer.chat_template = template

    def _rule(self, history: np.ndarray) -> np.ndarray:
        text = bytes(token for token in history.tolist() if 0 <= token < 256)
        told, _, answered = text.rpartition(b"[a]")
        if len(answered) == self.at and self.during is not None:
            during, self.during = self.during, None
            during()
        answer = told.replace(b"[u]", b"|").replace(b"[a]", b"/").replace(b"[s]", b"!").upper()
        logits = np.zeros(257, dtype=np.float32)
        logits[answer[len(answered)] if len(answered) < len(answer) else EOS] = 1.0
        return logits

    def piped(self, *lines: str, params=PARAMS, **options) -> tuple[str, str]:
        self._monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.run(self.engine, params, **options)
        return self._capsys.readouterr()

    def typed(self, *lines: str | type[BaseException], **options) -> tuple[str, str]:
        given = iter([*lines, EOFError])

        def read(prompt: str) -> str:
            line = next(given)
            if not isinstance(line, str):
                raise line
            return line

        self._monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        self._monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        self._monkeypatch.setattr("builtins.input", read)
        chat.run(self.engine, PARAMS, **options)
        return self._capsys.readouterr()

    def all_pages_are_free(self) -> bool:
        return self.model.allocator.num_available == self.model.num_pages


@pytest.fixture
def session(monkeypatch, capsys):
    return Session(monkeypatch, capsys)


def test_through_pipes_each_line_is_a_turn_and_the_answers_alone_are_written(session):
    assert session.piped("one", "", "two") == ("|ONE\n|ONE/|ONE|TWO\n", "")
    assert session.engine.stats.cached_tokens > 0, "the first turn was meant to be found in pages"


def test_a_system_message_comes_first_and_outlives_clear(session):
    out, _ = session.piped("one", "/clear", "two", system="be loud")
    assert out == "!BE LOUD|ONE\n!BE LOUD|TWO\n"


@pytest.mark.parametrize("command", ["/exit", "/quit"])
def test_exit_ends_the_session(session, command):
    assert session.piped("one", command, "two")[0] == "|ONE\n"


def test_an_answer_is_written_as_it_comes(session, monkeypatch):
    stdout, sizes = io.StringIO(), []
    stdout.flush = lambda: sizes.append(len(stdout.getvalue()))
    monkeypatch.setattr("sys.stdout", stdout)
    session.piped("one")
    assert sizes[:4] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["piped", "typed"])
def test_ctrl_c_stops_an_answer_and_keeps_the_session_and_what_was_written(session, kind):
    session.during = lambda: signal.raise_signal(signal.SIGINT)
    out, err = getattr(session, kind)("one", "two")
    assert out.rstrip("\n") == "|ON\n|ONE/|ON|TWO"
    assert ("(stopped)" in err) == (kind == "typed")
    assert session.all_pages_are_free()
    assert not session.engine.has_unfinished


def test_a_line_whose_answer_was_stopped_before_it_began_is_not_kept(session):
    session.at, session.during = 0, lambda: signal.raise_signal(signal.SIGINT)
    assert session.piped("one", "two")[0] == "\n|TWO\n"


def test_ctrl_c_on_a_terminal_gives_up_the_line_and_says_how_to_end(session):
    out, err = session.typed(KeyboardInterrupt, "one")
    assert out == "|ONE\n\n"
    assert err.count("/exit or Ctrl-D ends") == 2


def test_a_terminal_is_told_of_commands_it_does_not_know_and_a_path_is_a_line(session):
    out, err = session.typed("/help", "/tmp/x is what?", "/exit")
    assert "/help is no command: /clear forgets" in err
    assert out == "|/TMP/X IS WHAT?\n"


def test_what_a_model_writes_cannot_steer_the_terminal_and_is_kept_as_it_was(session):
    assert session.typed("\x1b[2j")[0] == "|␛[2J\n\n"
    assert session.piped("\x1b[2j")[0] == "|\x1b[2J\n"


def test_a_line_past_the_models_length_is_said_on_a_terminal_and_ends_a_pipe(session):
    session.model.max_seq_len = 40
    out, err = session.typed("one", "x" * 60, "/clear", "two")
    assert out == "|ONE\n|TWO\n\n"
    assert "prompt must be shorter than the model's 40 tokens" in err
    assert "/clear forgets the conversation" in err
    with pytest.raises(ArgumentError, match="prompt must be shorter"):
        session.piped("one", "x" * 60, "two")


def test_an_answer_that_is_cut_off_is_said_to_be(session):
    session.model.max_seq_len = 11
    out, err = session.typed("one")
    assert out == "|O\n\n"
    assert "cut off" in err


def test_a_model_without_a_template_and_one_that_takes_no_system_message_are_refused_before_a_line_is_read(
    session, monkeypatch, capsys
):
    with pytest.raises(ArgumentError, match="no system message"):
        session.piped("one", system="no")
    with pytest.raises(UnsupportedError, match="chat needs a tokenizer with a chat template"):
        Session(monkeypatch, capsys, template=None).piped("one")
    assert capsys.readouterr().out == ""


@pytest.fixture
def folder(tmp_path):
    """The demo model with a chat template, which ends its texts itself."""
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    )
    generation = json.loads((DEMO_MODEL / "generation_config.json").read_text())
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps(generation | {"repetition_penalty": 0.2})
    )
    return tmp_path / "model"


@pytest.mark.xdist_group("cli-demo-model")
def test_a_folder_is_talked_to_from_the_command_line(folder, monkeypatch, capsys):
    from quire import LLM

    llm = LLM(folder, num_pages=64)
    first = [{"role": "user", "content": "def read(path):"}]
    [answer] = llm.chat(first, SamplingParams(max_tokens=8))
    assert answer.text != llm.chat(first, SamplingParams(max_tokens=8, repetition_penalty=1.0))[0].text
    talk = [*first, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "import os"}]
    [second] = llm.chat(talk, SamplingParams(max_tokens=8))
    monkeypatch.setattr("sys.stdin", io.StringIO("def read(path):\nimport os\n"))
    assert cli.run(["chat", str(folder), "--max-tokens", "8", "--num-pages", "64"]) == 0
    assert capsys.readouterr() == (f"{answer.text}\n{second.text}\n", "")
