"""A conversation with a model, on a terminal or through pipes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress

from quire.cli.console import spinner, visible
from quire.engine import Delta, Engine, SamplingParams
from quire.engine.chat import render_chats
from quire.errors import QuireError

COMMANDS = "/clear forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"
PROMPT = "> "


def run(llm: Engine, params: SamplingParams, *, system: str | None = None) -> None:
    """Answer line by line what is read from stdin, until it ends or /exit is read.

    On a terminal a line that cannot be answered is said to be so, and the session goes on. Without one, answers alone
    are written to stdout, and such a line ends the session.

    Raises:
        UnsupportedError: a tokenizer without a chat template.
        ArgumentError: a template that takes no system message, where one is given; a line that cannot be answered.
        KeyboardInterrupt: Ctrl-C while nothing is answered and stdin is no terminal.
    """
    chat = Conversation(llm, params, system)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        _note(COMMANDS)
    for line in _typed_lines() if on_terminal else _read_lines():
        text = line.strip()
        if text in ("/exit", "/quit"):
            return
        if text == "/clear":
            chat.clear()
        elif text.startswith("/") and text[1:].isalpha() and on_terminal:
            _note(f"{text} is no command: {COMMANDS}")
        elif text:
            try:
                chat.answer(text, on_terminal=on_terminal)
            except QuireError as error:
                if not on_terminal:
                    raise
                _note(f"{error}. /clear forgets the conversation")


class Conversation:
    """What was said so far, and who says the next turn.

    Its beginning is in pages after each turn, so that a turn costs what is new in it.

    Raises:
        UnsupportedError, ArgumentError: as `run`.
    """

    def __init__(self, llm: Engine, params: SamplingParams, system: str | None = None) -> None:
        self._llm, self._params = llm, params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._system)
        render_chats(
            llm.tokenizer, [*self._system, {"role": "user", "content": "Hello"}]
        )  # or a sentence why not

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self._system)

    def answer(self, text: str, *, on_terminal: bool = False) -> None:
        """Write the model's answer to stdout as it comes; it becomes part of the conversation, as far as it came.

        A line that got no answer is not kept: templates want turns to alternate.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        written = ""
        try:
            with closing(self._llm.stream_chat(asked, self._params)) as deltas:
                for delta in _after_waiting(deltas):
                    sys.stdout.write(visible(delta.text) if on_terminal else delta.text)
                    sys.stdout.flush()
                    written += delta.text
                    if delta.finish_reason == "length" and on_terminal:
                        _note("\n(cut off: the answer is as long as it may be)")
        except KeyboardInterrupt:
            if on_terminal:
                _note("\n(stopped)")
        finally:
            if written:
                self.messages = [*asked, {"role": "assistant", "content": written}]
        sys.stdout.write("\n")
        sys.stdout.flush()


def _after_waiting(deltas: Iterator[Delta]) -> Iterator[Delta]:
    """The deltas, with something to see until the first of them."""
    with spinner("reading"):
        first = next(deltas)
    yield first
    yield from deltas


def _typed_lines() -> Iterator[str]:
    """Lines from a terminal, which can be edited; Ctrl-C gives one up."""
    with suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401  # from now on `input` knows the arrow keys and the lines before
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            _note(f"\n{COMMANDS}")


def _read_lines() -> Iterator[str]:
    yield from sys.stdin


def _note(text: str) -> None:
    """Something that is no part of the conversation."""
    sys.stdout.flush()
    print(text, file=sys.stderr)
