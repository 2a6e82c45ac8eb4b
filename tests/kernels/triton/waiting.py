"""What a kernel does before it waits for the one ahead of it in the stream, on any path, as its PTX says.

The order of lines says little: the compiler puts a loop's end before its beginning where it likes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

_WAIT = "griddepcontrol.wait"
# Accesses to global memory, and the kernel's end.
_NOTED = re.compile(r"(ld|st|atom|red)\.(?!shared|param)|cp\.async\.\w+\.shared|prefetch|ret|exit")
_STATEMENT = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)")


class _Statement(NamedTuple):
    predicate: str | None
    name: str
    written: list[str]  # registers
    read: list[str]
    rest: str  # operands


def done_before_waiting(kernel: Any) -> dict[str, set[str]]:
    """Accesses and ends that some path reaches without a wait: by instruction, the tensors reached."""
    statements, labels = _parse(kernel.asm["ptx"])
    tensors = _tensors_of_registers(statements, kernel.src.signature)
    done, seen, ahead = defaultdict(set), set(), [0]
    while ahead:
        at = ahead.pop()
        statement = statements[at]
        if at in seen or statement.name == _WAIT:
            continue
        seen.add(at)
        if _NOTED.match(statement.name):
            addresses = re.findall(r"\[\s*(%\w+)", statement.rest)  # of a copy, where to and where from
            done[statement.name] |= (tensors[addresses[-1]] or {"?"}) if addresses else set()
        assert not statement.name.startswith(("brx", "call")), statement
        jumps = statement.name.startswith("bra")
        if jumps:
            ahead.append(labels[statement.rest])
        if statement.predicate or not (jumps or statement.name in ("ret", "exit")):
            ahead.append(at + 1)
    return dict(done)


def _parse(ptx: str) -> tuple[list[_Statement], dict[str, int]]:
    """A kernel's statements, and where each label stands among them."""
    body = re.sub(r"//.*", "", ptx[ptx.index("\n{") + 2 : ptx.index("\n}")])
    statements, labels = [], {}
    for part in re.split(r"[;\n]", body):
        text = part.strip()
        if text.endswith(":"):
            labels[text[:-1]] = len(statements)
        elif (found := _STATEMENT.match(text)) and not text.startswith("."):
            predicate, name, rest = found.groups()
            into = re.match(r"\{[^}]*\}|[^,]*", rest)[0]
            written = [] if "[" in into else re.findall(r"%\w+", into)
            statements.append(
                _Statement(predicate, name, written, re.findall(r"%\w+", rest[len(into) :]), rest)
            )
    return statements, labels


def _tensors_of_registers(statements: list[_Statement], signature: dict[str, str]) -> dict[str, set[str]]:
    """The tensors that each register was computed from the address of; what was loaded from them tells no address."""
    given = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    tensors = defaultdict(set)
    for statement in statements:
        if statement.name.startswith("ld.param"):
            name, kind = given[int(re.search(r"_param_(\d+)", statement.rest)[1])]
            if kind.startswith("*"):
                tensors[statement.written[0]].add(name)
    changed = True
    while changed:
        changed = False
        for statement in statements:
            if not statement.name.startswith(("ld", "atom")):
                found = set().union(*(tensors[register] for register in statement.read))
                for register in statement.written:
                    changed |= not found <= tensors[register]
                    tensors[register] |= found
    return tensors
