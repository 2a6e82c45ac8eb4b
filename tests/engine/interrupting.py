"""Ctrl-C at every line of some functions, one after the other."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def interrupted(functions: Collection[str], at: int, module: ModuleType) -> Iterator[list[str]]:
    """Ctrl-C before the at-th line that runs of these functions of a module; gives the functions of all lines."""
    source, lines = inspect.getsource(module).splitlines(), []

    def trace(frame, event, _):
        code = frame.f_code
        if code.co_filename != module.__file__ or code.co_name not in functions:
            return None
        if event == "line" and not source[frame.f_lineno - 1].lstrip().startswith(("with ", "try:")):
            lines.append(code.co_name)
            if len(lines) == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)
