"""From an instance to small independent problems over atoms.

Channels that are in the same sets are one *atom*: some best order keeps them together. Values that no edge
joins, and, within one value, sets that no chain of overlaps joins, are decided apart: a family of sets has
the consecutive-ones property if and only if every connected component of its overlap graph has it (McConnell,
"A certifying algorithm for the consecutive-ones property", SODA 2004, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
import numpy.typing as npt

from chanopt.solve.instance import Instance
from chanopt.solve.pqtree import PQTree, labels_of, mask_of

__all__ = [
    "Atoms",
    "Demand",
    "Item",
    "Link",
    "Problem",
    "Scale",
    "collapse",
    "demands_of",
    "insert",
    "linked",
    "restrict",
    "split",
]

_EXACT = 2**60
"""Integer weights up to this total stay as they are: CP-SAT counts in 64 bits."""
_ROUNDED = 2**50
"""Other weights are scaled to a total near this, so that they are exact to the precision of a float."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Turns weights into the integers that CP-SAT wants, and back."""

    factor: float
    """1 if the weights are integers already."""

    @classmethod
    def of(cls, weights: Sequence[float]) -> Scale:
        """Choose the factor for weights of which any may be paid."""
        if all(isinstance(weight, int) for weight in weights) and sum(weights) <= _EXACT:
            return cls(1)
        total = math.fsum(weights)
        return cls(_ROUNDED / 2.0 ** math.ceil(math.log2(total)) if total else 1)

    def up(self, weight: float) -> int:
        """Return the integer for a weight."""
        return int(weight) if self.factor == 1 and isinstance(weight, int) else round(weight * self.factor)

    def down(self, total: int) -> float:
        """Return the weight for an integer."""
        return total if self.factor == 1 else total / self.factor


