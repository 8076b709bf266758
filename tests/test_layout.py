# SPDX-License-Identifier: GPL-2.0-only
"""The package is built as the map in CONTRIBUTING.md says: rooms, what each imports, no circle, no file too long."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "uffd_selftests"
MAP = ROOT / "CONTRIBUTING.md"
ROW = re.compile(r"^\| `(\w+)(?:/|\.py)` \| [^|]+ \|(.*)\|$", re.MULTILINE)
MAX_LINES = 620
MIRRORED = ("abi", "catalog", "command", "formats", "harness", "machine", "probe", "report", "soak", "toolkit", "vm")


class Import(NamedTuple):
    """One import of a module of the package."""

    module: str
    line: int
    for_types: bool
    """Only a type checker follows it."""
    in_function: bool


@cache
def modules() -> dict[str, Path]:
    """Return the files of the package by the names of their modules."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Return what a module imports of the package, wherever the import stands."""
    found = []
    tree = ast.parse(modules()[module].read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    hidden = {id(inner) for function in functions for inner in ast.walk(function)}
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {id(inner) for guard in guards for inner in ast.walk(guard)}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else str(node.module) for name in names]
        else:
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] == PACKAGE.name:
                found.append(Import(name, node.lineno, id(node) in for_types, id(node) in hidden))
    return tuple(found)


def room(module: str) -> str:
    """Return the name of the room that a module is in; empty for the package itself."""
    return [*module.split("."), ""][1]


def rooms() -> dict[str, set[str]]:
    """Return the rooms of the map with what each may import."""
    return {name: set(re.findall(r"`(\w+)`", allowed)) for name, allowed in ROW.findall(MAP.read_text())}


def test_every_room_is_on_the_map() -> None:
    """The map has a line for each folder and each file at the top of the package, and for nothing else."""
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" and path.stem != "__init__"}
    there |= {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert set(rooms()) == there


def test_imports_are_those_of_the_map() -> None:
    """A room imports what its line names, and all of it."""
    seen: dict[str, set[str]] = {name: set() for name in rooms()}
    for module in modules():
        for other in imports(module):
            if room(module) and room(other.module) not in ("", room(module)):
                seen[room(module)].add(room(other.module))
    assert seen == rooms()


def test_map_points_one_way() -> None:
    """What a room may import stands above it, save that the toolkit and the memory types know each other."""
    order = list(rooms())
    upward = {
        (name, other)
        for name, allowed in rooms().items()
        for other in allowed
        if order.index(other) > order.index(name)
    }
    assert upward == {("toolkit", "mem_types")}


def test_no_circles() -> None:
    """No module imports itself by way of others, not even from inside a function."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in imports(module):
                if other.module in modules() and not other.for_types:
                    visit(other.module, (*way, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_hidden_imports_have_a_reason() -> None:
    """An import inside a function says why it is there: itself, or the first of those that stand together."""
    for module, path in modules().items():
        lines = path.read_text().splitlines()
        for other in imports(module):
            if other.in_function and not other.for_types:
                first = other.line - 1
                while "import" in lines[first - 1] and "noqa: PLC0415" in lines[first - 1]:
                    first -= 1
                assert re.search(r"# noqa: PLC0415  # \S", lines[first]), (
                    f"{path}:{other.line}: {lines[other.line - 1]}"
                )


def test_a_case_has_one_import() -> None:
    """A file of cases names how they are declared and common.py, and nothing that is behind it."""
    for module in modules():
        if room(module) == "cases":
            allowed = {"uffd_selftests.case", "uffd_selftests.common"}
            assert {other.module for other in imports(module)} <= allowed, module


def test_no_file_is_too_long() -> None:
    """Nobody has to read more than some 600 lines of code to know a file."""
    code = [path for path in PACKAGE.rglob("*.*") if path.suffix in (".py", ".c", ".h") and path.name != "_native.c"]
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in code}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_tests_mirror_the_package() -> None:
    """What is tested in tests/ROOM/test_FILE.py is ROOM/FILE.py."""
    for name in MIRRORED:
        for path in (ROOT / "tests" / name).rglob("test_*.py"):
            stem = path.stem.removeprefix("test_")
            assert list((PACKAGE / name).rglob(f"{stem}.*")) or (PACKAGE / name / stem).is_dir(), path
