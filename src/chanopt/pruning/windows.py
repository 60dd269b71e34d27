"""One order of channels and a window in it for every reader, so that as much importance as possible is read.

Plain numbers in, plain numbers out. Whatever comes out can be laid out in memory so that every reader finds its
channels side by side: the masks need no gather. Channels that nobody reads are dead and lie nowhere.

For given places of the windows on the line, the best channels for every place are an assignment problem: places that
the same readers cover are one *slot*, a slot takes as many channels as it has places, and what a channel is worth in
it is the sum of its importances for these readers. That is a minimum-cost flow, solved exactly (OR-Tools). The places
are searched: all of them where they are few, else by steps that only ever gain, from several starts. The first start
is one common set of channels, so the result is never worse than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

from chanopt.errors import InstanceError
from chanopt.solve import PQTree

__all__ = ["Places", "Reader", "Windows", "choose"]

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

_ENUMERATED = 600  # so many places are all tried
_UNITS = 1 << 30  # importances are rounded to this fraction of the largest, for the flow counts in whole numbers


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads.

    Attributes:
        name: for messages.
        region: the channels it could read, ascending.
        count: how many it keeps.
        scores: the importance of each of the region's channels for this reader, at least 0.
    """

    name: str
    region: tuple[int, ...]
    count: int
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.count <= len(self.region) or len(self.scores) != len(self.region):
            raise InstanceError(
                f"reader {self.name!r}: expected a count within its {len(self.region)} channels and a score for each, "
                f"found a count of {self.count} and {len(self.scores)} scores"
            )


@dataclass(frozen=True, slots=True)
class Windows:
    """What was chosen.

    Attributes:
        order: the live channels, in their order.
        kept: per reader, the channels of its window, in that order.
        importance: the sum over readers of the importances of what they keep.
    """

    order: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    importance: float


@dataclass(frozen=True, slots=True)
class Places:
    """Where things lie on the line.

    Attributes:
        sizes: live channels of each cell, in the order of the cells.
        starts: the first place of each reader's window.
    """

    sizes: tuple[int, ...]
    starts: tuple[int, ...]


def choose(
    channels: int,
    readers: Sequence[Reader],
    common: Iterable[int],
    *,
    spans: Iterable[Sequence[int]] = (),
    live: int | None = None,
    effort: int = 250,
) -> Windows:
    """Choose an order and windows.

    Args:
        channels: how many there are.
        readers: who reads; the counts are what each reads of ``common``.
        common: a set of channels that all readers could keep: the first start.
        spans: sets that must lie side by side as far as they are live (operands of concats).
        live: at most so many channels may be live; None for all.
        effort: how many places are tried at most, where they cannot all be.

    Raises:
        InstanceError: a count that is not what the reader reads of ``common``.
    """
    start = frozenset(common)
    for reader in readers:
        if reader.count != len(start.intersection(reader.region)):
            raise InstanceError(
                f"reader {reader.name!r}: expected to keep as many channels as it reads of the common set, "
                f"{len(start.intersection(reader.region))}, found {reader.count}"
            )
    line = _Line.of(channels, readers, [frozenset(span) for span in spans])
    if line is None:  # no order has all regions and spans side by side: only one set for all is sure to need no copy
        kept = tuple(tuple(sorted(start.intersection(reader.region))) for reader in readers)
        return Windows(tuple(sorted(start)), kept, _worth(readers, kept))
    return _Search(line, start, max(len(start), channels if live is None else live), effort).run()


def _worth(readers: Sequence[Reader], kept: Sequence[Sequence[int]]) -> float:
    total = 0.0
    for reader, channels in zip(readers, kept, strict=True):
        score = dict(zip(reader.region, reader.scores, strict=True))
        total += sum(score[channel] for channel in channels)
    return total


