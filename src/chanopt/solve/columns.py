"""The packing program by columns: a proven bound from the linear program, and bins from diving into it.

A column is a whole bin: how many channels of each class it holds, no more than there are. The linear program
over all of them (Gilmore and Gomory, "A linear programming approach to the cutting stock problem", Operations
Research 9, 1961) is solved by GLOP with columns made as they are needed: given the prices of the classes, the
best bin within each union of signatures is filled from the dearest class down. Every price gives a bound
(Lagrange), computed here in integers, so it does not hang on how exact GLOP is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from chanopt.solve.packing import Bools, Counts, Packing, divisor, gray_bins

if TYPE_CHECKING:
    from ortools.linear_solver import pywraplp

__all__ = ["Column", "Priced", "bound_of", "dive", "greedy_bins", "quick_bound"]

Floats = npt.NDArray[np.float64]

_FINE = 16
"""Prices are rounded to multiples of 2**-16 of the largest weight."""
_ROUNDS, _DIVE_ROUNDS = 60, 4
_COLUMNS = 60
"""New columns per round; more make the linear program slower than they make it converge."""
_NOTHING = 1e-6
_SHARES = (0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Column:
    """A bin: the classes in it with their counts, what it costs, and whether it is the short one."""

    held: tuple[tuple[int, int], ...]
    cost: int
    short: bool


@dataclass(slots=True)
class Priced:
    """The unions of signatures of a packing, and which classes fit into each."""

    packing: Packing
    unions: Bools
    fits: Bools = field(init=False)
    costs: Counts = field(init=False)
    """The cost of every union, in units of the weights."""

    def __post_init__(self) -> None:
        signatures = self.packing.signatures
        self.fits = np.all(~signatures[None, :, :] | self.unions[:, None, :], axis=2)
        self.costs = self.unions.astype(np.int64) @ np.array(self.packing.weights, dtype=np.int64)

    @property
    def size(self) -> int:
        """The pairs of a union and a class."""
        return self.fits.size

    def fill(self, prices: Counts, counts: Counts, size: int, unit: int) -> tuple[Counts, Counts, Bools]:
        """Return per union its reduced cost, its dearest bin of this size, and whether there is one.

        `prices` and reduced costs are in units of 1 / `unit` of a weight.
        """
        order = np.argsort(-prices, kind="stable")
        taken = np.minimum(np.cumsum(self.fits[:, order] * np.minimum(counts[order], size), axis=1), size)
        bins = np.zeros_like(taken)
        bins[:, order] = np.diff(taken, axis=1, prepend=0)
        return self.costs * unit - bins @ prices, bins, taken[:, -1] == size


class _Master:
    """The linear program over the columns so far: every channel in a bin, and one short bin if there is one."""

    def __init__(self, packing: Packing, left: _Left) -> None:
        from ortools.linear_solver import pywraplp

        self._solver: pywraplp.Solver = pywraplp.Solver.CreateSolver("GLOP")
        self._rows = [self._solver.Constraint(count, count) for count in left.counts]
        self._short = self._solver.Constraint(1, 1) if left.short else None
        self._largest = max(packing.weights)
        self._objective = self._solver.Objective()
        self._objective.SetMinimization()
        self.columns: dict[Column, pywraplp.Variable] = {}

    def add(self, columns: Iterable[Column]) -> int:
        """Add the columns that are not there yet; return how many."""
        before = len(self.columns)
        for column in columns:
            if column in self.columns:
                continue
            variable = self.columns[column] = self._solver.NumVar(0, self._solver.infinity(), "")
            self._objective.SetCoefficient(variable, column.cost / self._largest)
            for number, count in column.held:
                self._rows[number].SetCoefficient(variable, count)
            if column.short and self._short is not None:
                self._short.SetCoefficient(variable, 1)
        return len(self.columns) - before

    def solve(self) -> Floats | None:
        """Solve; return the prices of the classes in units of the largest weight, None if GLOP gave up."""
        if self._solver.Solve() != self._solver.OPTIMAL:
            return None
        return np.array([row.dual_value() for row in self._rows])

    def used(self) -> list[tuple[float, Column]]:
        """Return the columns of the last solution and how often each is used."""
        values = ((variable.solution_value(), column) for column, variable in self.columns.items())
        return [(value, column) for value, column in values if value > _NOTHING]

    @property
    def short_price(self) -> float:
        """The price of the short bin, in units of the largest weight."""
        return self._short.dual_value() if self._short is not None else 0.0


@dataclass(frozen=True, slots=True)
class _Left:
    """What is not in a bin yet."""

    counts: tuple[int, ...]
    short: bool

    def without(self, column: Column, times: int = 1) -> _Left:
        """Return what is left after a bin is taken so many times."""
        counts = list(self.counts)
        for number, count in column.held:
            counts[number] -= times * count
        return _Left(tuple(counts), self.short and not column.short)

    def holds(self, column: Column, times: int = 1) -> bool:
        """Whether a bin can be filled so many times."""
        return (self.short or not column.short) and all(self.counts[c] >= times * count for c, count in column.held)


def quick_bound(priced: Priced, shares: Iterable[float]) -> tuple[int, list[Column]]:
    """Return what any packing pays at least by the prices of `greedy_bins`, and the columns they ask for."""
    packing = priced.packing
    unit = _unit(packing)
    made = [_price(priced, _everything(packing), _by_weight(packing, share), 0.0, unit) for share in shares]
    best = max(proven for proven, _ in made)
    return _rounded_up(packing, -(-best // unit)), [column for _, columns in made for column in columns]


def bound_of(priced: Priced, deadline: float) -> tuple[int, list[Column]]:
    """Return what any packing pays at least, by the linear program, and the columns made for it."""
    packing = priced.packing
    quick, columns = quick_bound(priced, _SHARES)
    master, best = _generate(priced, _everything(packing), columns, _ROUNDS, deadline)
    return max(quick, _rounded_up(packing, best)), list(master.columns)


def _rounded_up(packing: Packing, proven: int) -> int:
    step = divisor(packing.weights)
    return -(-proven // step) * step


def _by_weight(packing: Packing, share: float) -> Counts:
    """Return prices: this share of what a class would cost in bins of its own."""
    own = packing.signatures @ np.array(packing.weights, dtype=np.int64)
    return np.rint(own * (share * _unit(packing) / packing.grain)).astype(np.int64)


def dive(priced: Priced, columns: Iterable[Column], sure: float, deadline: float) -> Counts:
    """Return bins: those that the linear program is surest of are taken, then it is solved anew for the rest.

    Takes the columns to begin with. Bins that the linear program uses to the share `sure` are taken together, as
    far as they fit beside each other. After the deadline the rest is filled in the order of a Gray code.
    """
    packing = priced.packing
    left = _everything(packing)
    taken: list[Column] = []
    while any(left.counts):
        if time.monotonic() >= deadline:
            taken += _gray_columns(packing, left)
            break
        master, _ = _generate(priced, left, columns, _DIVE_ROUNDS, deadline)
        columns = list(master.columns)
        for column, times in _surest(master.used(), left, sure):
            taken += [column] * times
            left = left.without(column, times)
    bins = np.zeros((len(taken), len(packing.counts)), dtype=np.int64)
    for row, column in zip(bins, sorted(taken, key=lambda column: column.short), strict=True):
        for number, count in column.held:
            row[number] = count
    return bins


def greedy_bins(priced: Priced, share: float) -> Counts:
    """Return bins taken one after another, each the best at fixed prices: this share of what a class weighs."""
    packing = priced.packing
    unit = _unit(packing)
    prices = _by_weight(packing, share)
    left = packing.counts.copy()
    bins = np.zeros((packing.bins, len(left)), dtype=np.int64)
    for number in range(packing.bins):
        size = packing.grain if number < packing.full else packing.rest
        reduced, filled, there = priced.fill(prices, left, size, unit)
        bins[number] = filled[there][int(np.argmin(reduced[there]))]
        left -= bins[number]
    return bins


def _everything(packing: Packing) -> _Left:
    return _Left(tuple(packing.counts.tolist()), packing.rest > 0)


def _generate(
    priced: Priced, left: _Left, columns: Iterable[Column], rounds: int, deadline: float
) -> tuple[_Master, int]:
    """Solve the linear program of what is left by at most so many rounds; return it and the bound it proves."""
    packing = priced.packing
    master = _Master(packing, left)
    master.add(column for column in columns if left.holds(column))
    # Some packing of all that is left, so that the program has a solution.
    master.add(_gray_columns(packing, left))
    unit = _unit(packing)
    best = 0
    for _ in range(rounds):
        found = master.solve()
        if found is None:
            break
        proven, new = _price(priced, left, _rounded(packing, found, unit), master.short_price, unit)
        best = max(best, -(-proven // unit))
        if not master.add(new) or time.monotonic() >= deadline:
            break
    # The columns of the last round are in no solution yet.
    master.solve()
    return master, best


def _gray_columns(packing: Packing, left: _Left) -> list[Column]:
    bins = gray_bins(packing, np.array(left.counts, dtype=np.int64), left.short)
    return _columns(packing, bins[: len(bins) - left.short], False) + _columns(
        packing, bins[len(bins) - left.short :], True
    )


def _columns(packing: Packing, bins: Counts, short: bool) -> list[Column]:
    touched = (bins @ packing.signatures) > 0
    costs = touched @ np.array(packing.weights, dtype=np.int64)
    held: list[list[tuple[int, int]]] = [[] for _ in bins]
    rows, classes = np.nonzero(bins)
    for row, number, count in zip(rows.tolist(), classes.tolist(), bins[rows, classes].tolist(), strict=True):
        held[row].append((number, count))
    return [Column(tuple(pairs), cost, short) for pairs, cost in zip(held, costs.tolist(), strict=True)]


def _unit(packing: Packing) -> int:
    """Return the parts of a weight that prices are counted in; sums over a bin fit into 62 bits."""
    room = 2**61 // (4 * sum(packing.weights) * packing.grain)
    return max(1, min(2**_FINE // max(packing.weights), room))


def _rounded(packing: Packing, prices: Floats, unit: int) -> Counts:
    most = sum(packing.weights) * unit
    return np.rint(np.clip(prices * (max(packing.weights) * unit), -most, most)).astype(np.int64)


def _price(priced: Priced, left: _Left, prices: Counts, short_price: float, unit: int) -> tuple[int, list[Column]]:
    """Return the bound that prices prove, in parts of a weight, and the columns that they ask for."""
    packing = priced.packing
    rest = packing.rest if left.short else 0
    full = (sum(left.counts) - rest) // packing.grain
    proven = sum(price * count for price, count in zip(prices.tolist(), left.counts, strict=True))
    base = short_price * max(packing.weights) * unit
    new: list[Column] = []
    for size, times, short in ((packing.grain, full, False), (rest, int(rest > 0), True)):
        if not times:
            continue
        reduced, bins, there = priced.fill(prices, np.array(left.counts), size, unit)
        reduced, bins = reduced[there], bins[there]
        proven += times * int(reduced.min())
        ranked = np.argsort(reduced, kind="stable")[:_COLUMNS]
        # Rounding the prices moves a reduced cost by up to half a part per channel.
        wanted = ranked[reduced[ranked] - base * short < -(packing.grain + 1)]
        new += _columns(packing, bins[wanted], short)
    return proven, new


def _surest(used: Sequence[tuple[float, Column]], left: _Left, sure: float) -> list[tuple[Column, int]]:
    """Return bins to take: all whole multiples; if there are none, the surest ones that fit beside each other."""
    ranked = sorted(used, key=lambda entry: -entry[0])
    wanted = [(column, int(value + _NOTHING)) for value, column in ranked if value >= 1 - _NOTHING]
    if not wanted:
        wanted = [(column, 1) for number, (value, column) in enumerate(ranked) if value >= sure or not number]
    taken: list[tuple[Column, int]] = []
    for column, times in wanted:
        if left.holds(column, times):
            taken.append((column, times))
            left = left.without(column, times)
    return taken
