"""Readers with a grain: orders in which they touch few aligned blocks of positions, and what they pay at least.

Where nothing but readers of one grain constrains an order, the packing program answers (`pack`). Blocks, pins,
several grains, or range readers that are to stay free, constrain it: then channels are exchanged only where no
such set tells them apart, which keeps every range a range. Which edges to cut is decided by the range program
alone, by the readers with a grain alone, or as the second bound has it. Of all orders found, and of the natural one,
the cheapest is taken.

There are two bounds. One is a sum, for each reader pays on its own: what readers of ranges and edges pay at least, and
what the readers of each value and grain pay at least, be the order whatever it likes. The other counts edges with the
readers of a grain: whatever is cut, values that stay together have one order, in which their readers pay at least what
the packing program says of them all; of a chain of values the cheapest cuts are found (`_Search.divided`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import networkx as nx
import numpy as np

from chanopt.solve.arrange import arrange
from chanopt.solve.chain import path_of
from chanopt.solve.exchange import COARSE, FINE, Bins, exchange
from chanopt.solve.instance import Instance, Reader
from chanopt.solve.pack import gray_cost, least, pack
from chanopt.solve.packing import Bools, gray_order
from chanopt.solve.pqtree import PQTree
from chanopt.solve.problem import Demand, Scale, collapse, demands_of
from chanopt.solve.solution import Order, cost, is_hard

__all__ = ["Touching", "touch_few"]

_LONGEST = 128
"""A chain of more values has too many intervals to look at all of them."""
_NEVER = 2**62
"""What values pay in one order that no order suits; more than all weights together."""
_TURNS, _TRIED = 3, 2
"""Begins that are looked at for an order in which some sets must be ranges, forwards and backwards, and orders of them
in which channels are exchanged."""


@dataclass(frozen=True, slots=True)
class Touching:
    """The cheapest orders that were found, and what is paid at least, scaled."""

    orders: tuple[Order, ...]
    bound: int
    """By readers with a grain."""
    joint: int
    """By them and for edges."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Values that share an order, and the demands that must hold in it."""

    values: frozenset[int]
    must: tuple[Demand, ...]


def touch_few(
    instance: Instance,
    scale: Scale,
    orders: tuple[Order, ...],
    chosen: tuple[Collection[int], Collection[int]],
    deadline: float,
    workers: int,
) -> Touching:
    """Return orders at least as cheap as the given ones of the range program and as the natural one.

    `chosen` has the readers that pay and the edges that are cut in the given orders.
    """
    search = _Search(instance, scale, deadline, workers)
    candidates = [(tuple(range(instance.channels)),) * instance.values, orders]
    candidates += [search.orders(parts, orders) for parts in search.divisions(*chosen)]
    _, parts = search.divided()
    candidates.append(search.orders(parts, orders))
    joint, _ = search.divided()  # once more: packing the parts may have proven more of them
    holding = [candidate for candidate in candidates if is_hard(instance, candidate)]
    best = min(holding, key=lambda candidate: cost(instance, candidate)[2])
    return Touching(_shared(best), search.bound(), joint)


def _shared(orders: tuple[Order, ...]) -> tuple[Order, ...]:
    """Return the orders, equal ones as one object."""
    known = {order: order for order in reversed(orders)}
    return tuple(known[order] for order in orders)


