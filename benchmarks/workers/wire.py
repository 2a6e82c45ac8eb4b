"""The worker's end of benchmarks/foreign.py; nothing but the standard library.

Asked in lines of JSON to load something under a name, or to take a turn at it; answers are such lines too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]


Load = Callable[[dict[str, Any]], tuple[Answer, Callable[[], Answer]]]


def serve(load: Load) -> None:
    """Answer until nobody asks any more.

    Args:
        load: from a request to its answer and to what a turn does; a turn's answer holds "seconds".
    """
    # Libraries print to standard output: what they say goes to standard error, and the line stays ours.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    turns: dict[str, Callable[[], Answer]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "load" in asked:
                turns.pop(asked["load"], None)  # its memory is needed for what takes its place
                answer, turns[asked["load"]] = load(asked["request"])
            else:
                answer = turns[asked["turn"]]()
        except ImportError as error:
            answer = {"status": "unavailable", "error": f"not installed: {error}"}
        except Exception as error:  # whatever a foreign library raises becomes a row that says so
            reason = " ".join(str(error).split())[:200]
            answer = {"status": "failed", "error": f"{type(error).__name__}: {reason}"}
        print(json.dumps(answer), file=answers, flush=True)
