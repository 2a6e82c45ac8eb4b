"""`quire serve`: a model behind OpenAI's API."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from quire.cli.model import check_trace, load, tracing
from quire.errors import ArgumentError
from quire.serve.app import create_app
from quire.serve.limits import Limits
from quire.serve.server import Server, bind, is_loopback, url_of

_KEY = "QUIRE_API_KEY"


def run(
    model: str | None,
    *,
    host: str,
    port: int,
    names: list[str] | None,
    api_key: str | None,
    max_num_seqs: int,
    max_queue: int,
    trace: Path | None,
    **options: Any,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM.

    Args:
        model: a folder or an id of the hub; None: the embedded model.
        names: what the model is called; default: the model as given, or "demo".
        api_key: default: the environment's QUIRE_API_KEY.
        trace: where a trace of all steps goes; None: nowhere.
        options: as for LLM.
    Raises:
        ArgumentError: an address that is taken, and as LLM.
        ModelError, UnsupportedError: as LLM.
    """
    signal.signal(signal.SIGTERM, _leave)
    api_key = os.environ.get(_KEY) if api_key is None else api_key
    if api_key == "":
        raise ArgumentError(
            f"--api-key and {_KEY} must not be empty; got ''. Fix: a long random one, or none"
        )
    check_trace(trace)
    bound = bind(host, port)  # before the model, which takes long
    try:
        if not is_loopback(bound) and api_key is None:
            _say(f"anyone who reaches {url_of(bound)} is served: there is no --api-key")
        llm = load(model, max_num_seqs=max_num_seqs, **options)
        names = names or ["demo" if model is None else model]
        app = create_app(llm, names=names, api_key=api_key, limits=Limits(max_texts=max_num_seqs + max_queue))
        with tracing(llm, trace):
            _say(f"{names[0]} at {url_of(bound)}/v1")
            _say(f"its pages at {url_of(bound)}/pages")
            Server(app).run_until_signal(bound)
    finally:
        bound.close()


def _say(sentence: str) -> None:
    print(f"quire: {sentence}", file=sys.stderr, flush=True)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM while the model loads."""
    raise SystemExit(0)