@dataclass(slots=True)
class _Search:
    """One instance, with what is known of its parts and values."""

    instance: Instance
    scale: Scale
    deadline: float
    workers: int
    known: dict[_Part, Order] = field(default_factory=dict)
    bounds: dict[tuple[frozenset[int], int], int] = field(default_factory=dict)
    """Values of a part and a grain to what its readers pay at least."""

    def divisions(self, paying: Collection[int], cut: Collection[int]) -> Iterator[list[_Part]]:
        """Yield the ways to divide the values into parts that are worth an order."""
        hard, soft = demands_of(self.instance, self.scale)
        free = [demand for demand in soft if demand.readers[0] not in paying and _binds(demand, self.instance)]
        edges = [edge for number, edge in enumerate(self.instance.edges) if number not in cut]
        parts = _components(self.instance.values, [(edge.source, edge.target) for edge in edges])
        yield [_part(values, hard) for values in parts]
        if free:
            yield [_part(values, [*hard, *free]) for values in parts]
        if self.instance.edges:
            yield [_part(values, hard) for values in self._joined(hard)]

    def orders(self, parts: Sequence[_Part], given: tuple[Order, ...]) -> tuple[Order, ...]:
        """Return an order for every part; a part without readers of a grain keeps the given one if it may."""
        found: dict[int, Order] = {}
        for part in parts:
            before = {given[value] for value in part.values}
            if not self._readers(part.values) and len(before) == 1:
                found.update(dict.fromkeys(part.values, before.pop()))
                continue
            if part not in self.known:
                self.known[part] = self._order(part)
            found.update(dict.fromkeys(part.values, self.known[part]))
        return tuple(found[value] for value in range(self.instance.values))

    def bound(self) -> int:
        """Return what the readers with a grain pay at least."""
        return sum(self._least(_alone(value)) for value in range(self.instance.values))

    def divided(self) -> tuple[int, list[_Part]]:
        """Return what readers with a grain and edges pay at least, and the division of which this is said.

        Values whose edges are no chain, or a very long one, count one by one, without their edges.
        """
        hard, _ = demands_of(self.instance, self.scale)

        def consistent(values: frozenset[int]) -> bool:
            return _consistent(self.instance.channels, hard, values)

        def price(values: frozenset[int]) -> int:
            return self._least(values) if consistent(values) else _NEVER

        graph: nx.Graph[int] = nx.Graph()
        graph.add_nodes_from(range(self.instance.values))
        graph.add_edges_from((edge.source, edge.target) for edge in self.instance.edges)
        total, parts = 0, list[frozenset[int]]()
        for values in nx.connected_components(graph):
            chain = path_of(graph.subgraph(values)) if len(values) <= _LONGEST else None
            if chain is None:
                found = [_alone(value) for value in sorted(values)]
                paid = sum(map(self._least, found))
            else:
                cuts = [self._between(_alone(a), _alone(b)) for a, b in pairwise(chain)]
                paid, found = _Division(chain, cuts).least(price, self.deadline)
            total += paid
            # Past the deadline some were not priced: nobody looked whether they have an order at all.
            parts += [part for one in found for part in ([one] if consistent(one) else map(_alone, sorted(one)))]
        return total, [_part(values, hard) for values in parts]

    def _least(self, values: frozenset[int]) -> int:
        """Return what the readers of values that share an order pay at least."""
        total = 0
        for kind in self._kinds(values):
            if (values, kind.grain) not in self.bounds:
                self.bounds[values, kind.grain] = least(kind.members, kind.weights, kind.grain, self.deadline)
            total += self.bounds[values, kind.grain]
        return total

    def _readers(self, values: frozenset[int]) -> list[Reader]:
        return [r for r in self.instance.readers if r.grain and r.value in values and r.set and r.weight]

    def _kinds(self, values: frozenset[int]) -> list[Bins]:
        """Return the readers of some values by their grains."""
        readers = self._readers(values)
        grains = sorted({reader.grain for reader in readers})
        return [self._kind(grain, [reader for reader in readers if reader.grain == grain]) for grain in grains]

    def _kind(self, grain: int, readers: Sequence[Reader]) -> Bins:
        members = np.zeros((self.instance.channels, len(readers)), dtype=bool)
        for number, reader in enumerate(readers):
            members[list(reader.set), number] = True
        return Bins(grain, members, tuple(self.scale.up(reader.weight) for reader in readers))

    def _order(self, part: _Part) -> Order:
        must = [demand for demand in part.must if _binds(demand, self.instance)]
        kinds = self._kinds(part.values)
        if len(kinds) == 1 and not must:
            (kind,) = kinds
            packed = pack(kind.members, kind.weights, kind.grain, self.deadline, self.workers)
            key = part.values, kind.grain
            self.bounds[key] = max(packed.bound, self.bounds.get(key, 0))
            return _tidied(packed.order, [0] * len(packed.order), kinds)
        base = arrange(self.instance.channels, must, [], [])
        if not kinds:
            return base
        cells = collapse(self.instance.channels, must).of.tolist()
        tries: list[Order] = []
        grays = {way: _gray(way, cells, kinds) for way in _turned(base, must)}
        for way in sorted(grays, key=lambda way: _paid(grays[way], kinds))[:_TRIED]:
            starts: list[tuple[Order, Sequence[float]]] = [(way, COARSE), (grays[way], COARSE)]
            if len(kinds) == 1:
                starts.append((self._packed(way, cells, kinds[0]), FINE))
            tries += [way, *(exchange(start, cells, kinds, steps, self.deadline) for start, steps in starts)]
        best = min(tries, key=lambda order: _paid(order, kinds))
        return _tidied(best, cells, kinds)

    def _packed(self, base: Order, cells: Sequence[int], kind: Bins) -> Order:
        """Pack the channels of each cell that is a range of its own and begins with an aligned block."""
        order = list(base)
        for cell in sorted(set(cells)):
            places = [place for place, channel in enumerate(base) if cells[channel] == cell]
            whole = places[-1] - places[0] + 1 == len(places) and places[0] % kind.grain == 0
            if not whole or len(places) <= kind.grain:
                continue
            channels = sorted(base[place] for place in places)
            packed = pack(kind.members[channels], kind.weights, kind.grain, self.deadline, self.workers)
            for place, channel in zip(places, packed.order, strict=True):
                order[place] = channels[channel]
        return tuple(order)

    def _joined(self, hard: Sequence[Demand]) -> list[frozenset[int]]:
        """Join values across edges, the dearest first, wherever a common order seems to cost less than the edges."""
        parts = {value: frozenset([value]) for value in range(self.instance.values)}
        for edge in sorted(self.instance.edges, key=lambda edge: -edge.weight):
            first, second = parts[edge.source], parts[edge.target]
            if first == second or not _consistent(self.instance.channels, hard, first | second):
                continue
            apart = self._guess(first) + self._guess(second) + self._between(first, second)
            if self._guess(first | second) <= apart:
                parts.update(dict.fromkeys(first | second, first | second))
        return sorted(set(parts.values()), key=min)

    def _guess(self, values: frozenset[int]) -> int:
        return sum(gray_cost(kind.members, kind.weights, kind.grain) for kind in self._kinds(values))

    def _between(self, first: frozenset[int], second: frozenset[int]) -> int:
        return sum(
            self.scale.up(edge.weight)
            for edge in self.instance.edges
            if {edge.source, edge.target} & first and {edge.source, edge.target} & second
        )


