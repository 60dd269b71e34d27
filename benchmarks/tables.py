"""The sweep's rows as CSV, and as a Markdown page to read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd

from benchmarks import grid
from benchmarks.measure import Row
from benchmarks.zoo import ALL


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file, none if it does not exist; a line cut short is left out."""
    if not path.exists():
        return []
    known = {f.name for f in fields(Row)}
    rows: list[Row] = []
    for line in path.read_text().splitlines():
        if not line.endswith("}"):
            continue
        rows.append(Row(**{key: value for key, value in json.loads(line).items() if key in known}))
    return rows


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One line a row, in the zoo's order, violations joined into one text."""
    order = {name: i for i, name in enumerate(ALL)}
    chosen = sorted(rows, key=lambda row: (order.get(row.model, len(order)), row.side, row.amount))
    table = pd.DataFrame([asdict(row) for row in chosen], columns=[f.name for f in fields(Row)])
    table["violations"] = [" | ".join(row.violations) for row in chosen]
    return table


def write(rows: Sequence[Row], csv: Path, heading: str) -> None:
    """Write `csv`, and beside it the same name with .md."""
    csv.parent.mkdir(parents=True, exist_ok=True)
    # A column of counts with gaps is one of floats to pandas, unless it is told otherwise: digits would be lost.
    counts = [name for name, told in get_type_hints(Row).items() if told in (int, int | None)]
    frame(rows).astype(dict.fromkeys(counts, "Int64")).to_csv(csv, index=False, float_format="%.4g")
    csv.with_suffix(".md").write_text(markdown(rows, heading))


def markdown(rows: Sequence[Row], heading: str) -> str:
    """Totals by setting, the rows out of bounds, and one table per setting."""
    table = frame(rows)
    settings = list(dict.fromkeys(zip(table.side, table.amount, strict=True)))
    broken = table[table.violations != ""]
    parts = [f"# {heading}", _LEGEND, "## By setting", _grid(_totals(table, settings)), "## Out of bounds"]
    if broken.empty:
        parts.append("None.")
    for _, row in broken.iterrows():
        parts.append(f"- {row.model}, {row.side} {row.amount:.0%}: {row.violations}")
    for side, amount in settings:
        parts += [
            f"## {side.capitalize()} masks, {amount:.0%}",
            _grid(_by_model(_select(table, side, amount))),
        ]
    refused = table[(table.first_refusals != "") & ~table.model.duplicated()]
    parts += ["## Refusals", "The first few of each network; the reports name them all."]
    parts += [f"- {row.model} ({row.refusals}): {row.first_refusals}" for _, row in refused.iterrows()]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"


_LEGEND = """Errors are relative to the greatest magnitude of the output, on fresh inputs, against the masked
network: float64 is the worse of batch 1 and a larger one. Bytes are those copied to select channels, for one image in
float32, in KiB; channels are the gathered ones. `proven` counts segments whose order is proven optimal.
UPSCALE runs on the same masks, and a dash says that it raises. Parameters in thousands."""


def _select(table: pd.DataFrame, side: str, amount: float) -> pd.DataFrame:
    return table.loc[(table.side == side) & (table.amount == amount)]


def _totals(table: pd.DataFrame, settings: list[tuple[str, float]]) -> list[dict[str, str]]:
    lines: list[dict[str, str]] = []
    for side, amount in settings:
        part = _select(table, side, amount)
        both = part[(part.status == "ok") & (part.upscale_status == "ok")]
        lines.append(
            {
                "masks": f"{side} {amount:.0%}",
                "networks": str(len(part)),
                "ran": str(int((part.status == "ok").sum())),
                "in bounds": str(int((part.violations == "").sum())),
                "worst float64": _error(part[["error64", "error64_batch"]].max().max()),
                "worst float32": _error(part.error32.max()),
                "proven": f"{_count(part.segments_optimal.sum())} / {_count(part.segments.sum())}",
                "both ran": str(len(both)),
                "KiB chanopt": _kib(both.copied_bytes.sum()),
                "KiB UPSCALE": _kib(both.upscale_bytes.sum()),
                "channels chanopt": _count(both.gathered_channels.sum()),
                "channels UPSCALE": _count(both.upscale_channels.sum()),
                "param. chanopt": _thousands(both.parameters.sum()),
                "param. UPSCALE": _thousands(both.upscale_parameters.sum()),
            }
        )
    return lines


def _by_model(part: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {
            "network": row.model,
            "float64": _error(pd.Series([row.error64, row.error64_batch]).max()),
            "float32": _error(row.error32),
            "param. dense": _thousands(row.parameters_dense),
            "chanopt": _thousands(row.parameters),
            "UPSCALE": _thousands(row.upscale_parameters),
            "copies": _count(row.copies),
            "UPSCALE ": _count(row.upscale_copies),
            "channels": _count(row.gathered_channels),
            "UPSCALE  ": _count(row.upscale_channels),
            "KiB": _kib(row.copied_bytes),
            "UPSCALE   ": _kib(row.upscale_bytes),
            "proven": f"{_count(row.segments_optimal)} / {_count(row.segments)}",
            "refusals": _count(row.refusals),
            "optimise s": _seconds(row.optimize_seconds),
            "UPSCALE s": _seconds(row.upscale_seconds),
        }
        for _, row in part.iterrows()
    ]


def _grid(lines: list[dict[str, str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    if not lines:
        return ""
    heads = list(lines[0])
    return grid.table([head.strip() for head in heads], ([line[head] for head in heads] for line in lines))


def _number(value: Any, form: str, scale: float = 1.0) -> str:
    # Not a number means not measured.
    number = math.nan if value is None else float(value)
    return "-" if math.isnan(number) else format(number * scale, form)


def _error(value: Any) -> str:
    return _number(value, ".1e")


def _count(value: Any) -> str:
    return _number(value, ",.0f")


def _seconds(value: Any) -> str:
    return _number(value, ".2f")


def _thousands(value: Any) -> str:
    return _number(value, ",.0f", 1 / 1000)


def _kib(value: Any) -> str:
    return _number(value, ",.0f", 1 / 1024)
