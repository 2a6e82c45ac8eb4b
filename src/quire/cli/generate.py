"""One prompt, continued while one watches."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from quire.cli.console import spinner, visible
from quire.engine import LLM, RequestOutput, SamplingParams


def run(llm: LLM, prompt: str, params: SamplingParams) -> None:
    """Write the continuation of a prompt to stdout as it comes.

    On a terminal the prompt stands before it, dim, and a line on stderr says how fast it went.

    Raises:
        ArgumentError: a prompt that cannot be served.
    """
    on_terminal = sys.stdout.isatty()
    deltas = llm.stream(prompt, params)
    with spinner("reading the prompt"):
        delta = next(deltas)
    if on_terminal:
        Console(highlight=False).print(Text(visible(prompt), style="dim"), end="", soft_wrap=True)
    while True:
        sys.stdout.write(visible(delta.text) if on_terminal else delta.text)
        sys.stdout.flush()
        if delta.output is not None:
            break
        delta = next(deltas)
    if not delta.output.text.endswith("\n"):
        sys.stdout.write("\n")
    if on_terminal and sys.stderr.isatty():
        Console(stderr=True, highlight=False).print(_how_it_went(delta.output), style="dim")


def _how_it_went(output: RequestOutput) -> str:
    first = output.time_to_first_token or output.seconds
    parts = [f"{len(output.token_ids)} tokens", f"first after {first * 1000:.0f} ms"]
    if len(output.token_ids) > 1:
        parts.append(f"then {(len(output.token_ids) - 1) / (output.seconds - first):.0f} tokens/s")
    return " · ".join([*parts, f"ended by {output.finish_reason}"])
