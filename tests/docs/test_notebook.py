"""The notebook in docs/: executed, and its cells still print what it shows."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "quickstart.ipynb"


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"])


def test_every_cell_was_executed_in_order() -> None:
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    assert sum(bool(shown(cell)) for cell in cells()) >= 4


def test_the_cells_print_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # one cell writes a file
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {cell['execution_count']}", "exec"), names)
        assert printed.getvalue() == shown(cell), cell["execution_count"]


def test_the_notebook_says_what_the_page_says() -> None:
    page = NOTEBOOK.with_suffix(".md").read_text(encoding="utf-8")
    assert cells()
    for cell in cells():
        assert "".join(cell["source"]) in page