# -- the line ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    """Cells of channels that all regions and spans treat alike, in an order that keeps these side by side."""

    readers: tuple[Reader, ...]
    cells: tuple[Numbers, ...]
    runs: tuple[tuple[int, int], ...]  # per reader, the first cell of its region and the one behind the last
    scores: Floats  # (readers, channels)

    @classmethod
    def of(cls, channels: int, readers: Sequence[Reader], spans: Sequence[frozenset[int]]) -> _Line | None:
        sets = [*spans, *(frozenset(reader.region) for reader in readers)]
        table = np.zeros((len(sets), channels), np.bool_)
        for row, members in zip(table, sets, strict=True):
            row[list(members)] = True
        _, first, inverse = np.unique(table, axis=1, return_index=True, return_inverse=True)
        inverse = inverse.reshape(-1)
        tree = PQTree(len(first))
        for row in table:
            if row.any() and not tree.reduce(set(inverse[row].tolist())):
                return None
        means = [float(np.flatnonzero(inverse == cell).mean()) for cell in range(len(first))]
        frontier = tree.frontier(means, np.bincount(inverse).tolist())
        cells = tuple(np.flatnonzero(inverse == cell) for cell in frontier)
        runs = tuple(_run(cells, reader) for reader in readers)
        scores = np.zeros((len(readers), channels))
        for row, reader in zip(scores, readers, strict=True):
            row[list(reader.region)] = reader.scores
        return cls(tuple(readers), cells, runs, scores)

    def bounds(self, sizes: Sequence[int], reader: int) -> tuple[int, int]:
        """The first place of a reader's region on the line, and the one behind its last."""
        first, behind = self.runs[reader]
        return sum(sizes[:first]), sum(sizes[:behind])

    def fits(self, places: Places) -> bool:
        """Whether every window lies in its region."""
        for number, (start, reader) in enumerate(zip(places.starts, self.readers, strict=True)):
            low, high = self.bounds(places.sizes, number)
            if not low <= start <= high - reader.count:
                return False
        return all(0 <= size <= len(cell) for size, cell in zip(places.sizes, self.cells, strict=True))

    def filled(self, places: Places) -> tuple[float, Numbers]:
        """The best channels for these places: what is read in sum, and the channel at each place."""
        value, parts, begin = 0.0, [np.zeros(0, np.int64)], 0
        for cell, size in zip(self.cells, places.sizes, strict=True):
            worth, part = self._cell(cell, begin, begin + size, places)
            value += worth
            parts.append(part)
            begin += size
        return value, np.concatenate(parts)

    def _cell(self, cell: Numbers, begin: int, end: int, places: Places) -> tuple[float, Numbers]:
        """One cell: its slots are what the windows' ends cut it into."""
        ends = [(start, start + r.count) for start, r in zip(places.starts, self.readers, strict=True)]
        cuts = sorted({begin, end, *(place for pair in ends for place in pair if begin < place < end)})
        slots = list(pairwise(cuts))
        if not slots:
            return 0.0, np.zeros(0, np.int64)
        covers = np.array([[low <= a and b <= high for low, high in ends] for a, b in slots])
        worth = covers.astype(np.float64) @ self.scores[:, cell]  # (slots, channels of the cell)
        capacities = np.array([b - a for a, b in slots])
        taken = _assign(worth, capacities)
        value = sum(float(worth[slot, part].sum()) for slot, part in enumerate(taken))
        return value, cell[np.concatenate(taken)]


def _run(cells: Sequence[Numbers], reader: Reader) -> tuple[int, int]:
    region = set(reader.region)
    inside = [number for number, cell in enumerate(cells) if int(cell[0]) in region]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _assign(worth: Floats, capacities: Numbers) -> list[Numbers]:
    """Which channels each slot takes so that the sum of their worths is greatest; exact up to rounding.

    Args:
        worth: shape (slots, channels).
        capacities: shape (slots,), in sum at most the number of channels.
    """
    slots, channels = worth.shape
    if slots == 1:
        order = np.argsort(-worth[0], kind="stable")[: capacities[0]]
        return [np.sort(order)]
    scale = _UNITS / max(float(np.abs(worth).max()), 1e-300)
    costs = -np.rint(worth * scale).astype(np.int64)
    flow: Any = SimpleMinCostFlow()  # its stubs mix up element types and shapes
    tail = np.repeat(np.arange(channels), slots + 1)
    head = channels + np.tile(np.arange(slots + 1), channels)
    cost = np.concatenate([costs, np.zeros((1, channels), np.int64)]).T.reshape(-1)
    flow.add_arcs_with_capacity_and_unit_cost(tail, head, np.ones(len(tail), np.int64), cost)
    demand = np.append(capacities, channels - capacities.sum())
    flow.set_nodes_supplies(np.arange(channels + slots + 1), np.concatenate([np.ones(channels, np.int64), -demand]))
    if flow.solve() != flow.OPTIMAL:
        raise AssertionError("an assignment with enough channels has a solution")
    flows = flow.flows(np.arange(len(tail))).reshape(channels, slots + 1)
    return [np.flatnonzero(flows[:, slot]) for slot in range(slots)]


