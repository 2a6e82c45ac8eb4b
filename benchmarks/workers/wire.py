"""The worker's end of benchmarks/foreign.py; nothing but the standard library.

The first line asked says what to load, each later one asks for a turn. Answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]


def serve(load: Callable[[dict[str, Any]], tuple[Answer, Callable[[], Answer]]]) -> None:
    """Answer until nobody asks any more.

    Args:
        load: from the first request to its answer and to what a turn does; a turn's answer holds "seconds".
    """
    # Libraries print to standard output: what they say goes to standard error, and the line stays ours.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    turn: Callable[[], Answer] | None = None
    for line in sys.stdin:
        try:
            if turn is None:
                answer, turn = load(json.loads(line))
            else:
                answer = turn()
        except ImportError as error:
            answer = {"error": f"not installed: {error}"}
        except Exception as error:  # whatever a foreign library raises becomes a row that says so
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)
