"""Imports go the way that docs/architecture.md says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "chanopt"
_ROW = re.compile(r"^\| `(\w+)` \|(.*)\|$", re.MULTILINE)


def allowed() -> dict[str, set[str]]:
    """What each part may import, off the page's table."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Which way imports go")[2]
    return {row[1]: set(re.findall(r"`(\w+)`", row[2])) for row in _ROW.finditer(table)}


def files() -> list[tuple[str, Path]]:
    """Every module of the package with the part it belongs to: its folder, or its own name."""
    own = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] != "passes"]
    found = [(path.relative_to(SOURCE).parts[0].removesuffix(".py"), path) for path in sorted(own)]
    return found + [("passes", path) for path in sorted((ROOT / "passes").rglob("*.py"))]


def imported(code: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, part) of every import of chanopt's own in a module, wherever in it, relative ones resolved."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*above, *([node.module] if node.module else [])])
            names = [stem] if "." in stem else [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "chanopt":
                yield node.lineno, parts[1] if len(parts) > 1 else "__init__"


def package_of(part: str, path: Path) -> str:
    return f"chanopt.{part}" if path.parent != SOURCE else "chanopt"


def test_every_part_has_a_row() -> None:
    assert {part for part, _ in files()} == set(allowed())


def test_the_table_has_no_circle() -> None:
    graph = nx.DiGraph((part, other) for part, others in allowed().items() for other in others)
    assert list(nx.simple_cycles(graph)) == []


def test_imports_go_the_way_the_table_says() -> None:
    table = allowed()
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {part} imports {other}"
        for part, path in files()
        for line, other in imported(path.read_text(encoding="utf-8"), package_of(part, path))
        if other != part and other not in table[part]
    ]
    assert wrong == []


def test_the_arrows_that_the_design_fixes() -> None:
    table = allowed()
    assert table["errors"] == set()
    assert table["ir"] == table["solve"] == {"errors"}
    assert {part for part, others in table.items() if "api" in others} == {
        "__init__",
        "backend",
        "cli",
        "demo",
        "pruning",
    }
    graph = nx.DiGraph((part, other) for part, others in table.items() for other in others)
    assert "passes" not in nx.descendants(graph, "frontend")
    assert "frontend" not in nx.descendants(graph, "passes")
    assert "codegen" not in nx.descendants(graph, "passes")


def test_the_solver_knows_no_torch() -> None:
    for path in sorted((SOURCE / "solve").glob("*.py")):
        modules = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert "torch" not in modules, path.name


def test_the_ir_names_no_operator() -> None:
    for path in sorted((SOURCE / "ir").glob("*.py")):
        code = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(code)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        named = [
            node.value
            for node in ast.walk(code)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in documentation
            and "aten." in node.value
        ]
        assert named == [], path.name


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("import chanopt.api", ["api"]),
        ("import chanopt", ["__init__"]),
        ("from chanopt import api, demo", ["api", "demo"]),
        ("from chanopt.report.text import render", ["report"]),
        ("def f():\n    from chanopt.api import optimize", ["api"]),
        ("from . import text", ["ir"]),
        ("from .text import write", ["ir"]),
        ("from .. import api", ["api"]),
        ("import torch, os.path", []),
    ],
)
def test_imports_of_every_spelling_are_seen(code: str, parts: list[str]) -> None:
    assert [part for _, part in imported(code, "chanopt.ir")] == parts
