"""The report as one self-contained HTML page, with a picture of every segment of two readers or more."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from chanopt.errors import ChanoptError
from chanopt.report.report import LayerReport, Report, SegmentReport
from chanopt.report.units import count, duration, ratio, shortened, size, tail
from chanopt.report.views import (
    Cut,
    Row,
    branching,
    cut_text,
    cuts,
    folded,
    gathered,
    original_bytes,
    proof,
    reasons,
    rows,
)

if TYPE_CHECKING:
    from jinja2 import Template

COLUMNS = 1500
"""Columns of a picture; more channels share columns, as a screen has no more pixels anyway."""
OPEN = 6
"""Pictures that are drawn open: those of the segments where most bytes were at stake."""
ROW = 18
"""Pixels from one reader to the next."""
GAP = 24
"""Pixels between readers of different layouts, for the cut."""
READS = ("whole", "range", "fused", "gather", "gone")


@dataclass(frozen=True, slots=True)
class _Tile:
    """A headline figure; ``left`` is what is left of the figure before, from 0 to 1."""

    heading: str
    value: str
    note: str
    left: float | None = None


@dataclass(frozen=True, slots=True)
class _Label:
    """A reader's line beside the pictures, ``top`` pixels down."""

    top: int
    name: str
    price: str
    free: bool


@dataclass(frozen=True, slots=True)
class _Strip:
    """A reader's line in a picture: an SVG path through the columns it reads."""

    path: str
    free: bool
    title: str


@dataclass(frozen=True, slots=True)
class _Side:
    """One picture: the channels in one order."""

    key: str
    heading: str
    title: str
    description: str
    strips: tuple[_Strip, ...]


@dataclass(frozen=True, slots=True)
class _Picture:
    """A segment's readers by its channels, before and after ordering."""

    segment: SegmentReport
    original: float
    left: float
    proof: str
    open: bool
    columns: int
    fold: int
    height: int
    labels: tuple[_Label, ...]
    tracks: str
    sides: tuple[_Side, _Side]
    marks: tuple[tuple[int, str], ...]
    cuts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A row of the layers' table; ``was`` and ``left`` are shares of the most MACs of a layer, in percent."""

    layer: LayerReport
    was: float
    left: float
    reasons: tuple[tuple[str, int], ...]
    more: int


def render(report: Report) -> str:
    """The report as one page of HTML: no scripts, and nothing that is loaded from elsewhere.

    Raises:
        ChanoptError: jinja2 is not installed.
    """
    shown = branching(report)
    at_stake = sorted(range(len(shown)), key=lambda number: -original_bytes(shown[number]))
    opened = set(at_stake[:OPEN])
    pictures = [_picture(segment, number, number in opened) for number, segment in enumerate(shown)]
    reads = Counter(layer.reads for layer in report.layers)
    return _template().render(
        report=report,
        tiles=_tiles(report),
        reads=[(how, reads[how]) for how in READS if reads[how]],
        pictures=pictures,
        single=len(report.segments) - len(shown),
        layers=_layers(report.layers),
        slowest=max(report.seconds.values(), default=0) or 1,
        style=resources.files("chanopt.report").joinpath("page.css").read_text(encoding="utf-8"),
        row=ROW,
    )