@dataclass(frozen=True, slots=True)
class Demand:
    """Channels that are, or should be, one range in the order of a value; hard without readers."""

    channels: tuple[int, ...]
    value: int
    ordered: bool = False
    weight: int = 0
    readers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Item:
    """A demand over the atoms of one problem; `sequence` is empty unless the demand is ordered."""

    mask: int
    sequence: tuple[int, ...]
    value: int
    weight: int
    readers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """All the edges between two values."""

    ends: tuple[int, int]
    weight: int
    edges: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is decided at once: hard items first, then the readers from the heaviest down."""

    atoms: int
    values: tuple[int, ...]
    items: tuple[Item, ...]
    hard: int
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Atoms:
    """Channels that no set tells apart, in ascending order, and the sets as masks of atoms."""

    members: tuple[tuple[int, ...], ...]
    masks: tuple[int, ...]
    of: npt.NDArray[np.intp]
    """The atom of every channel."""


def insert(tree: PQTree, item: Item) -> bool:
    """Add an item to a tree; False, and the tree unchanged, if it conflicts."""
    return tree.order(item.sequence) if item.sequence else tree.reduce_mask(item.mask)


def collapse(channels: int, demands: Sequence[Demand]) -> Atoms:
    """Collapse channels that are in the same sets; the channels of ordered demands stay single."""
    matrix = np.zeros((len(demands), channels), dtype=bool)
    single = np.zeros(channels, dtype=np.int32)
    for row, demand in zip(matrix, demands, strict=True):
        row[list(demand.channels)] = True
        if demand.ordered:
            single[list(demand.channels)] = [channel + 1 for channel in demand.channels]
    signatures = np.packbits(matrix, axis=0).T.copy()
    atoms: dict[tuple[bytes, int], list[int]] = {}
    for channel, number in enumerate(single.tolist()):
        atoms.setdefault((signatures[channel].tobytes(), number), []).append(channel)
    members = tuple(tuple(atom) for atom in atoms.values())
    of = np.empty(channels, dtype=np.intp)
    for number, atom in enumerate(members):
        of[list(atom)] = number
    reduced = np.packbits(matrix[:, [atom[0] for atom in members]], axis=1, bitorder="little")
    return Atoms(members, tuple(int.from_bytes(row.tobytes(), "little") for row in reduced), of)


def items_of(demands: Sequence[Demand], atoms: Atoms) -> list[Item]:
    """Return the demands over the atoms that `collapse` made of them."""
    return [
        Item(
            mask,
            tuple(atoms.of[list(demand.channels)].tolist()) if demand.ordered else (),
            demand.value,
            demand.weight,
            demand.readers,
        )
        for demand, mask in zip(demands, atoms.masks, strict=True)
    ]


def restrict(problem: Problem, numbers: Sequence[int]) -> Problem:
    """Return the problem of some of the items, in ascending order of their numbers, over fewer atoms."""
    items = [problem.items[number] for number in numbers]
    demands = [
        Demand(item.sequence or tuple(labels_of(item.mask)), item.value, bool(item.sequence), item.weight, item.readers)
        for item in items
    ]
    atoms = collapse(problem.atoms, demands)
    hard = sum(number < problem.hard for number in numbers)
    return replace(problem, atoms=len(atoms.members), items=tuple(items_of(demands, atoms)), hard=hard)


def demands_of(instance: Instance, scale: Scale) -> tuple[list[Demand], list[Demand]]:
    """Return what must be a range, pins before blocks, and what should be; equal readers are one demand.

    A reader with a grain demands no range.
    """
    hard = [Demand(pin.sequence, pin.value, True) for pin in instance.pins]
    hard += [Demand(block.set, block.value) for block in instance.blocks]
    same: dict[tuple[tuple[int, ...], int, bool], list[int]] = {}
    for number, reader in enumerate(instance.readers):
        if reader.grain:
            continue
        same.setdefault((reader.set, reader.value, reader.ordered), []).append(number)
    soft = [
        Demand(*key, sum(scale.up(instance.readers[number].weight) for number in numbers), tuple(numbers))
        for key, numbers in same.items()
    ]
    return list(dict.fromkeys(hard)), soft


def split(instance: Instance, scale: Scale) -> list[Problem]:
    """Return the independent problems that hold a choice; a reader in none of them is free at no cost."""
    hard, soft = demands_of(instance, scale)
    demands = [demand for demand in hard + soft if _matters(demand, instance.channels)]
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(instance.values))
    graph.add_edges_from((edge.source, edge.target) for edge in instance.edges)
    problems: list[Problem] = []
    for values in nx.connected_components(graph):
        inside = [demand for demand in demands if demand.value in values]
        groups = _overlapping(inside)
        if len(values) > 1:
            groups = [[demand for group in groups for demand in group]]
        links = _links(instance, scale, values)
        problems += [
            _problem(instance.channels, values, group, links)
            for group in groups
            if any(d.weight for d in group) or (group and links)
        ]
    return problems


def _matters(demand: Demand, channels: int) -> bool:
    """Whether some order breaks the demand, and breaking it costs."""
    size = len(demand.channels)
    return size > 1 and (demand.ordered or size < channels) and (demand.weight > 0 or not demand.readers)


def _overlapping(demands: list[Demand]) -> list[list[Demand]]:
    """Return the components of two demands or more of the overlap graph."""
    masks = [mask_of(demand.channels) for demand in demands]
    graph: nx.Graph[int] = nx.Graph()
    for second in range(len(demands)):
        graph.add_edges_from(
            (first, second)
            for first in range(second)
            if linked(masks[first], demands[first].ordered, masks[second], demands[second].ordered)
        )
    return [[demands[number] for number in sorted(group)] for group in nx.connected_components(graph)]


def linked(first: int, first_ordered: bool, second: int, second_ordered: bool) -> bool:
    """Whether two demands can constrain each other; an ordered one also does so with what lies inside it."""
    common = first & second
    if not common:
        return False
    if first_ordered or second_ordered:
        return (first_ordered and common != first) or (second_ordered and common != second) or first == second
    return common not in (first, second)


def _links(instance: Instance, scale: Scale, values: Iterable[int]) -> tuple[Link, ...]:
    inside = set(values)
    between: dict[tuple[int, int], list[int]] = {}
    for number, edge in enumerate(instance.edges):
        if edge.source in inside:
            ends = (min(edge.source, edge.target), max(edge.source, edge.target))
            between.setdefault(ends, []).append(number)
    return tuple(
        Link(ends, sum(scale.up(instance.edges[number].weight) for number in numbers), tuple(numbers))
        for ends, numbers in between.items()
    )


def _problem(channels: int, values: Iterable[int], demands: list[Demand], links: tuple[Link, ...]) -> Problem:
    atoms = collapse(channels, demands)
    items = items_of(demands, atoms)
    hard = [item for item in items if not item.readers]
    soft = sorted((item for item in items if item.readers), key=lambda item: -item.weight)
    return Problem(len(atoms.members), tuple(sorted(values)), (*hard, *soft), len(hard), links)
