"""The command `quire`.

app.py        commands and options, as typed
generate.py   one prompt, continued
chat.py       a conversation, line by line
serve.py      a model behind OpenAI's API
demo.py       eight prompts served at once, watched and measured
prompts.py    ... which prompts
page_map.py   ... the picture of who owns which pages
measure.py    ... on pages, and in a contiguous padded cache
report.py     ... the table of both
pages.py      the pages of a recorded trace, as a picture or a page
doctor.py     what this machine has
bench.py      the benchmarks of a checkout
busy.py       whether other programs are at work
console.py    terminals, spinners, silence
model.py      options → LLM

This module is the frame around every command: each ends with an exit code, and what went wrong is one sentence.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from quire.errors import QuireError, extra_is_missing

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main() -> None:
    """Run the command line this process was started with, and exit."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an old code page lacks ■, which is no reason to stop
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit code: 0 done, 1 a self-check failed, 2 bad input (said in a sentence on stderr), 130 Ctrl-C.
    """
    try:
        return _run(arguments)
    except QuireError as error:
        return _say(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        return _say(str(extra_is_missing("the command line", error)))


def _run(arguments: Sequence[str]) -> int:
    import typer

    from quire.cli.app import app

    usage_error: Any

    # Typer brings its own click or imports it, by version: this is the base of the errors it raises.
    [usage_error] = (kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        code = typer.main.get_command(app).main(list(arguments), prog_name="quire", standalone_mode=False)
    except typer.Abort:  # typer's name for Ctrl-C
        return INTERRUPTED
    except usage_error as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # not an error: someone asks what there is
            error.show()
            return BAD_INPUT
        command = error.ctx.command_path if getattr(error, "ctx", None) else "quire"
        return _say(f"{error.format_message().rstrip('.')}. Fix: see {command} --help")
    return code if isinstance(code, int) else DONE


def _say(sentence: str) -> int:
    print("quire:", " ".join(sentence.split()), file=sys.stderr)
    return BAD_INPUT
