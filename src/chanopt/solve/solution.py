"""What the solver answers, and the one definition of what an order costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import networkx as nx

from chanopt.errors import InstanceError
from chanopt.solve.instance import Edge, Instance, Reader, check_keys, parse_json

__all__ = ["Solution", "cost", "is_free", "is_hard", "touched_blocks"]

Order = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Solution:
    """Orders of the channels, what they cost, and how far that is proven.

    `order` is the order of value 0, a permutation of all channels: `order[p]` stands at position `p`.
    `orders` has one such order per value; values of one part share the object. `parts` numbers the part of
    every value, `gathered` names the readers that pay, `cut` the edges whose two sides differ. `objective` is
    what they pay together, in the units of the weights; `bound` is a proven lower bound of it, equal to it if
    and only if `optimal`. `stats` counts what the solver did. `touched` has the aligned blocks that each reader
    with a grain touches, for each of which it pays its weight; such readers are not in `gathered`.
    """

    order: Order
    orders: tuple[Order, ...]
    parts: tuple[int, ...]
    gathered: tuple[str, ...]
    cut: tuple[str, ...]
    objective: float
    bound: float
    optimal: bool
    seconds: float = field(compare=False)
    stats: Mapping[str, int] = field(default_factory=dict[str, int])
    touched: Mapping[str, int] = field(default_factory=dict[str, int])

    def check(self, instance: Instance) -> None:
        """Recompute everything from the orders; raises InstanceError where the solution says otherwise."""
        self._check_orders(instance)
        _check_hard(instance, self.orders)
        gathered, cut, objective = cost(instance, self.orders)
        _expect("gathered", gathered, self.gathered)
        _expect("cut", cut, self.cut)
        _expect("touched", touched_blocks(instance, self.orders), dict(self.touched))
        _expect("parts", parts_of(instance, self.orders), self.parts)
        if not math.isclose(objective, self.objective, rel_tol=1e-12):
            _expect("objective", objective, self.objective)
        if self.bound > self.objective or self.optimal != (self.bound == self.objective):
            raise InstanceError(
                "expected a bound below the objective, or equal to it and optimal, found bound "
                f"{self.bound}, objective {self.objective}, optimal {self.optimal}: solve again"
            )

    @classmethod
    def from_json(cls, data: str | Mapping[str, Any]) -> Solution:
        """Read a solution from JSON text or from what `json.loads` makes of it."""
        table = parse_json(data, "a solution")
        known = {item.name for item in fields(cls)}
        check_keys(table, known, known - {"stats", "touched"}, "a solution")
        shared = {tuple(order): tuple(order) for order in table["orders"]}
        return cls(
            order=shared.get(tuple(table["order"]), tuple(table["order"])),
            orders=tuple(shared[tuple(order)] for order in table["orders"]),
            parts=tuple(table["parts"]),
            gathered=tuple(table["gathered"]),
            cut=tuple(table["cut"]),
            objective=table["objective"],
            bound=table["bound"],
            optimal=table["optimal"],
            seconds=table["seconds"],
            stats=dict(table.get("stats", {})),
            touched=dict(table.get("touched", {})),
        )

    def to_json(self) -> str:
        """Return the JSON text that `from_json` reads."""
        table = {item.name: getattr(self, item.name) for item in fields(self)}
        return json.dumps({**table, "stats": dict(self.stats), "touched": dict(self.touched)})

    def _check_orders(self, instance: Instance) -> None:
        if len(self.orders) != instance.values:
            raise InstanceError(
                f"orders: expected {instance.values}, one per value, found {len(self.orders)}: "
                "check that the solution belongs to this instance"
            )
        everything = list(range(instance.channels))
        for value, order in enumerate(self.orders):
            if sorted(order) != everything:
                raise InstanceError(
                    f"value {value}: expected a permutation of 0 .. {instance.channels - 1}, found "
                    f"{_short(order)}: check that the solution belongs to this instance"
                )
        _expect("order", self.orders[0], self.order)


def cost(instance: Instance, orders: Sequence[Order]) -> tuple[tuple[str, ...], tuple[str, ...], float]:
    """Return who pays under one order per value: the readers that are not free, the edges, and the total.

    The total has their weights, and those of readers with a grain once for every block that they touch.
    """
    places = _places(orders)
    paying = [reader for reader in instance.readers if not reader.grain and not is_free(reader, places[reader.value])]
    cut = [edge for edge in instance.edges if not _joined(edge, orders)]
    touched = touched_blocks(instance, orders)
    paid = [item.weight for item in (*paying, *cut)]
    paid += [reader.weight * touched[reader.name] for reader in instance.readers if reader.grain]
    return (
        tuple(reader.name for reader in paying),
        tuple(edge.name for edge in cut),
        sum(paid) if all(isinstance(weight, int) for weight in paid) else math.fsum(paid),
    )


def touched_blocks(instance: Instance, orders: Sequence[Order]) -> dict[str, int]:
    """Return for each reader with a grain how many aligned blocks of positions hold a channel of its set."""
    places = _places(orders)
    return {
        reader.name: len({places[reader.value][channel] // reader.grain for channel in reader.set})
        for reader in instance.readers
        if reader.grain
    }


def is_hard(instance: Instance, orders: Sequence[Order]) -> bool:
    """Whether all blocks and pins hold."""
    try:
        _check_hard(instance, orders)
    except InstanceError:
        return False
    return True


def parts_of(instance: Instance, orders: Sequence[Order]) -> tuple[int, ...]:
    """Return the number of every value's part: the values joined by edges that no change of order cuts."""
    graph = nx.Graph()
    graph.add_nodes_from(range(instance.values))
    graph.add_edges_from((edge.source, edge.target) for edge in instance.edges if _joined(edge, orders))
    number = {value: part for part, members in enumerate(nx.connected_components(graph)) for value in members}
    return tuple(number[value] for value in range(instance.values))