@dataclass(frozen=True, slots=True)
class _Division:
    """A chain of values, and what it costs to cut between them."""

    chain: Sequence[int]
    cuts: Sequence[int]

    def least(self, price: Callable[[frozenset[int]], int], deadline: float) -> tuple[int, list[frozenset[int]]]:
        """Return what the cheapest division pays at least, and its parts.

        `price` tells what values that share an order pay at least. It is asked only of the intervals of a division
        that seems the cheapest: an interval pays no less than its values one by one.
        """
        low = {(at, at + 1): price(_alone(value)) for at, value in enumerate(self.chain)}
        priced = set(low)
        for stop in range(2, len(self.chain) + 1):
            for start in range(stop - 1):
                low[start, stop] = low[start, stop - 1] + low[stop - 1, stop]
        while True:
            paid, division = self._cheapest(low)
            open_ = [interval for interval in division if interval not in priced]
            if not open_ or time.monotonic() >= deadline:
                return paid, [frozenset(self.chain[start:stop]) for start, stop in division]
            for start, stop in open_:
                if time.monotonic() >= deadline:
                    break
                low[start, stop] = max(low[start, stop], price(frozenset(self.chain[start:stop])))
                priced.add((start, stop))

    def _cheapest(self, low: Mapping[tuple[int, int], int]) -> tuple[int, list[tuple[int, int]]]:
        """Return a division into intervals that pays least if each pays `low`."""
        best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
        for stop in range(1, len(self.chain) + 1):
            ways = [
                (best[start][0] + (self.cuts[start - 1] if start else 0) + low[start, stop], start)
                for start in range(stop)
            ]
            paid, start = min(ways)
            best.append((paid, [*best[start][1], (start, stop)]))
        return best[-1]


