"""The multiple-choice knapsack: one item of every group, the most value within a capacity. Three exact solvers.

Where every layer's cost depends on one group alone, the allocation program is this knapsack, so the solvers check one
another; SMCP solves its linearised allocation with it (ECCV 2022, section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from chanopt.errors import AllocationError

__all__ = ["Item", "Knapsack", "Pick", "condense", "solve_dp", "solve_halving", "solve_pareto"]

Item: TypeAlias = "tuple[float, float]"
"""(value, cost)."""
Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

_NEVER = -np.inf


@dataclass(frozen=True, slots=True)
class Knapsack:
    """Groups of items, of each of which one is taken (or none, unless `require_item`), and what they may cost."""

    groups: tuple[tuple[Item, ...], ...]
    capacity: float
    require_item: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(tuple(group) for group in self.groups))
        if any(cost < 0 for group in self.groups for _, cost in group):
            raise AllocationError("expected costs that are not negative in a knapsack")
        if self.require_item and not all(self.groups):
            raise AllocationError("expected an item in every group of a knapsack, found an empty group")


@dataclass(frozen=True, slots=True)
class Pick:
    """The items taken, by index (None for none), with their value and cost."""

    items: tuple[int | None, ...]
    value: float
    cost: float


def condense(group: Sequence[Item], capacity: float = math.inf) -> list[int]:
    """The items that no cheaper one beats, by ascending cost: the Pareto front within the capacity."""
    order = sorted(range(len(group)), key=lambda item: (group[item][1], -group[item][0], item))
    front: list[int] = []
    for item in order:
        value, cost = group[item]
        if cost <= capacity and (not front or value > group[front[-1]][0]):
            front.append(item)
    return front


def solve_pareto(knapsack: Knapsack) -> Pick:
    """Merge Pareto fronts group by group into two halves, then match the halves; costs may be fractions.

    Raises:
        AllocationError: the cheapest items cost more than the capacity.
    """
    fronts, options = _fronts(knapsack)
    middle = len(fronts) // 2
    halves = [_merged(fronts[:middle], knapsack.capacity), _merged(fronts[middle:], knapsack.capacity)]
    (values, costs, _), (others, dearer, _) = halves
    if not len(values) or not len(others):
        raise _infeasible(knapsack)
    # Float sums may exceed the capacity in the last bit; the slack is far below what separates two choices.
    room = knapsack.capacity * (1 + 1e-12) - costs
    partner = np.searchsorted(dearer, room, side="right") - 1
    total = np.where(partner >= 0, values + others[np.maximum(partner, 0)], _NEVER)
    best = int(np.argmax(total))
    if total[best] == _NEVER:
        raise _infeasible(knapsack)
    taken = [*_trace(halves[0], best), *_trace(halves[1], int(partner[best]))]
    return _pick(knapsack, [options[group][item] for group, item in enumerate(taken)])


def solve_dp(knapsack: Knapsack) -> Pick:
    """The dynamic program over groups and capacity, one row a group; whole costs only.

    Raises:
        AllocationError: a cost is no whole number, or nothing fits.
    """
    fronts, options = _fronts(knapsack)
    unit, capacity = _whole(knapsack)
    best = np.zeros(capacity + 1)
    rows: list[npt.NDArray[np.int32]] = []
    for front in fronts:
        after, chosen = np.full(capacity + 1, _NEVER), np.full(capacity + 1, -1, dtype=np.int32)
        for number, (value, cost) in enumerate(front):
            step = int(cost) // unit
            trial = np.concatenate([np.full(step, _NEVER), best[: capacity + 1 - step] + value])
            chosen = np.where(trial > after, np.int32(number), chosen)
            after = np.maximum(trial, after)
        best = after
        rows.append(chosen)
    if best[capacity] == _NEVER:
        raise _infeasible(knapsack)
    taken, left = [0] * len(fronts), capacity
    for group in reversed(range(len(fronts))):
        taken[group] = int(rows[group][left])
        left -= int(fronts[group][taken[group]][1]) // unit
    return _pick(knapsack, [options[group][item] for group, item in enumerate(taken)])


def solve_halving(knapsack: Knapsack) -> Pick:
    """The dynamic program by halves: what two halves of the groups are worth at every capacity is convolved.

    Quadratic in the capacity, so for small ones; whole costs only.

    Raises:
        AllocationError: a cost is no whole number, or nothing fits.
    """
    fronts, options = _fronts(knapsack)
    unit, capacity = _whole(knapsack)

    def table(low: int, high: int) -> tuple[Floats, Callable[[int], list[int]]]:
        if high == low:
            return np.zeros(capacity + 1), lambda _: []
        if high - low == 1:
            return _single(fronts[low], unit, capacity)
        middle = (low + high) // 2
        (left, trace_left), (right, trace_right) = table(low, middle), table(middle, high)
        splits = [left[: c + 1] + right[c::-1] for c in range(capacity + 1)]
        where = [int(np.argmax(split)) for split in splits]
        values = np.array([split[at] for split, at in zip(splits, where, strict=True)])
        return values, lambda c: [*trace_left(where[c]), *trace_right(c - where[c])]

    values, trace = table(0, len(fronts))
    if values[capacity] == _NEVER:
        raise _infeasible(knapsack)
    return _pick(knapsack, [options[group][item] for group, item in enumerate(trace(capacity))])


def _single(front: Sequence[Item], unit: int, capacity: int) -> tuple[Floats, Callable[[int], list[int]]]:
    """Best value within every capacity of one group, whose front has ascending values."""
    steps = [int(cost) // unit for _, cost in front]
    within = np.searchsorted(steps, np.arange(capacity + 1), side="right") - 1
    values = np.array([_NEVER, *(value for value, _ in front)])[within + 1]
    return values, lambda c: [int(within[c])]


def _fronts(knapsack: Knapsack) -> tuple[list[list[Item]], list[list[int | None]]]:
    """Every group's front, and which item of the group (None for none) each of its entries is."""
    fronts: list[list[Item]] = []
    options: list[list[int | None]] = []
    for group in knapsack.groups:
        items: list[Item] = list(group) if knapsack.require_item else [*group, (0.0, 0.0)]
        front = condense(items, knapsack.capacity)
        if not front:
            raise _infeasible(knapsack)
        fronts.append([items[item] for item in front])
        options.append([item if item < len(group) else None for item in front])
    return fronts, options


