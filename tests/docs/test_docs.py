"""The pages in docs/: every Python block runs, in order, and prints what the text block after it says.

Blocks that take long, or whose libraries warn, are marked ``py`` instead of ``python``; they check themselves by assert,
and run in a slow test.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import linecache
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMPARE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line its text begins on."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        yield Block(found[1], found[2], text.count("\n", 0, found.start(2)) + 1)


def run(block: Block, page: Path, names: dict[str, Any]) -> str:
    """What a block prints. Its lines keep their numbers on the page, in tracebacks and in the IR."""
    name = f"docs/{page.name}"
    lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
    linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
    padded = "\n" * (block.line - 1) + block.text
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(padded, name, "exec", dont_inherit=True), names)
    return printed.getvalue()


def check(page: Path, languages: tuple[str, ...] = ("python",)) -> int:
    """Run the blocks of a page in some languages; returns how many outputs were compared."""
    names: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    printed, compared = "", 0
    for block in blocks(page):
        if block.language in languages:
            _require_shown(printed, f"{page.name}, before line {block.line}")
            printed = run(block, page, names)
        if block.language == "text":
            _require_same(block, printed, page)
            printed, compared = "", compared + 1
    _require_shown(printed, f"{page.name}, at its end")
    return compared


def _require_shown(printed: str, where: str) -> None:
    if printed:
        raise AssertionError(f"{where}: the page does not show what is printed: {printed!r}")


def _require_same(block: Block, printed: str, page: Path) -> None:
    if not doctest.OutputChecker().check_output(block.text, printed, _COMPARE):
        raise AssertionError(f"{page.name}, line {block.line}: expected\n{block.text}found\n{printed}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_does_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # pages write files
    outputs = sum(block.language == "text" for block in blocks(page))
    assert check(page) == outputs


SLOW = [page for page in PAGES if any(block.language == "py" for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("page", SLOW, ids=lambda page: page.stem)
def test_the_page_with_its_slow_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check(page, ("python", "py")) > 0


def test_no_code_on_a_page_is_left_out() -> None:
    """What is in no other language is run; a shell command is not."""
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert languages <= {"python", "py", "text", "ebnf", "sh", "yaml", "json", ""}
    assert "export" in {page.stem for page in SLOW}


def test_the_pages_that_are_meant_to_be_run_have_blocks() -> None:
    counts = {page.stem: sum(block.language == "python" for block in blocks(page)) for page in PAGES}
    assert counts["ir"] >= 4
    assert counts["writing_passes"] >= 8
    assert counts["architecture"] >= 1


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("```python\nprint(1)\n```\n```text\n2\n```\n", "line 5: expected\n2\nfound\n1"),
        ("```python\nprint(1)\n```\n", "at its end: the page does not show what is printed"),
        ("```python\nprint(1)\n```\n```python\nprint(2)\n```\n", "before line 5: the page does not show"),
    ],
)
def test_a_page_that_is_wrong_is_found_out(page: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(AssertionError, match=re.escape(told)):
        check(tmp_path / "page.md")


def test_the_pass_on_the_page_has_15_lines() -> None:
    (listing,) = (b.text for b in blocks(DOCS / "writing_passes.md") if "class MergeRelus(Pass)" in b.text)
    lines = [line for line in listing.splitlines() if line.strip() and not re.match(r"from|import", line)]
    assert len(lines) <= 15


def test_links_between_pages_lead_somewhere() -> None:
    links = [
        (page.name, link)
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    ]
    assert links
    assert [link for link in links if not (DOCS / link[1]).exists()] == []


def test_files_that_the_pages_name_exist() -> None:
    named = {
        name
        for page in PAGES
        for name in re.findall(r"`((?:src|tests|passes|benchmarks|docs)/[\w./]+)`", page.read_text(encoding="utf-8"))
    }
    assert named
    assert [name for name in sorted(named) if not (DOCS.parent / name).exists()] == []


def test_the_readme_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes a model and an input as given, and prints a report that is not shown."""
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    with torch.no_grad():
        model[2].weight[:, ::2] = 0  # pyright: ignore[reportIndexIssue]
    names: dict[str, Any] = {"__name__": "readme", "model": model, "x": torch.randn(1, 3, 8, 8)}
    for block in blocks(DOCS.parent / "README.md"):
        if block.language == "python":
            exec(compile(block.text, "README.md", "exec", dont_inherit=True), names)
    assert "multiply-accumulates" in capsys.readouterr().out
    assert torch.equal(names["slim"](names["x"]), names["fast"](names["x"]))
