"""The report as text: what ``print(chanopt.explain(fast))`` shows."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from chanopt.ir import Refusal
from chanopt.report.report import LayerReport, Report, SegmentReport
from chanopt.report.units import count, duration, ratio, shortened, size, tail
from chanopt.report.views import branching, cut_text, cuts, gathered, original_bytes, proof, reasons

WIDTH = 120
"""No line is longer."""
_NAME = 40
_GAP = "  "


@dataclass(frozen=True, slots=True)
class _Column:
    """A column: its heading, whether its cells stand on the right, how many characters a cell may have."""

    heading: str
    right: bool = True
    most: int = WIDTH


_Row = Sequence[str]


def render(report: Report, rows: int | None = 30) -> str:
    """The report as text of at most 120 columns.

    Args:
        report: the report.
        rows: how many rows of a table are shown; None shows all.
    """
    sections = (
        _headline(report),
        _segments(report, rows),
        _cuts(report, rows),
        _layers(report.layers, rows),
        _refusals(report.refusals, rows),
        _timings(report, rows),
    )
    return "\n\n".join("\n".join(line.rstrip() for line in section) for section in sections if section)


def _headline(report: Report) -> list[str]:
    columns = (
        _Column(report.model, right=False, most=_NAME),
        _Column("before"),
        _Column("after"),
        _Column("", right=False),
    )
    before, after = gathered(report)
    figures = [
        _figure("multiply-accumulates", report.macs_before, report.macs_after, count),
        _figure("parameters", report.parameters_before, report.parameters_after, count),
        _figure("bytes gathered", before, after, size),
    ]
    reads = f"{report.consumers} consumers: {report.slices} slices, {report.gathers} with a gather"
    copied = f"{count(report.gathered_channels)} channels, {size(report.copied_bytes)}"
    return [*_table(columns, figures, None), "", f"{reads}; {report.copies} copies of {copied}"]


def _figure(name: str, before: float, after: float, show: Callable[[float], str]) -> _Row:
    return name, show(before), show(after), ratio(before, after)


def _segments(report: Report, limit: int | None) -> list[str]:
    shown = branching(report)
    single = len(report.segments) - len(shown)
    rest = f"{single} more with a single reader" if single else ""
    if not shown:
        return [f"Segments: none has two readers{'; ' + rest if rest else ''}"]
    columns = (
        _Column("segment", right=False, most=_NAME),
        _Column("readers"),
        _Column("channels"),
        _Column("gather"),
        _Column("cuts"),
        _Column("original"),
        _Column("gathered"),
        _Column("bound"),
        _Column("optimal"),
        _Column("time"),
    )
    title = "Segments: bytes gathered in the original order and in the order found, and the proven lower bound"
    table = _table(columns, [_segment(segment) for segment in shown], limit)
    return [title, *table, rest] if rest else [title, *table]


def _segment(segment: SegmentReport) -> _Row:
    return (
        segment.name,
        str(len(segment.instance.readers)),
        str(segment.instance.channels),
        str(len(segment.solution.gathered)),
        str(len(segment.solution.cut)),
        size(original_bytes(segment)),
        size(segment.objective),
        size(segment.bound),
        proof(segment),
        duration(segment.seconds),
    )


def _cuts(report: Report, limit: int | None) -> list[str]:
    rows = [(segment.name, cut_text(cut)) for segment in report.segments for cut in cuts(segment)]
    columns = (_Column("cut segment", right=False, most=_NAME), _Column("where", right=False))
    return _table(columns, rows, limit) if rows else []


def _layers(layers: Sequence[LayerReport], limit: int | None) -> list[str]:
    if not layers:
        return []
    columns = (
        _Column("layer", right=False, most=_NAME),
        _Column("in"),
        _Column("out"),
        _Column("reads", right=False),
        _Column("MACs left"),
    )
    rows = [_layer(layer) for layer in layers]
    room = WIDTH - len(_table(columns, rows, limit)[0]) - len(_GAP)
    wide = (*columns, _Column("outputs kept for (channels)", right=False))
    return _table(wide, [(*row, _why(layer, room)) for row, layer in zip(rows, layers, strict=True)], limit)


def _layer(layer: LayerReport) -> _Row:
    return (
        layer.name,
        _change(layer.channels_in),
        _change(layer.channels_out),
        f"{layer.reads}, {layer.way}" if layer.way not in ("", "view", "gather", layer.reads) else layer.reads,
        count(layer.macs[1]),
    )


def _change(pair: tuple[int, int]) -> str:
    """Both aligned at the arrow, as the column stands on the right."""
    return f"{pair[0]} -> {pair[1]:>4}"


def _why(layer: LayerReport, width: int) -> str:
    """The two main reasons, or the main one if there is no room for two, and how many more there are."""
    found = reasons(layer)
    two = _first(found, 2, 28)
    return two if len(two) <= width else _first(found, 1, width - 16)


def _first(found: Sequence[tuple[str, int]], most: int, width: int) -> str:
    shown = ", ".join(f"{tail(why, width)} ({channels})" for why, channels in found[:most])
    return f"{shown}, +{len(found) - most}" if len(found) > most else shown


def _refusals(refusals: Sequence[Refusal], limit: int | None) -> list[str]:
    if not refusals:
        return []
    lines = ["Refusals: operators without a channel rule, whose operands were left whole"]
    for refusal in refusals[:limit]:
        where = " ".join(
            part
            for part in (
                refusal.op,
                f"in {refusal.layer}" if refusal.layer else "",
                f"from {refusal.source}" if refusal.source else "",
            )
            if part
        )
        lines += _wrapped(where, "  ") + _wrapped(refusal.reason, "      ")
    return lines + _more(len(refusals), limit)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent=indent, subsequent_indent=indent + "    ")


def _timings(report: Report, limit: int | None) -> list[str]:
    if not report.seconds:
        return []
    columns = (_Column("stage", right=False, most=_NAME), _Column("time"))
    return _table(columns, [(stage, duration(spent)) for stage, spent in report.seconds.items()], limit)


def _table(columns: Sequence[_Column], rows: Sequence[_Row], limit: int | None) -> list[str]:
    """Lines of equal width: the headings, a rule, the rows, and how many rows are left out."""
    shown = [_shortened(columns, row) for row in rows[:limit]]
    headings = _shortened(columns, [column.heading for column in columns])
    widths = [max(map(len, cells)) for cells in zip(headings, *shown, strict=True)]
    widths[-1] = min(widths[-1], WIDTH - sum(widths[:-1]) - len(_GAP) * (len(columns) - 1))
    rule = ["-" * width for width in widths]
    return [_line(columns, widths, cells) for cells in (headings, rule, *shown)] + _more(len(rows), limit)


def _shortened(columns: Sequence[_Column], row: _Row) -> list[str]:
    return [shortened(cell, column.most) for column, cell in zip(columns, row, strict=True)]


def _line(columns: Sequence[_Column], widths: Sequence[int], cells: Iterable[str]) -> str:
    fitted = zip(columns, widths, cells, strict=True)
    return _GAP.join(
        (_cut(cell, width).rjust if column.right else _cut(cell, width).ljust)(width) for column, width, cell in fitted
    )


def _cut(cell: str, width: int) -> str:
    return cell if len(cell) <= width else f"{cell[: width - 3]}..."


def _more(total: int, limit: int | None) -> list[str]:
    return [f"... and {total - limit} more"] if limit is not None and total > limit else []