Half: TypeAlias = "tuple[Floats, Floats, list[tuple[Numbers, Numbers]]]"
"""Values and costs of a front, and per group merged in: which entry of the front before, which item."""


def _merged(fronts: Sequence[Sequence[Item]], capacity: float) -> Half:
    values, costs = np.zeros(1), np.zeros(1)
    steps: list[tuple[Numbers, Numbers]] = []
    for front in fronts:
        gains, prices = np.array(front, dtype=np.float64).T
        total, price = np.add.outer(values, gains).ravel(), np.add.outer(costs, prices).ravel()
        order = np.lexsort((-total, price))
        order = order[price[order] <= capacity * (1 + 1e-12)]
        ascending = total[order]
        beaten = np.maximum.accumulate(ascending)[:-1] if len(order) else ascending
        order = order[np.concatenate([[True], ascending[1:] > beaten])] if len(order) else order
        steps.append((order // len(front), order % len(front)))
        values, costs = total[order], price[order]
    return values, costs, steps


def _trace(half: Half, entry: int) -> list[int]:
    taken: list[int] = []
    for before, item in reversed(half[2]):
        taken.append(int(item[entry]))
        entry = int(before[entry])
    return taken[::-1]


def _whole(knapsack: Knapsack) -> tuple[int, int]:
    """What divides all costs, and the capacity in these units.

    Raises:
        AllocationError: a cost is no whole number.
    """
    costs = [cost for group in knapsack.groups for _, cost in group]
    fraction = next((cost for cost in costs if not float(cost).is_integer()), None)
    if fraction is not None:
        raise AllocationError(f"expected whole costs, found {fraction}; use solve_pareto, which takes fractions")
    unit = math.gcd(*(int(cost) for cost in costs)) or 1
    return unit, max(math.floor(Fraction(knapsack.capacity) / unit), -1)


def _pick(knapsack: Knapsack, items: Sequence[int | None]) -> Pick:
    taken = [group[item] for group, item in zip(knapsack.groups, items, strict=True) if item is not None]
    return Pick(tuple(items), math.fsum(value for value, _ in taken), math.fsum(cost for _, cost in taken))


def _infeasible(knapsack: Knapsack) -> AllocationError:
    least = math.fsum(min((cost for _, cost in group), default=0.0) for group in knapsack.groups)
    return AllocationError(
        f"expected some choice of items within the capacity of {knapsack.capacity:g}, but the cheapest cost {least:g}; "
        "raise the capacity or give cheaper items"
    )
