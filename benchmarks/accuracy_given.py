"""Accuracies that a user gives `python -m benchmarks page` as a CSV file: reading them, and whose they are.

`benchmarks.page` says what the columns are.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from benchmarks import cases
from benchmarks.cases import Mask, Record
from benchmarks.masks import Side

Key = tuple[str, Mask, str]
NEEDED = ("accuracy", "amount", "arm", "model")
"""The columns that a file must have."""


@dataclass(frozen=True, slots=True)
class Given:
    """A line of a CSV file of accuracies.

    Attributes:
        line: its number in the file.
        model, mask, arm: what the accuracy is of.
        latency_ms: the median that the file has for it; None if it has none.
    """

    line: int
    model: str
    mask: Mask
    arm: str
    accuracy: float
    latency_ms: float | None = None

    @property
    def key(self) -> Key:
        """What the accuracy is of."""
        return self.model, self.mask, self.arm

    def __str__(self) -> str:
        return f"line {self.line} ({self.model}, {self.mask}, {self.arm})"


_OWN = {"net", "amount", "arm", "accuracy", "latency_ms"}
"""Columns of what `python -m benchmarks accuracy` writes: its networks and arms are not those that `run` times."""


def read(path: Path) -> tuple[list[Given], bool]:
    """What a CSV file of accuracies has, and whether it brings its own latencies.

    Raises:
        OSError: the file cannot be read.
        ValueError: a column is missing, a cell means nothing, or two lines tell two accuracies of the same.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        heads, cells = list(reader.fieldnames or ()), [(reader.line_num, row) for row in reader]
    own = set(heads) >= _OWN
    if not own and not set(heads) >= {*NEEDED}:
        raise ValueError(
            f"{path}: expected the columns {', '.join(NEEDED)}, found {', '.join(heads) or 'none'}: name them so, "
            "or give the accuracy.csv that python -m benchmarks accuracy writes"
        )
    found = [_given(path, line, row, own=own) for line, row in cells]
    if not own:
        _check_told_once(path, found)
    return found, own


def _check_told_once(path: Path, lines: Iterable[Given]) -> None:
    known: dict[Key, Given] = {}
    for line in lines:
        before = known.setdefault(line.key, line)
        if before.accuracy != line.accuracy:
            raise ValueError(f"{path}, {line}: expected one accuracy, found {before.accuracy:g} and {line.accuracy:g}")


def _given(path: Path, line: int, row: Mapping[str, Any], *, own: bool) -> Given:
    try:
        mask = Mask(amount=cases.amount(row["amount"] or "")) if own else _mask(row)
        spread = json.loads(row["latency_ms"]) if own and row["latency_ms"] else None
        model = row["net" if own else "model"]
        return Given(line, model, mask, row["arm"], _number(row["accuracy"]), spread[1] if spread else None)
    except (ValueError, TypeError, LookupError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{path}, line {line}: {error}") from None


def _mask(row: Mapping[str, Any]) -> Mask:
    """The mask that a line describes; what it does not say is as `run` does it by default."""
    words: dict[str, Any] = {name: row[name] for name in ("side", "criterion", "scope") if row.get(name)}
    for name, known in (("side", get_args(Side)), ("criterion", cases.CRITERIA), ("scope", cases.SCOPES)):
        if words.get(name, known[0]) not in known:
            raise ValueError(f"expected a {name} among {', '.join(known)}, found {words[name]!r}")
    seed = cases.at_least(0)(row["seed"]) if row.get("seed") else 0
    return _plain(Mask(amount=cases.amount(row["amount"] or ""), seed=seed, **words))


def _plain(mask: Mask) -> Mask:
    """A mask without what does not matter: only a random choice has a seed."""
    return mask if mask.criterion == "random" else replace(mask, seed=0)


def _number(text: str | None) -> float:
    with contextlib.suppress(ValueError):
        if text and math.isfinite(float(text)):
            return float(text)
    raise ValueError(f"expected an accuracy as a number, as in 0.71, found {text!r}")


def added(rows: Sequence[Mapping[str, Any]], path: Path | None) -> list[dict[str, Any]]:
    """Records with the accuracies that a CSV file has for their networks, masks and arms.

    Standard error tells which lines of the file are of none of the records.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not as `read` expects it.
    """
    lines, own = read(path) if path else ([], False)
    if own or not lines:
        return [dict(row) for row in rows]
    known = {line.key: line for line in lines}
    records = [Record.of(row) for row in rows]
    keys = [(r.case.model, _plain(r.case.mask), r.arm) for r in records]
    if strange := [str(line) for key, line in known.items() if key not in keys]:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        print(
            f"{path}: expected networks, masks and arms that were timed, found others, which are left out: "
            f"{'; '.join(strange[:5])}{more}",
            file=sys.stderr,
        )
    return [
        replace(record, accuracy=known[key].accuracy if key in known else record.accuracy).to_dict()
        for record, key in zip(records, keys, strict=True)
    ]


def file(text: str) -> Path:
    """Parse the name of a CSV file of accuracies, for command lines: it is read before anything is written."""
    path = Path(text)
    try:
        read(path)
    except (OSError, ValueError, csv.Error) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path
