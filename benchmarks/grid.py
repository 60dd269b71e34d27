"""Tables in Markdown, for every page that a benchmark writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right.

    >>> print(table(["a", "b"], [["x", 1]]))
    | a | b |
    | :-- | --: |
    | x | 1 |
    """
    rule = [":--"] + ["--:"] * (len(heads) - 1)
    body = [[str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [list(heads), rule, *body])