def _alone(value: int) -> frozenset[int]:
    return frozenset([value])


def _part(values: frozenset[int], demands: Iterable[Demand]) -> _Part:
    return _Part(values, tuple(demand for demand in demands if demand.value in values))


def _components(values: int, joined: Iterable[tuple[int, int]]) -> list[frozenset[int]]:
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(values))
    graph.add_edges_from(joined)
    return [frozenset(part) for part in nx.connected_components(graph)]


def _binds(demand: Demand, instance: Instance) -> bool:
    """Whether some order breaks the demand."""
    return len(demand.channels) > 1 and (demand.ordered or len(demand.channels) < instance.channels)


def _consistent(channels: int, hard: Sequence[Demand], values: frozenset[int]) -> bool:
    tree = PQTree(max(channels, 1))
    inside = [demand for demand in hard if demand.value in values]
    return all(tree.order(d.channels) if d.ordered else tree.reduce(d.channels) for d in inside)


def _turned(base: Order, must: Sequence[Demand]) -> list[Order]:
    """Return the order, and orders that begin elsewhere or run backwards, in which the same sets are ranges.

    What is aligned with the blocks of positions in one of them is not in another.
    """
    place = {channel: position for position, channel in enumerate(base)}
    spans = [(min(found), max(found)) for found in ([place[c] for c in demand.channels] for demand in must)]
    ends = {0, *(end for first, last in spans for end in (first, last + 1) if 0 < end < len(base))}
    free = sorted(end for end in ends if not any(first < end <= last for first, last in spans))
    turned = [base[end:] + base[:end] for end in free[:_TURNS]]
    backwards = [] if any(demand.ordered for demand in must) else [order[::-1] for order in turned]
    return [*turned, *backwards]


def _told(kinds: Sequence[Bins]) -> Bools:
    return np.hstack([kind.members for kind in kinds])


def _paid(order: Order, kinds: Sequence[Bins]) -> int:
    """Return what readers pay in an order."""
    total = 0
    for kind in kinds:
        for number, weight in enumerate(kind.weights):
            total += weight * len(set((np.flatnonzero(kind.members[list(order), number]) // kind.grain).tolist()))
    return total


def _gray(base: Order, cells: Sequence[int], kinds: Sequence[Bins]) -> Order:
    """Return an order in which every cell keeps its places and fills them in the order of a Gray code."""
    rank = {channel: place for place, channel in enumerate(gray_order(_told(kinds)).tolist())}
    wanted = sorted(base, key=lambda channel: (cells[channel], rank[channel]))
    places = sorted(range(len(base)), key=lambda place: (cells[base[place]], place))
    order = [0] * len(base)
    for place, channel in zip(places, wanted, strict=True):
        order[place] = channel
    return tuple(order)


def _tidied(order: Order, cells: Sequence[int], kinds: Sequence[Bins]) -> Order:
    """Return an order of few runs: channels of one cell change places inside the blocks that they share.

    From place to place the nearest channel, in the readers that tell it apart from the one before, comes next.
    """
    told = _told(kinds).astype(np.int64)
    groups: dict[tuple[int, ...], list[int]] = {}
    keys = [(cells[c], *(place // kind.grain for kind in kinds)) for place, c in enumerate(order)]
    for channel, key in zip(order, keys, strict=True):
        groups.setdefault(key, []).append(channel)
    waiting = {key: sorted(channels) for key, channels in groups.items()}
    made: list[int] = []
    for key in keys:
        left = waiting[key]
        steps = np.abs(told[left] - told[made[-1]]).sum(axis=1) if made else np.zeros(1)
        made.append(left.pop(int(np.argmin(steps))))
    return tuple(made)
