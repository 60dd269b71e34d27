"""What the text and the page show alike: figures that follow from a report."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from chanopt.ir import IndexMap
from chanopt.report.report import LayerReport, Report, SegmentReport
from chanopt.report.units import size
from chanopt.solve import Instance, Reader
from chanopt.solve.solution import cost, is_free

Run = tuple[int, int]
"""A maximal range of filled columns as (start, length)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One reader of a segment, before and after ordering.

    Attributes:
        name: the layer that reads.
        channels: how many channels it reads.
        weight: bytes it gathers unless it finds them as one range.
        part: number of the layout that it reads from.
        before: the columns it reads while the channels stand in their original order.
        after: the same in the order that was found.
        free_before: whether those are one range.
        free: whether these are.
    """

    name: str
    channels: int
    weight: float
    part: int
    before: tuple[Run, ...]
    after: tuple[Run, ...]
    free_before: bool
    free: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where the channels are laid out anew.

    Attributes:
        place: the two values, as "A and B".
        weight: bytes gathered there.
        part: number of the layout behind it.
    """

    place: str
    weight: float
    part: int


def branching(report: Report) -> list[SegmentReport]:
    """The segments with at least two readers: those where an order serves one reader or another."""
    return [segment for segment in report.segments if len(segment.instance.readers) > 1]


def original_bytes(segment: SegmentReport) -> float:
    """Bytes that the readers gather if the channels keep their original order."""
    return _in_original_order(segment.instance)


def _in_original_order(instance: Instance) -> float:
    order = tuple(range(instance.channels))
    return cost(instance, (order,) * instance.values)[2]


def gathered(report: Report) -> tuple[float, int]:
    """Bytes gathered if every segment kept its original order, and bytes copied now.

    The first is what the permutation programs charge, the second is counted in the program as laid out.
    """
    ranges = [
        replace(segment.instance, readers=tuple(r for r in segment.instance.readers if not r.grain))
        for segment in report.segments
    ]
    return sum(map(_in_original_order, ranges)), report.copied_bytes


def proof(segment: SegmentReport) -> str:
    """Whether the order is proven optimal: "yes", or how far the bound is below the objective."""
    if segment.optimal:
        return "yes"
    return f"gap {100 * (segment.objective - segment.bound) / segment.objective:.1f} %"


def reasons(layer: LayerReport) -> list[tuple[str, int]]:
    """Why output channels of a layer are kept, and for how many, the most frequent reason first."""
    counted = [(why.removeprefix("read by "), len(IndexMap.parse(kept))) for why, kept in layer.kept.items()]
    return sorted(counted, key=lambda reason: -reason[1])


def cuts(segment: SegmentReport) -> list[Cut]:
    """The places where the segment is laid out anew."""
    cut, parts = set(segment.solution.cut), segment.solution.parts
    return [
        Cut(edge.name.replace(" -> ", " and "), edge.weight, max(parts[edge.source], parts[edge.target]))
        for edge in segment.instance.edges
        if edge.name in cut
    ]


def cut_text(cut: Cut) -> str:
    """A cut in words."""
    return f"re-laid out between {cut.place}: {size(cut.weight)}"


def rows(segment: SegmentReport, columns: int) -> list[Row]:
    """The readers of a segment, those of one layout together.

    Args:
        segment: the segment.
        columns: how many columns a picture may have; more channels share columns evenly.
    """
    instance, solution = segment.instance, segment.solution
    fold = folded(instance.channels, columns)
    original = tuple(range(instance.channels))
    built = [
        _row(reader, solution.parts[reader.value], original, solution.orders[reader.value], fold)
        for reader in sorted(instance.readers, key=lambda reader: reader.value)
    ]
    return sorted(built, key=lambda row: row.part)


def folded(channels: int, columns: int) -> int:
    """How many channels share a column so that there are at most ``columns``."""
    return max(1, -(-channels // columns))


def _row(reader: Reader, part: int, original: tuple[int, ...], order: tuple[int, ...], fold: int) -> Row:
    place = np.empty(len(order), np.int64)
    place[np.array(order, np.int64)] = np.arange(len(order))
    positions = np.array(reader.set, np.int64)
    return Row(
        reader.name,
        len(reader.set),
        reader.weight,
        part,
        _runs(positions, len(order), fold),
        _runs(place[positions], len(order), fold),
        is_free(reader, original),
        is_free(reader, place.tolist()),
    )


def _runs(positions: npt.NDArray[np.int64], channels: int, fold: int) -> tuple[Run, ...]:
    """The runs of the columns of which at least half is read; a set never vanishes."""
    if not len(positions):
        return ()
    filled = np.bincount(positions // fold, minlength=-(-channels // fold))
    columns = np.flatnonzero(2 * filled >= min(fold, 2 * int(filled.max())))
    return tuple((start, stop - start) for start, stop in IndexMap(columns).runs())
