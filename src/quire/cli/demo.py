"""Eight prompts served at once, watched page by page, then measured."""

from __future__ import annotations

import io
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from quire.assets import DEMO_MODEL
from quire.cli.busy import warning
from quire.cli.console import spinner
from quire.cli.measure import Run, Watch, divergences, serve_on_pages, serve_padded
from quire.cli.model import check_trace, load, tracing
from quire.cli.page_map import draw, plain
from quire.cli.prompts import PROMPTS
from quire.cli.report import agreement, report
from quire.cli.story import MOST_TOKENS, stage, tell
from quire.engine import LLM, SamplingParams
from quire.engine.llm import load_tokenizer
from quire.engine.request import Request
from quire.errors import ArgumentError
from quire.hf.checkpoint import find_checkpoint

FRAMES_PER_SECOND = 25  # the live view waits for the eye; measured runs draw nothing
PLAIN_SNAPSHOTS = 4
WARM_UP_TOKENS = 3
PICTURE_WIDTH = 96


def run(
    model: str | None,
    *,
    weights: Mapping[str, Any],
    max_tokens: int,
    num_pages: int | None,
    page_size: int,
    seed: int | None,
    compare: bool,
    runs: int,
    save: Path | None,
    trace: Path | None,
) -> None:
    """Serve, show, measure, compare.

    Args:
        model: as for `load`.
        weights: which revision of it, in which dtype and where, as for LLM.
        trace: where a trace of the run that is watched goes; the measured ones are not slowed by it.
    Raises:
        ArgumentError: prompts that do not fit the model or the pool, or a picture that cannot be written.
    """
    _check_picture(save)
    check_trace(trace)
    console = Console(highlight=False)
    prompts = list(PROMPTS)
    if seed is not None:
        random.Random(seed).shuffle(prompts)
    params = _greedy(max_tokens)
    llm, token_ids = _load(model, weights, prompts, max_tokens, num_pages, page_size)
    with spinner("warming up"):
        _warm_up(llm, prompts, token_ids, compare)

    console.print(
        f"{len(prompts)} prompts of {min(map(len, token_ids))} to {max(map(len, token_ids))} tokens, "
        f"up to {max_tokens} new ones each; a pool of {llm.model.num_pages} pages of {page_size} tokens"
    )
    _tell(console, llm, min(max_tokens, MOST_TOKENS))
    with tracing(llm, trace):
        fullest = _show(console, llm, prompts, params)
    busy = warning() if llm.model.device.type == "cpu" else None
    on_pages, padded = _measure(llm, prompts, token_ids, params, runs, compare)
    parts = [
        report(on_pages, padded, num_pages=llm.model.num_pages, footnote=_conditions(llm, runs, compare))
    ]
    if compare:
        differing = divergences(llm.model.model, token_ids, on_pages[0], padded[0])
        parts.append(agreement(len(prompts), differing, lambda token: str(llm.tokenizer.decode([token]))))
    if busy:
        parts.append(Text(busy, "yellow"))
    for part in parts:
        console.print(part)
    if save is not None:
        _save_picture(save, [fullest, *parts])
        console.print(f"picture: {save}")


def _greedy(max_tokens: int) -> SamplingParams:
    """As `serve_padded` chooses tokens, whatever the model's generation_config says."""
    return SamplingParams(temperature=0.0, repetition_penalty=1.0, min_tokens=0, max_tokens=max_tokens)


