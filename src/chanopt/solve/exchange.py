"""Channels change places in pairs until no exchange saves anything: a heuristic for touched blocks.

Exchanges stay within a *cell*, channels that no hard set tells apart, so that whatever is one range stays one.
Touching is all or nothing, and most single exchanges change no bill. So a bin of which a reader takes c channels
first counts as `1 - p**c`, with p near 1: what empties a bin is rewarded on the way; p falls to 0, the true
cost (graduated optimisation).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chanopt.solve.packing import Bools

__all__ = ["COARSE", "FINE", "Bins", "exchange"]

Ints = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float64]

COARSE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""From an order that knows nothing of the readers."""
FINE = (0.4, 0.2, 0.0)
"""From a good order."""
_PASSES = 20
_WORK = 8 * 10**9
"""Products that all passes may take together: a limit that does not hang on how busy the machine is."""
_ROWS = 512
"""Rows of the table of exchanges that are looked at together; all of them would fill the memory."""
_UNIT = 2**16
"""Savings are counted in integers, which floats add without rounding in whatever sequence."""


@dataclass(frozen=True, slots=True)
class Bins:
    """The readers of one grain: who takes which channel (row c, column r), and what a touched bin costs."""

    grain: int
    members: Bools
    weights: tuple[int, ...]


@dataclass(slots=True)
class _View:
    """One grain, over the classes of channels and the groups of positions that lie in the same bins."""

    classes: Floats
    weights: Floats
    bin_of: Ints
    count: int


def exchange(
    order: Sequence[int], cells: Sequence[int], kinds: Sequence[Bins], steps: Sequence[float], deadline: float
) -> tuple[int, ...]:
    """Return the cheapest order met on the way; channel c may take the place of another of cell `cells[c]`.

    `steps` are the falling values of p. The same input gives the same output unless the deadline (of
    `time.monotonic`) cuts it short.
    """
    places = np.array(order, dtype=np.intp)
    groups, group_of = np.unique(
        np.array([np.arange(len(places)) // kind.grain for kind in kinds]).T, axis=0, return_inverse=True
    )
    told = np.column_stack([np.array(cells, dtype=np.intp), *(kind.members.astype(np.intp) for kind in kinds)])
    classes, first, class_of = np.unique(told, axis=0, return_index=True, return_inverse=True)
    class_of = class_of.ravel()
    views = [_view(kind, groups[:, number], first) for number, kind in enumerate(kinds)]
    held = np.zeros((len(groups), len(classes)), dtype=np.int64)
    np.add.at(held, (group_of.ravel(), class_of[places]), 1)
    best, least = held.copy(), _paid(views, held)
    columns = 4 * sum(view.classes.shape[1] for view in views)
    passes = max(1, min(_PASSES, _WORK // (len(steps) * columns * np.count_nonzero(held) ** 2 + 1)))
    for step in steps:
        if time.monotonic() >= deadline:
            break
        for _ in range(passes):
            if time.monotonic() >= deadline or not _pass(views, classes[:, 0], held, step):
                break
        if (paid := _paid(views, held)) < least:
            best, least = held.copy(), paid
    seats = np.lexsort((told[places, 0], group_of.ravel()))
    return _seated(places, seats, class_of, best)


def _view(kind: Bins, bin_of: Ints, first: Ints) -> _View:
    largest = max(kind.weights, default=1) or 1
    weights = np.array([max(1, weight * 4096 // largest) if weight else 0 for weight in kind.weights], dtype=float)
    return _View(kind.members[first].astype(float), weights, bin_of, int(bin_of.max(initial=-1)) + 1)


def _taken(view: _View, held: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return how many channels each reader takes of each bin."""
    taken = np.zeros((view.count, view.classes.shape[1]), dtype=np.int64)
    # A product of floats, exact for counts, is many times faster than one of integers.
    np.add.at(taken, view.bin_of, (held.astype(float) @ view.classes).astype(np.int64))
    return taken


def _paid(views: Sequence[_View], held: npt.NDArray[np.int64]) -> float:
    return sum(float(((_taken(view, held) > 0) @ view.weights).sum()) for view in views)


def _pass(views: Sequence[_View], cells: Ints, held: npt.NDArray[np.int64], step: float) -> bool:
    """Make the exchanges that save most, each group of positions in one at most; False if none saves."""
    groups, classes = np.nonzero(held)
    sides = [_sides(view, held, groups, classes, step) for view in views]
    partner = np.empty(len(groups), dtype=np.intp)
    saved = np.empty(len(groups))
    for start in range(0, len(groups), _ROWS):
        rows = slice(start, start + _ROWS)
        table = np.zeros((len(groups[rows]), len(groups)))
        for view, (mine, theirs) in zip(views, sides, strict=True):
            bins = view.bin_of[groups]
            table += np.where(bins[rows, None] == bins[None, :], 0.0, mine[rows] @ theirs.T)
        table[cells[classes][rows, None] != cells[classes][None, :]] = 0
        partner[rows] = table.argmin(axis=1)
        saved[rows] = table.min(axis=1)
    used: set[int] = set()
    for entry in np.argsort(saved, kind="stable").tolist():
        other = int(partner[entry])
        pair = _touching(views, (int(groups[entry]), int(groups[other])))
        if saved[entry] >= 0:
            break
        if used & pair:
            continue
        used |= pair
        here, there = groups[entry], groups[other]
        held[here, classes[entry]] -= 1
        held[there, classes[other]] -= 1
        held[there, classes[entry]] += 1
        held[here, classes[other]] += 1
    return bool(used)


def _touching(views: Sequence[_View], groups: tuple[int, int]) -> set[int]:
    """Return the bins of two groups, numbered through all grains: exchanges that share one do not add up."""
    return {len(views) * int(view.bin_of[group]) + n for n, view in enumerate(views) for group in groups}


def _sides(view: _View, held: npt.NDArray[np.int64], groups: Ints, classes: Ints, step: float) -> tuple[Floats, Floats]:
    """Return two tables, a row an entry, whose products are what exchanging two entries changes.

    For entries i and j and a reader that takes j but not i, the bin of i gains a channel and that of j loses
    one; the other way round for a reader that takes i but not j.
    """
    taken = _taken(view, held)
    worth = 1 - step ** np.arange(int(taken.max(initial=0)) + 2, dtype=float)
    worth[0] = 0
    rise = np.rint(np.diff(worth) * _UNIT)
    bins = view.bin_of[groups]
    gains = (rise[taken] * view.weights)[bins]
    loses = (-rise[np.maximum(taken - 1, 0)] * view.weights)[bins]
    inside = view.classes[classes]
    outside = 1 - inside
    mine = np.hstack([outside * gains, outside, inside, inside * loses])
    theirs = np.hstack([inside, inside * loses, outside * gains, outside])
    return mine, theirs


def _seated(places: Ints, seats: Ints, class_of: Ints, held: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """Return the order in which every group holds its classes; channels of a class keep their sequence.

    `seats` are the positions by group, and in a group by cell: a cell keeps its positions.
    """
    wanted = np.repeat(np.tile(np.arange(held.shape[1]), held.shape[0]), held.ravel())
    channels = places[np.argsort(class_of[places], kind="stable")]
    order = np.empty_like(places)
    order[seats[np.argsort(wanted, kind="stable")]] = channels
    return tuple(order.tolist())