def is_free(reader: Reader, place: Sequence[int]) -> bool:
    """Whether the reader finds its channels as one range, channel `c` being at position `place[c]`."""
    return _in_sequence(reader.set, place) if reader.ordered else _is_range(reader.set, place)


def _joined(edge: Edge, orders: Sequence[Order]) -> bool:
    first, second = orders[edge.source], orders[edge.target]
    return first is second or first == second


def _places(orders: Sequence[Order]) -> list[list[int]]:
    """Return the position of every channel, per value; values with one order share the list."""
    known: dict[int, list[int]] = {}
    for order in orders:
        if id(order) in known:
            continue
        place = known[id(order)] = [0] * len(order)
        for position, channel in enumerate(order):
            place[channel] = position
    return [known[id(order)] for order in orders]


def _is_range(channels: Sequence[int], place: Sequence[int]) -> bool:
    if not channels:
        return True
    positions = [place[channel] for channel in channels]
    return max(positions) - min(positions) + 1 == len(positions)


def _in_sequence(channels: Sequence[int], place: Sequence[int]) -> bool:
    return all(place[after] == place[before] + 1 for before, after in pairwise(channels))


def _check_hard(instance: Instance, orders: Sequence[Order]) -> None:
    places = _places(orders)
    for number, block in enumerate(instance.blocks):
        if not _is_range(block.set, places[block.value]):
            raise InstanceError(
                f"block {number}: expected one range in the order of value {block.value}, found its "
                "channels apart: solve again"
            )
    for number, pin in enumerate(instance.pins):
        if not _in_sequence(pin.sequence, places[pin.value]):
            raise InstanceError(
                f"pin {number}: expected its sequence as it stands in the order of value {pin.value}, "
                "found another: solve again"
            )


def _expect(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise InstanceError(f"{what}: expected {_short(expected)} from the orders, found {_short(found)}: solve again")


def _short(item: object) -> str:
    text = repr(item)
    return text if len(text) <= 80 else f"{text[:77]}..."
