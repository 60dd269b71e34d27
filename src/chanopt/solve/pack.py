"""An order for readers of one grain that nothing else constrains: the packing program, from cheap to thorough.

1. The order of a Gray code; done if it meets the floors. Else bins are also filled greedily.
2. Few unions of signatures: the linear program over bins gives a bound, a dive into it bins; exchanges and, where
   it is small, the program in whole numbers finish them.
3. Many: exchanges alone; the bounds of groups of readers, add up, since each reader is in one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from chanopt.solve.columns import Priced, bound_of, dive, greedy_bins, quick_bound
from chanopt.solve.exact import prove
from chanopt.solve.exchange import COARSE, FINE, Bins, exchange
from chanopt.solve.packing import Bools, Counts, Packing, cost_of, floor_of, gray_bins, grown_bins, packing_of, unions

__all__ = ["Packed", "gray_cost", "least", "pack"]

_LINEAR, _GREEDY = 20_000, 250_000
"""Pairs of a union and a class up to which the linear program is solved within a second, and bins are filled
greedily at fixed prices: seven readers have 16,000, nine 260,000 at most."""
_UNIONS = 512
_PROGRAM = 300
"""Variables up to which CP-SAT proves what it finds within seconds: five readers have 243."""
_STEPS = 500_000_000
"""Bins are grown channel by channel if that looks at no more signs than these."""
_FAVOURS = (0.0, 0.3)
_SHARES = (0.8, 1.0, 1.2)
_SURE = (0.6, 0.9)
_BOUND_SHARES = (0.8, 0.9, 1.0)
_GROUP, _GROUPS, _GROUP_UNIONS, _GROUP_PAIRS = 10, 4, 1100, 1_200_000
_SMALL, _SMALLS = 7, 2
_LARGEST = 2**59
"""Sums of weights over a bin stay below this, so that prices fit into 62 bits."""


@dataclass(frozen=True, slots=True)
class Packed:
    """An order of the channels, what its readers pay, and what any order pays at least."""

    order: tuple[int, ...]
    cost: int
    bound: int


def gray_cost(members: Bools, weights: Sequence[int], grain: int) -> int:
    """Return what the order of a Gray code pays: a quick estimate."""
    packing, _ = packing_of(members, weights, grain)
    return cost_of(packing, gray_bins(packing, packing.counts, packing.rest > 0))


def least(members: Bools, weights: Sequence[int], grain: int, deadline: float) -> int:
    """Return what any order pays at least."""
    packing, _ = packing_of(members, weights, grain)
    floor = floor_of(packing)
    if cost_of(packing, gray_bins(packing, packing.counts, packing.rest > 0)) == floor:
        return floor
    priced = _priced(packing, _UNIONS, _LINEAR)
    return (
        _group_bound(members, weights, grain, deadline) if priced is None else max(floor, bound_of(priced, deadline)[0])
    )


def pack(members: Bools, weights: Sequence[int], grain: int, deadline: float, workers: int) -> Packed:
    """Return a cheap order of all channels; row c, column r of `members`: whether reader r takes channel c."""
    packing, class_of = packing_of(members, weights, grain)
    floor = floor_of(packing)
    bins = gray_bins(packing, packing.counts, packing.rest > 0)
    if cost_of(packing, bins) == floor:
        return Packed(_order(bins, class_of), floor, floor)
    priced = _priced(packing, _UNIONS, _GREEDY)
    bins = _cheapest(packing, [bins, *_starts(packing, priced)])
    if priced is None or priced.size > _LINEAR:
        bound = _group_bound(members, weights, grain, deadline)
        gray = gray_bins(packing, packing.counts, packing.rest > 0)
        tries = [_exchanged(packing, bins, FINE, deadline), _exchanged(packing, gray, COARSE, deadline)]
        bins = _cheapest(packing, tries)
        return Packed(_order(bins, class_of), cost_of(packing, bins), max(floor, bound))
    bound, columns = bound_of(priced, deadline)
    bound = max(bound, floor)
    for sure in _SURE:
        if cost_of(packing, bins) > bound:
            bins = _cheapest(packing, [bins, dive(priced, columns, sure, deadline)])
    if cost_of(packing, bins) > bound:
        bins = _exchanged(packing, bins, FINE, deadline)
    if cost_of(packing, bins) > bound and int(priced.fits.sum()) <= _PROGRAM:
        proven = prove(priced, bins, bound, deadline, workers)
        if proven is not None:
            bins, bound = _cheapest(packing, [bins, proven.bins]), proven.bound
    return Packed(_order(bins, class_of), cost_of(packing, bins), bound)


def _starts(packing: Packing, priced: Priced | None) -> list[Counts]:
    steps = int(packing.counts.sum()) * packing.signatures.size
    grown = [grown_bins(packing, favour) for favour in _FAVOURS] if steps <= _STEPS else []
    return grown if priced is None else [*grown, *(greedy_bins(priced, share) for share in _SHARES)]


def _cheapest(packing: Packing, tries: Sequence[Counts]) -> Counts:
    return min(tries, key=lambda bins: cost_of(packing, bins))


def _priced(packing: Packing, most: int, pairs: int) -> Priced | None:
    """Return the unions of a packing; None if they are too many, or the weights too large, to price bins."""
    if not packing.weights or sum(packing.weights) * packing.grain > _LARGEST:
        return None
    found = unions(packing.signatures, most)
    return None if found is None or len(found) * len(packing.counts) > pairs else Priced(packing, found)


def _group_bound(members: Bools, weights: Sequence[int], grain: int, deadline: float) -> int:
    """Return a bound of readers in groups: large ones by fixed prices, or a few small ones by the linear program.

    Readers after the last group, or after the deadline, have their floors only.
    """

    def total(sizes: Sequence[int], bound: Callable[[Priced], int]) -> int:
        ends = [min(end, members.shape[1]) for end in accumulate(sizes)]
        parts = [slice(*pair) for pair in pairwise([0, *ends])]
        groups = [packing_of(members[:, part], weights[part], grain)[0] for part in parts]
        rest = packing_of(members[:, ends[-1] :], weights[ends[-1] :], grain)[0]
        return floor_of(rest) + sum(_at_least(group, bound, deadline) for group in groups)

    quick = total([_GROUP] * _GROUPS, lambda priced: quick_bound(priced, _BOUND_SHARES)[0])
    return max(
        quick, total([_SMALL] * _SMALLS, lambda priced: bound_of(priced, deadline)[0] if priced.size <= _LINEAR else 0)
    )


def _at_least(packing: Packing, bound: Callable[[Priced], int], deadline: float) -> int:
    floor = floor_of(packing)
    priced = _priced(packing, _GROUP_UNIONS, _GROUP_PAIRS) if time.monotonic() < deadline else None
    return floor if priced is None else max(floor, bound(priced))


def _exchanged(packing: Packing, bins: Counts, steps: Sequence[float], deadline: float) -> Counts:
    """Return the bins after exchanges of channels between them."""
    classes = np.arange(len(packing.counts))
    order = np.concatenate([np.repeat(classes, row) for row in bins])
    by_class = np.repeat(classes, packing.counts)
    # The channels are numbered by their class here.
    seats = np.empty_like(order)
    seats[np.argsort(order, kind="stable")] = np.arange(len(order))
    kind = Bins(packing.grain, packing.signatures[by_class], packing.weights)
    found = exchange(seats.tolist(), [0] * len(seats), [kind], steps, deadline)
    made = np.zeros_like(bins)
    np.add.at(made, (np.arange(len(found)) // packing.grain, by_class[list(found)]), 1)
    return made


def _order(bins: Counts, class_of: npt.NDArray[np.intp]) -> tuple[int, ...]:
    """Return the channels bin after bin: ascending within a class, and bins as near their old places as they can."""
    if not len(class_of):
        return ()
    sizes = bins.sum(axis=1)
    waiting = [np.flatnonzero(class_of == number).tolist()[::-1] for number in range(bins.shape[1])]
    # A bin whose classes begin early takes their first channels.
    first = np.array([stack[-1] for stack in waiting])
    early = sorted(range(len(bins)), key=lambda number: float(bins[number] @ first))
    held = {number: _drawn(waiting, bins[number]) for number in early}
    shorter = int(sizes.max()) > int(sizes[-1])
    inner = range(len(bins) - shorter)
    ranked = sorted(inner, key=lambda number: sum(held[number]))
    return tuple(channel for number in [*ranked, *range(len(inner), len(bins))] for channel in held[number])


def _drawn(waiting: list[list[int]], row: Counts) -> list[int]:
    return sorted(waiting[number].pop() for number, count in enumerate(row.tolist()) for _ in range(count))
