"""Every example runs, and every Python block of the README and the docs does what is printed below it.

In a Markdown file the blocks fenced as ```python run one after the other, in one namespace. A block fenced as
```text or ```output that follows directly holds what the block before it prints. Code that is not meant to run, as
it needs what a test machine lacks, is fenced as ```py.
"""

from __future__ import annotations

import re
import runpy
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Python code of a page, the line it starts on, and what it should print; None where nothing is said."""

    line: int
    code: str
    expected: str | None


def blocks_of(markdown: str) -> list[Block]:
    fences = list(FENCED.finditer(markdown))
    blocks = []
    for fence, following in zip_longest(fences, fences[1:]):
        if fence[1] != "python":
            continue
        told = (
            following is not None
            and following[1] in ("text", "output")
            and not markdown[fence.end() : following.start()].strip()
        )
        line = markdown.count("\n", 0, fence.start(2)) + 1
        blocks.append(Block(line, fence[2], following[2] if told else None))
    return blocks


PAGES_WITH_CODE = [page for page in PAGES if blocks_of(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_shows_something(example, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda path: path.name)
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        # Leading newlines, so that a traceback names the line of the page.
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
        printed = capsys.readouterr().out
        if block.expected is not None:
            assert without_trailing_space(printed) == without_trailing_space(block.expected)


def without_trailing_space(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def test_blocks_are_told_apart_by_their_fences():
    page = """
```python
a = 1
```

```text
what it prints
```
Words between.
```python
print(a)
```
words
```text
other
```
```py
undefined
```
```bash
ls
```
```python title="x"
print(2)
```
```output
2
```
"""
    first, second, third = blocks_of(page)
    assert first == Block(3, "a = 1\n", "what it prints\n")
    assert second == Block(11, "print(a)\n", None)
    assert third.code == "print(2)\n"
    assert third.expected == "2\n"