@functools.cache
def _template() -> Template:
    try:
        import jinja2
    except ImportError as error:
        raise ChanoptError(
            "expected jinja2 for the report as HTML, found that it is not installed: "
            "pip install 'chanopt[report]', or print the report as text"
        ) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Callable[..., Any]] = {
        "count": count,
        "size": size,
        "duration": duration,
        "tail": tail,
        "shortened": shortened,
    }
    environment.filters.update(filters)
    text = resources.files("chanopt.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


def _tiles(report: Report) -> list[_Tile]:
    before, after = gathered(report)
    proven = sum(segment.optimal for segment in report.segments)
    spent = sum(segment.seconds for segment in report.segments)
    tiles = [
        _less("Multiply-accumulates", report.macs_before, report.macs_after, count, "of {}"),
        _less("Parameters", report.parameters_before, report.parameters_after, count, "of {}"),
        _less("Bytes gathered", before, after, size, "against {} in the original order"),
        _Tile(
            "Copies at run time",
            str(report.copies),
            f"{count(report.gathered_channels)} channels, {size(report.copied_bytes)}",
        ),
    ]
    if not report.segments:
        return tiles
    note = f"segments whose order is proven optimal, in {duration(spent)}"
    return [*tiles, _Tile("Proof", f"{proven} of {len(report.segments)}", note)]


def _less(heading: str, before: float, after: float, show: Callable[[float], str], of: str) -> _Tile:
    left = after / before if before else None
    return _Tile(heading, show(after), f"{of.format(show(before))}: {ratio(before, after)}", left)


def _layers(layers: Iterable[LayerReport]) -> list[_Layer]:
    listed = list(layers)
    most = max((layer.macs[0] for layer in listed), default=0) or 1
    return [_layer(layer, most) for layer in listed]


def _layer(layer: LayerReport, most: int) -> _Layer:
    found = reasons(layer)
    was, left = (round(100 * macs / most, 1) for macs in layer.macs)
    return _Layer(layer, was, left, tuple(found[:2]), max(0, len(found) - 2))


def _picture(segment: SegmentReport, number: int, opened: bool) -> _Picture:
    channels, found, laid_out = segment.instance.channels, rows(segment, COLUMNS), cuts(segment)
    tops, marks, height = _places(found, laid_out)
    fold = folded(channels, COLUMNS)
    columns = -(-channels // fold)
    original = original_bytes(segment)
    return _Picture(
        segment=segment,
        original=original,
        left=segment.objective / original if original else 0.0,
        proof=proof(segment),
        open=opened,
        columns=columns,
        fold=fold,
        height=height,
        labels=tuple(_label(row, top) for row, top in zip(found, tops, strict=True)),
        tracks="".join(f"M0 {_middle(top)}h{columns}" for top in tops),
        sides=(
            _side(segment, found, tops, number, before=True),
            _side(segment, found, tops, number, before=False),
        ),
        marks=marks,
        cuts=tuple(cut_text(cut) for cut in laid_out),
    )


def _places(found: list[Row], laid_out: list[Cut]) -> tuple[list[int], tuple[tuple[int, str], ...], int]:
    """How far down every reader stands, every cut with what it costs, and the height of the picture."""
    tops: list[int] = []
    marks: list[tuple[int, str]] = []
    height, part = 0, found[0].part
    for row in found:
        if row.part != part:
            here = sum(cut.weight for cut in laid_out if part < cut.part <= row.part)
            marks.append((height + GAP // 2, f"re-laid out: {size(here)}"))
            height, part = height + GAP, row.part
        tops.append(height)
        height += ROW
    return tops, tuple(marks), height


def _label(row: Row, top: int) -> _Label:
    return _Label(top, row.name, "free" if row.free else size(row.weight), row.free)


def _side(segment: SegmentReport, found: list[Row], tops: list[int], number: int, *, before: bool) -> _Side:
    free = sum(row.free_before if before else row.free for row in found)
    order = "original order" if before else "order found"
    paid = size(original_bytes(segment) if before else segment.objective)
    return _Side(
        key=f"s{number}{'a' if before else 'b'}",
        heading=f"{order.capitalize()}: {free} of {len(found)} free, {paid}",
        title=f"{segment.name}: which channels each reader takes, in the {order}",
        description=(
            f"{len(found)} readers by {segment.instance.channels} channels. {free} readers find their "
            f"channels as one range and are free; together {paid} are gathered."
        ),
        strips=tuple(_strip(row, top, before) for row, top in zip(found, tops, strict=True)),
    )


def _strip(row: Row, top: int, before: bool) -> _Strip:
    runs, free = (row.before, row.free_before) if before else (row.after, row.free)
    path, end = "", 0
    for start, length in runs:
        path += f"m{start - end} 0h{length}" if path else f"M{start} {_middle(top)}h{length}"
        end = start + length
    how = "one range, free" if free else f"gathered, {size(row.weight)}"
    return _Strip(path, free, f"{row.name}: {row.channels} channels, {how}")


def _middle(top: int) -> int:
    return top + ROW // 2
