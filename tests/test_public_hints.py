"""What the public API returns has a type that a user's editor and type checker can name."""

from __future__ import annotations

import inspect
from typing import Any

import quire


def functions_of(name: str) -> list[tuple[str, Any]]:
    """A public function, or the public methods and properties of a public class, with their names."""
    value = getattr(quire, name)
    if not inspect.isclass(value):
        return [(name, value)] if inspect.isfunction(value) else []
    found = []
    for method, member in inspect.getmembers(value):
        function = member.fget if isinstance(member, property) else member
        if inspect.isfunction(function) and (not method.startswith("_") or method == "__call__"):
            found.append((f"{name}.{method}", function))
    return found


def test_no_public_function_returns_any():
    functions = [pair for name in quire.__all__ for pair in functions_of(name)]
    assert len(functions) > 50, "the search was meant to find the methods, too"
    ours = [(name, f) for name, f in functions if f.__module__.startswith("quire")]
    returned = {name: str(f.__annotations__.get("return", "no hint")) for name, f in ours}
    assert [name for name, hint in returned.items() if hint in ("Any", "typing.Any", "no hint")] == []
