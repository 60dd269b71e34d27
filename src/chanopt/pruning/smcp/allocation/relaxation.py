"""The allocation with its capacity in the objective: exact for every price, hence a bound.

At a price per unit of cost the program falls apart into a value per group and a cost per pair of groups, whose best
choice variable elimination finds: a residual network's groups form a graph of small width. Every price bounds the
program from above; the lowest of these bounds is found, and with it what every single option is worth at most, which
strikes most options before a search begins (Lagrangian relaxation and reduced-cost fixing).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from chanopt.pruning.smcp.allocation.curves import Counts, Curves, Floats, costs_of
from chanopt.pruning.smcp.allocation.instance import Instance, Layer, Product

__all__ = ["Point", "Relaxation"]

_MOST_ENTRIES = 2**22
"""Entries of one table of the elimination (32 MB)."""
_MOST_TOTAL = 2**25
"""Entries of all of them."""
_PRICES = 60
"""Prices tried at most; each halves what is unknown or ends the search, and a dozen are usual."""


@dataclass(frozen=True, slots=True)
class Point:
    """The best choice at one price: its options by index, value, cost, and the bound that the price gives."""

    price: float
    choice: tuple[int, ...]
    value: float
    cost: float
    bound: float


@dataclass(slots=True)
class _Bucket:
    """One eliminated group with its neighbours: `scope` ascending, `axis` its own place in it."""

    group: int
    scope: tuple[int, ...]
    cost: Floats
    parent: int = -1

    @property
    def axis(self) -> int:
        return self.scope.index(self.group)

    @property
    def rest(self) -> tuple[int, ...]:
        return tuple(group for group in self.scope if group != self.group)


class Relaxation:
    """The relaxation of one instance. Cuts are left out, which only raises the bound."""

    def __init__(self, curves: Curves, buckets: list[_Bucket]) -> None:
        self._curves = curves
        self._instance = curves.instance
        self._buckets = buckets

    @classmethod
    def of(cls, curves: Curves) -> Relaxation | None:
        """The relaxation, or None where a layer joins too many groups for tables of all their options."""
        instance = curves.instance
        sizes = [len(group.options) for group in instance.groups]
        factors = _factors(instance, curves, sizes)
        if factors is None:
            return None
        scopes = _eliminate(len(sizes), factors, sizes)
        entries = [_entries(scope, sizes) for _, scope in scopes]
        if max(entries, default=0) > _MOST_ENTRIES or sum(entries) > _MOST_TOTAL:
            return None
        place = {group: number for number, (group, _) in enumerate(scopes)}
        buckets = [_Bucket(group, scope, np.zeros([sizes[g] for g in scope])) for group, scope in scopes]
        for bucket in buckets:
            bucket.parent = min((place[group] for group in bucket.rest), default=-1)
        for scope, cost in factors:
            bucket = buckets[min(place[group] for group in scope)]
            bucket.cost += _spread(cost, scope, bucket.scope)
        return cls(curves, buckets)

    def cheapest(self) -> Point:
        """The choice of least cost."""
        return self._point([np.zeros(len(values)) for values in self._curves.values], 1.0)

    def best(self, price: float) -> Point:
        """The best choice at a price."""
        return self._point(self._curves.values, price)

    def prices(self) -> Iterator[Point]:
        """Points at prices that close in on the one of the lowest bound; the last but few have it.

        The bound is convex and piecewise linear in the price: the next price is where the lines of the best known
        choices on the two sides of the capacity meet.
        """
        capacity = self._instance.capacity
        over, under = self.best(0.0), self.cheapest()
        under = Point(0.0, under.choice, self._value(under.choice), under.cost, float("inf"))
        yield over
        if over.cost <= capacity:
            return
        yield under
        for _ in range(_PRICES):
            price = (over.value - under.value) / (over.cost - under.cost)
            point = self.best(max(price, 0.0))
            yield point
            line = over.value - price * (over.cost - capacity)
            if point.bound <= line + 1e-12 * max(1.0, abs(line)) or point.cost in (over.cost, under.cost):
                return
            over, under = (point, under) if point.cost > capacity else (over, point)

    def worth(self, price: float) -> list[Floats]:
        """Per group, shape (options,): no choice with this option within the capacity is worth more."""
        tables = self._up(self._curves.values, price)
        messages = [table.max(bucket.axis) for table, bucket in zip(tables, self._buckets, strict=True)]
        constant = price * self._instance.capacity
        roots = sum(
            float(message) for message, bucket in zip(messages, self._buckets, strict=True) if bucket.parent < 0
        )
        worth: dict[int, Floats] = {}
        for number in reversed(range(len(self._buckets))):
            bucket = self._buckets[number]
            if bucket.parent < 0:
                tables[number] = tables[number] + (roots - float(messages[number]))
            else:
                above = self._buckets[bucket.parent]
                gone = tuple(axis for axis, group in enumerate(above.scope) if group not in bucket.rest)
                down = tables[bucket.parent].max(gone) - messages[number]
                tables[number] = tables[number] + np.expand_dims(down, bucket.axis)
            others = tuple(axis for axis in range(len(bucket.scope)) if axis != bucket.axis)
            worth[bucket.group] = tables[number].max(others) + constant
        return [worth[group] for group in range(len(self._instance.groups))]

    def _value(self, choice: Sequence[int]) -> float:
        return float(sum(values[option] for values, option in zip(self._curves.values, choice, strict=True)))

    def _up(self, values: Sequence[Floats], price: float) -> list[Floats]:
        """Per bucket, its table with everything that was eliminated before it."""
        tables = [-price * bucket.cost for bucket in self._buckets]
        for number, bucket in enumerate(self._buckets):
            tables[number] += _spread(values[bucket.group], (bucket.group,), bucket.scope)
            if bucket.parent >= 0:
                message = tables[number].max(bucket.axis)
                tables[bucket.parent] += _spread(message, bucket.rest, self._buckets[bucket.parent].scope)
        return tables

    def _point(self, values: Sequence[Floats], price: float) -> Point:
        tables = self._up(values, price)
        choice = [0] * len(values)
        for table, bucket in zip(reversed(tables), reversed(self._buckets), strict=True):
            where = tuple(slice(None) if group == bucket.group else choice[group] for group in bucket.scope)
            choice[bucket.group] = int(np.argmax(table[where]))
        kept = [int(options[option]) for options, option in zip(self._curves.options, choice, strict=True)]
        value, cost = float(sum(v[o] for v, o in zip(values, choice, strict=True))), self._instance.cost(kept)
        return Point(price, tuple(choice), value, cost, value - price * (cost - self._instance.capacity))


def _factors(instance: Instance, curves: Curves, sizes: Sequence[int]) -> list[tuple[tuple[int, ...], Floats]] | None:
    """Tables of cost over few groups each, which together are the cost; None if one would be too large."""
    factors: list[tuple[tuple[int, ...], Floats]] = []
    for layer in instance.layers:
        if isinstance(layer.cost, Product) and len(layer.groups) > 2:
            factors.extend(_pairs(layer, layer.cost, curves))
        elif _entries(layer.groups, sizes) > _MOST_ENTRIES:
            return None
        elif layer.groups:
            factors.append((layer.groups, _whole(layer, curves)))
    return factors


def _pairs(layer: Layer, cost: Product, curves: Curves) -> Iterator[tuple[tuple[int, ...], Floats]]:
    """A product of sums is a sum of products of two groups."""
    outputs = layer.outputs or ((-1, 1),)
    for (one, times), (other, more) in itertools.product(layer.inputs, outputs):
        rate = float(cost.rate * times * more)
        if other in (one, -1):
            yield (one,), rate * curves.options[one].astype(np.float64) ** (2 if other == one else 1)
            continue
        low, high = min(one, other), max(one, other)
        yield (low, high), rate * np.multiply.outer(curves.options[low], curves.options[high])


def _whole(layer: Layer, curves: Curves) -> Floats:
    scope = layer.groups

    def side(terms: Iterable[tuple[int, int]]) -> Counts:
        total = np.zeros([1] * len(scope), dtype=np.int64)
        for group, times in terms:
            total = total + times * _spread(curves.options[group], (group,), scope)
        return total

    shape = [len(curves.options[group]) for group in scope]
    outputs = side(layer.outputs) if layer.outputs else np.ones([1] * len(scope), dtype=np.int64)
    return np.broadcast_to(costs_of(layer.cost, *np.broadcast_arrays(side(layer.inputs), outputs)), shape)


def _spread(array: np.typing.NDArray[np.generic], scope: Sequence[int], wide: Sequence[int]) -> np.ndarray:  # type: ignore[type-arg]
    """An array over `scope` with an axis of size one for every other group of `wide`; both ascending."""
    sizes = dict(zip(scope, array.shape, strict=True))
    return array.reshape([sizes.get(group, 1) for group in wide])


def _entries(scope: Iterable[int], sizes: Sequence[int]) -> int:
    total = 1
    for group in scope:
        total *= sizes[group]
    return total


def _eliminate(
    groups: int, factors: Iterable[tuple[tuple[int, ...], Floats]], sizes: Sequence[int]
) -> list[tuple[int, tuple[int, ...]]]:
    """(group, group and its neighbours) in an order that keeps tables small: always the smallest next."""
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(groups))
    for scope, _ in factors:
        graph.add_edges_from(itertools.combinations(scope, 2))
    scopes: list[tuple[int, tuple[int, ...]]] = []
    while graph:
        group = min(graph, key=lambda node: (_entries([node, *graph[node]], sizes), node))
        neighbours = sorted(graph[group])
        scopes.append((group, tuple(sorted([group, *neighbours]))))
        graph.remove_node(group)
        graph.add_edges_from(itertools.combinations(neighbours, 2))
    return scopes
