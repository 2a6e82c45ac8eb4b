"""The house rules that a machine can hold: floors, file sizes, the public list."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import quire

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "quire"
MODULES = sorted(SOURCE.rglob("*.py"))
EVERY_FILE = sorted(
    path
    for room in ("src", "benchmarks", "tests", "examples", "scripts")
    for path in (ROOT / room).rglob("*.py")
)

# A module may import from floors below its own, and from its own room. Rooms on one floor are blind to each
# other, but for floor 0, which is one room.
ROOMS = {
    0: ["errors|spec|state|debug|spans|assets"],
    1: ["pages", "planning", "kernels"],
    2: ["ops"],
    3: ["hf", "vllm"],
    4: ["engine"],
    5: ["serve"],
    6: ["cli"],
}
# Where the rooms of floor 1 meet: plain values, and the door to the compiler. These import floor 0 and one another.
MEETING_POINTS = ("planning.work_list", "kernels.compile", "kernels.pipeline", "kernels.ahead")
BACKENDS = ("reference", "cpu", "triton")


def place(module: str) -> tuple[int, str]:
    """Floor and room of a module named below quire, such as `kernels.cpu.decode`."""
    top = module.split(".")[0]
    for floor, rooms in ROOMS.items():
        for room in rooms:
            if top in room.split("|"):
                return floor, room
    raise AssertionError(f"quire.{module} stands on no floor: give it one in ROOMS")


def imports(path: Path) -> list[str]:
    """Modules below quire that a file imports, wherever in the file, as dotted names without `quire.`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += names if node.module == "quire" else [node.module, *names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    inside = [name.removeprefix("quire.") for name in found if name.startswith("quire.")]
    return [name for name in inside if is_module(name)]


def is_module(name: str) -> bool:
    path = SOURCE / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_takes_the_place_of_a_public_name():
    """`import quire.plan` would make the function `quire.plan` a module."""
    assert [name for name in quire.__all__ if is_module(name)] == []


INSIDE = [path for path in MODULES if module_name(path) not in ("", "__main__")]


@pytest.mark.parametrize("path", INSIDE, ids=module_name)
def test_imports_run_downwards(path):
    floor, room = place(module_name(path))
    for imported in imports(path):
        other_floor, other_room = place(imported)
        allowed = other_floor < floor or other_room == room or imported in MEETING_POINTS
        assert allowed, f"{module_name(path)} imports quire.{imported}"


@pytest.mark.parametrize("name", MEETING_POINTS)
def test_meeting_points_see_floor_0_and_one_another_alone(name):
    path = SOURCE / Path(*name.split(".")).with_suffix(".py")
    assert all(place(imported)[0] == 0 or imported in MEETING_POINTS for imported in imports(path))


@pytest.mark.parametrize("room", ROOMS[1])
def test_a_package_with_a_meeting_point_is_light(room):
    """Importing a meeting point runs its package's __init__, which must not pull the other room in."""
    if any(point.startswith(f"{room}.") for point in MEETING_POINTS):
        assert all(place(i)[0] == 0 for i in imports(SOURCE / room / "__init__.py"))


@pytest.mark.parametrize("path", INSIDE, ids=module_name)
def test_no_module_reaches_down_through_the_front_door(path):
    """`import quire` from inside would make the floors a circle; only the command line stands outside."""
    tree = ast.parse(path.read_text())
    bare = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for a in node.names
        if a.name == "quire"
    ]
    assert not bare or place(module_name(path))[0] == 6


@pytest.mark.parametrize("path", sorted((SOURCE / "kernels").rglob("*.py")), ids=module_name)
def test_backends_never_import_one_another(path):
    name = module_name(path)
    for backend in BACKENDS:
        for other in BACKENDS:
            if backend != other and f"kernels.{backend}" in name:
                assert not [i for i in imports(path) if i.startswith(f"kernels.{other}")]


def code_lines(source: str) -> int:
    """Lines that hold code: neither blank, nor a comment, nor part of a docstring."""
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_holds_more_than_500_lines_of_code(path):
    assert code_lines(path.read_text()) <= 500


def test_lines_of_code_are_counted_without_comments_and_docstrings():
    assert code_lines('"""One.\n\nTwo."""\n\n# three\nx = 1  # four\ny = (\n    2\n)\n') == 4


def test_the_public_list_is_sorted_and_true():
    assert quire.__all__ == sorted(quire.__all__)
    for name in quire.__all__:
        assert getattr(quire, name) is not None


def loaded(code: str, *modules: str) -> list[str]:
    """Which of these modules a fresh interpreter has loaded after a few statements."""
    code += f"\nimport sys; print('LOADED', *(m for m in {modules!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.rpartition("LOADED")[2].split()


def test_importing_quire_loads_no_library():
    heavy = ("torch", "numpy", "numba", "llvmlite", "triton", "transformers", "rich")
    assert loaded("import quire; quire.ShapeError, dir(quire)", *heavy) == []


def test_the_operators_load_no_compiler_and_no_models():
    names = "plan, paged_attention, write_kv, merge, warm_up, AttentionSpec, KVPool, PageTable, PrefixCache"
    assert loaded(f"from quire import {names}", "numba", "triton", "transformers", "rich") == []


def test_every_public_name_is_found_where_it_is_said_to_be_and_kept():
    assert set(quire.__all__) <= set(dir(quire))
    for name in quire.__all__:
        assert getattr(quire, name) is vars(quire)[name]
    with pytest.raises(AttributeError, match="no attribute 'paged_attenton'"):
        quire.paged_attenton  # noqa: B018