# -- the search -------------------------------------------------------------------------------------------------------


class _Search:
    """From several starts, steps that gain."""

    def __init__(self, line: _Line, common: frozenset[int], live: int, effort: int) -> None:
        self.line, self.common, self.live, self.effort = line, common, live, effort
        self.known: dict[Places, tuple[float, Numbers]] = {}

    def run(self) -> Windows:
        base = self._common()
        found = self._all(base) or (self._climbed(start) for start in self._starts(base))
        return self._windows(max([base, *found], key=self._value))

    def _value(self, places: Places) -> float:
        return self._filled(places)[0]

    def _filled(self, places: Places) -> tuple[float, Numbers]:
        if places not in self.known:
            self.known[places] = self.line.filled(places)
        return self.known[places]

    def _windows(self, places: Places) -> Windows:
        value, order = self._filled(places)
        kept = tuple(
            tuple(order[start : start + reader.count].tolist())
            for start, reader in zip(places.starts, self.line.readers, strict=True)
        )
        read = {channel for window in kept for channel in window}
        return Windows(tuple(channel for channel in order.tolist() if channel in read), kept, value)

    # -- starts ---------------------------------------------------------------------------------------------------

    def _common(self) -> Places:
        """The live channels of the common set; everybody reads all of them."""
        sizes = tuple(sum(int(channel) in self.common for channel in cell) for cell in self.line.cells)
        return Places(sizes, tuple(self.line.bounds(sizes, number)[0] for number in range(len(self.line.readers))))

    def _wide(self) -> tuple[int, ...]:
        """Sizes of a line of one cell that has as many live channels as allowed."""
        return (min(self.live, len(self.line.cells[0])),)

    def _all(self, base: Places) -> list[Places] | None:
        """Every choice of places, if they are few: of one cell, that is exact."""
        if len(self.line.cells) != 1:
            return None
        if len(self.line.readers) == 1:
            return [base]  # its best channels, wherever they lie
        sizes = self._wide()
        room = [sizes[0] - reader.count + 1 for reader in self.line.readers]
        if prod(room) > _ENUMERATED:
            return None
        return [base, *(Places(sizes, starts) for starts in product(*map(range, room)))]

    def _starts(self, base: Places) -> Iterator[Places]:
        yield base
        if len(self.line.cells) != 1:
            return
        sizes = self._wide()
        ranks = _similar(self.line.scores)
        yield Places(sizes, self._overlapping(sizes[0], ranks))
        for share in (0.5, 1.0):
            yield Places(sizes, self._stairs(sizes[0], ranks, share))
        yield Places(sizes, base.starts)

    def _stairs(self, size: int, ranks: Numbers, share: float) -> tuple[int, ...]:
        """Windows one behind the other, like readers next to one another, over a share of the room there is."""
        last = max(1, len(ranks) - 1)
        return tuple(
            round((size - reader.count) * share * rank / last)
            for reader, rank in zip(self.line.readers, ranks.tolist(), strict=True)
        )

    def _overlapping(self, size: int, ranks: Numbers) -> tuple[int, ...]:
        """Windows one behind the other, neighbours sharing as many channels as both would choose alone.

        Of two readers this is the best there is, if the line is long enough.
        """
        readers = self.line.readers
        alone = [
            set(np.argsort(-self.line.scores[r], kind="stable")[: reader.count].tolist())
            for r, reader in enumerate(readers)
        ]
        row = np.argsort(ranks).tolist()
        ahead = [len(alone[one] - alone[two]) for one, two in pairwise(row)]
        last = size - readers[row[-1]].count
        shrink = min(1.0, last / max(1, sum(ahead)))
        starts = [0] * len(row)
        for number, reader in enumerate(row[1:], 1):
            starts[reader] = min(round(sum(ahead[:number]) * shrink), size - readers[reader].count)
        return tuple(starts)

    # -- steps ----------------------------------------------------------------------------------------------------

    def _climbed(self, start: Places) -> Places:
        """Take the first step that gains, again and again, with shorter steps when none does."""
        best = self._slid(start)
        step = max(1, max(sum(best.sizes), 2) // 4)
        left = self.effort // (5 if len(self.line.cells) == 1 else 1)
        while left > 0:
            better = None
            for trial in self._steps(best, step):
                left -= 1
                if self._value(trial) > self._value(best) * (1 + 1e-9):
                    better = trial
                    break
                if left <= 0:
                    break
            if better is not None:
                best = self._slid(better)
            elif step == 1:
                break
            else:
                step //= 2
        return best

    def _slid(self, places: Places) -> Places:
        """Every window where it reads the most in the present order; then the best channels; as long as it gains."""
        while True:
            _, order = self._filled(places)
            moved = replace(places, starts=tuple(self._best_start(places, order, r) for r in range(len(places.starts))))
            if self._value(moved) <= self._value(places) * (1 + 1e-9):
                return places
            places = moved

    def _best_start(self, places: Places, order: Numbers, reader: int) -> int:
        low, high = self.line.bounds(places.sizes, reader)
        count = self.line.readers[reader].count
        sums = np.concatenate([[0.0], np.cumsum(self.line.scores[reader, order[low:high]])])
        gains = sums[count:] - sums[: len(sums) - count]
        here = places.starts[reader]
        found = int(np.argmax(gains))
        return here if gains[here - low] >= gains[found] * (1 - 1e-12) else low + found

    def _steps(self, places: Places, step: int) -> Iterator[Places]:
        """Neighbours: a window moved, or a cell with more or fewer live channels."""
        for reader, start in enumerate(places.starts):
            for there in (start + step, start - step):
                moved = (*places.starts[:reader], there, *places.starts[reader + 1 :])
                trial = replace(places, starts=moved)
                if self.line.fits(trial):
                    yield trial
        for cell in range(len(places.sizes)):
            for change in (step, -step):
                yield from self._resized(places, cell, change)

    def _resized(self, places: Places, cell: int, change: int) -> Iterator[Places]:
        """A cell of another size; windows over it give way at one of their ends, those behind it move along."""
        sizes = (*places.sizes[:cell], places.sizes[cell] + change, *places.sizes[cell + 1 :])
        if sum(sizes) > self.live or not 0 <= sizes[cell] <= len(self.line.cells[cell]):
            return
        begin = sum(places.sizes[:cell])
        ends = [start + reader.count for start, reader in zip(places.starts, self.line.readers, strict=True)]
        for moved in (
            tuple(start + change * (end > begin) for start, end in zip(places.starts, ends, strict=True)),
            tuple(start + change * (start > begin) for start in places.starts),
        ):
            trial = Places(sizes, tuple(self._within(sizes, reader, start) for reader, start in enumerate(moved)))
            if self.line.fits(trial):
                yield trial

    def _within(self, sizes: Sequence[int], reader: int, start: int) -> int:
        low, high = self.line.bounds(sizes, reader)
        return max(low, min(start, high - self.line.readers[reader].count))


def _similar(scores: Floats) -> Numbers:
    """The rank of every reader in an order that has alike ones side by side (spectral seriation).

    The second eigenvector of the Laplacian of their correlations (Atkins, Boman and Hendrickson, SIAM J. Comput. 1998).
    """
    if len(scores) < 3:
        return np.arange(len(scores))
    centred = scores - scores.mean(1, keepdims=True)
    size = np.linalg.norm(centred, axis=1)
    unit = centred / np.where(size > 0, size, 1)[:, None]
    weights = np.clip(unit @ unit.T, 0, None)
    laplacian = np.diag(weights.sum(1)) - weights
    fiedler = np.linalg.eigh(laplacian)[1][:, 1]
    return np.argsort(np.argsort(fiedler, kind="stable"), kind="stable")