def _load(
    model: str | None,
    weights: Mapping[str, Any],
    prompts: Sequence[str],
    max_tokens: int,
    num_pages: int | None,
    page_size: int,
) -> tuple[LLM, list[list[int]]]:
    """The model, with a pool in which all prompts fit at once unless told otherwise."""
    checkpoint = find_checkpoint(DEMO_MODEL if model is None else model, weights["revision"])
    with spinner("loading the model"):
        tokenizer = load_tokenizer(checkpoint.tokenizer_folder)
        token_ids: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    needed = sum(-(-(len(tokens) + max_tokens - 1) // page_size) for tokens in token_ids)
    enough = -(-needed // 8) * 8
    llm = load(model, **weights, tokenizer=tokenizer, page_size=page_size, num_pages=num_pages or enough)
    if num_pages is None and len(llm.model.groups) > 1:  # a token takes a slot of each
        num_pages = enough * len(llm.model.groups)
        llm = LLM(llm.model.model, tokenizer=tokenizer, page_size=page_size, num_pages=num_pages)
    longest, limit = max(map(len, token_ids)), llm.model.max_seq_len
    if limit is not None and longest + max_tokens > limit:
        raise ArgumentError(
            f"max_tokens must be at most {limit - longest}, as the demo's longest prompt has {longest} tokens and "
            f"the model reads {limit}; got {max_tokens}. Fix: --max-tokens {max(1, limit - longest)}"
        )
    return llm, token_ids


def _warm_up(llm: LLM, prompts: Sequence[str], token_ids: list[list[int]], compare: bool) -> None:
    serve_on_pages(llm, prompts, _greedy(WARM_UP_TOKENS))
    if compare:
        serve_padded(llm.model.model, token_ids, WARM_UP_TOKENS, llm.model.eos_token_ids)


def _tell(console: Console, llm: LLM, max_tokens: int) -> None:
    """Requests that come one after another, before the reader's eyes, and a sentence on what happened."""
    engine = stage(llm, max_tokens)
    with _view(console, engine, _greedy(max_tokens)) as watch:
        told = tell(engine, max_tokens, watch)
    console.print(str(told))


def _show(console: Console, llm: LLM, prompts: Sequence[str], params: SamplingParams) -> RenderableType:
    """Serve the prompts before the reader's eyes; return the picture of the step that used most pages."""
    fullest: tuple[int, RenderableType] = (0, "")

    with _view(console, llm, params) as watch:

        def look(step: int, requests: list[Request]) -> None:
            nonlocal fullest
            used = llm.table.allocator.num_owned
            if used >= fullest[0]:
                fullest = (used, draw(llm, requests, step=step, width=PICTURE_WIDTH))
            watch(step, requests)

        serve_on_pages(llm, prompts, params, look)
    if console.is_terminal:
        console.print(fullest[1])  # the live view ends with every page free again
    return fullest[1]


@contextmanager
def _view(console: Console, llm: LLM, params: SamplingParams) -> Iterator[Watch]:
    if not console.is_terminal:
        every = max(1, (params.max_tokens or 1) // PLAIN_SNAPSHOTS)

        def snapshot(step: int, requests: list[Request]) -> None:
            if step == 1 or step % every == 0:
                print("\n" + plain(llm, requests, step=step))

        yield snapshot
        return
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:

        def frame(step: int, requests: list[Request]) -> None:
            live.update(draw(llm, requests, step=step, width=min(console.width, PICTURE_WIDTH)), refresh=True)
            time.sleep(1 / FRAMES_PER_SECOND)

        yield frame


def _measure(
    llm: LLM,
    prompts: Sequence[str],
    token_ids: list[list[int]],
    params: SamplingParams,
    runs: int,
    compare: bool,
) -> tuple[list[Run], list[Run]]:
    """Both ways in turn, so that a machine that grows slower slows both."""
    on_pages, padded = [], []
    assert params.max_tokens is not None
    for run in range(runs):
        with spinner(f"measuring, without drawing: run {run + 1} of {runs}"):
            on_pages.append(serve_on_pages(llm, prompts, params)[0])
            if compare:
                padded.append(
                    serve_padded(llm.model.model, token_ids, params.max_tokens, llm.model.eos_token_ids)
                )
    return on_pages, padded


def _conditions(llm: LLM, runs: int, compare: bool) -> str:
    dtype = str(llm.model.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    place = (
        f"{threads} CPU thread{'s' * (threads > 1)}"
        if llm.model.device.type == "cpu"
        else str(llm.model.device)
    )
    how = f"median of {runs} runs" if runs > 1 else "one run"
    both = ", in turn, with the same weights" if compare else ""
    return f"{how} after a warm-up{both}; {dtype}, {place}, greedy"


def _check_picture(save: Path | None) -> None:
    if save is not None and (save.suffix != ".svg" or not save.parent.is_dir()):
        raise ArgumentError(
            f"--save must name an .svg file in a folder that exists; got {str(save)!r}. Fix: --save demo.svg"
        )


def _save_picture(path: Path, parts: Sequence[RenderableType]) -> None:
    console = Console(
        record=True,
        file=io.StringIO(),
        width=PICTURE_WIDTH,
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
    )
    for part in parts:
        console.print(part)
    picture = console.export_svg(title="quire demo", unique_id="quire-demo")
    # Rich asks a server for a font; a picture should need nobody else.
    path.write_text(re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL), encoding="utf-8")
